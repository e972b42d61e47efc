"""What ``kubectl kustomize`` makes of a folder, for the few features that ``cluster/kuberay`` uses.

Any other key, operation or target is an error, so that a test cannot pass by leaving something out.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
CLUSTER_WIDE = {"PriorityClass"}


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, resolved."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    _refuse_unknown(settings, KNOWN, folder)
    objects: list[Object] = []
    for name in settings.get("resources", []):
        path = folder / name
        if path.is_dir():
            objects += build(path)
        else:
            objects += [one for one in yaml.safe_load_all(path.read_text()) if one]
    _apply(settings, folder, objects)
    for name in settings.get("components", []):
        component = yaml.safe_load((folder / name / "kustomization.yaml").read_text())
        _refuse_unknown(component, KNOWN - {"namespace", "resources"}, folder / name)
        _apply(component, folder / name, objects)
    return objects


def _refuse_unknown(settings: Object, known: set[str], where: Path) -> None:
    unknown = set(settings) - known
    if unknown:
        raise ValueError(f"{where}: {sorted(unknown)} is beyond this helper")


def _apply(settings: Object, folder: Path, objects: list[Object]) -> None:
    for patch in settings.get("patches", []):
        _refuse_unknown(patch, {"path", "target"}, folder)
        wanted = patch["target"]
        found = [one for one in objects if _matches(one, wanted)]
        if not found:
            raise ValueError(f"{folder}: nothing matches {wanted}")
        for one in found:
            for step in yaml.safe_load((folder / patch["path"]).read_text()):
                json_patch(one, step)
    for image in settings.get("images", []):
        _refuse_unknown(image, {"name", "newName", "digest"}, folder)
        for one in objects:
            for container in containers(one):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}@{image['digest']}"
    for one in objects:
        if "namespace" in settings and one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = settings["namespace"]


def _matches(one: Object, wanted: Object) -> bool:
    """Names in a target are regular expressions that match as a whole."""
    return one["kind"] == wanted["kind"] and re.fullmatch(wanted["name"], one["metadata"]["name"]) is not None


def json_patch(document: Any, step: Object) -> None:
    """One step of RFC 6902 in place: ``add``, ``remove`` or ``replace``; the last two need what they name."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:])
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]
    operation, key = step["op"], int(last) if isinstance(document, list) and last != "-" else last
    if operation in ("remove", "replace"):
        document[key]  # raises where it is missing
    if operation == "remove":
        del document[key]
    elif operation == "add" and isinstance(document, list):
        document.insert(len(document) if key == "-" else key, copy.deepcopy(step["value"]))
    elif operation in ("add", "replace"):
        document[key] = copy.deepcopy(step["value"])
    else:
        raise ValueError(f"operation {operation} is beyond this helper")


def containers(tree: Any) -> list[Object]:
    """Every container in an object, wherever its pod template is."""
    if isinstance(tree, dict):
        own = [one for key in ("containers", "initContainers") for one in tree.get(key, [])]
        return own + [one for value in tree.values() for one in containers(value)]
    return [one for value in tree for one in containers(value)] if isinstance(tree, list) else []
