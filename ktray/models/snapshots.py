"""Published models by repository or folder: ``hf-hub:ORG/NAME[@REVISION]`` and ``local-dir:FOLDER``.

A snapshot has the config of timm (``config.json`` with ``architecture``), of open_clip (``open_clip_config.json``) or
of transformers (``config.json`` with ``model_type``), and one file of weights. Only these files are fetched, and none
of them can run code: what a config may set is limited to sizes and preprocessing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from ktray.errors import KtrayError
from ktray.models.messages import cause

HUB, FOLDER = "hf-hub", "local-dir"
TIMM, OPEN_CLIP, TRANSFORMERS = "timm", "open_clip", "transformers"
_CONFIG, _OPEN_CLIP_CONFIG, _PREPROCESSOR = "config.json", "open_clip_config.json", "preprocessor_config.json"
_WEIGHTS = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    TIMM: ("model.safetensors", "pytorch_model.bin"),
    TRANSFORMERS: ("model.safetensors", "pytorch_model.bin"),
}
# What a pretrained_cfg of timm may set here; the others name places of weights.
_ALLOWED = (
    "mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode", "fixed_input_size", "pool_size",
    "first_conv", "classifier", "min_input_size", "label_names", "num_classes",
)  # fmt: skip
_REFUSED = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable")
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Snapshot:
    """A published model whose config was read.

    Attributes:
        name: the name in the recipe, with ``hf-hub:`` or ``local-dir:``.
        key: the recipe key with the name, for messages.
        kind: whose config it is: ``timm``, ``open_clip`` or ``transformers``.
        config: the parsed config.
        commit: the commit on the hub; empty for a folder.
        preprocessor: the parsed ``preprocessor_config.json`` of transformers, if there is one.
    """

    name: str
    key: str
    kind: str
    config: dict[str, Any]
    commit: str = ""
    preprocessor: dict[str, Any] | None = None

    def weights(self) -> Path:
        """The local file of weights; from the hub, it is downloaded.

        Raises:
            KtrayError: there is none, or the hub does not give it.
        """
        for name in _WEIGHTS[self.kind]:
            if path := _file(self.name, name, self.key, self.commit):
                return path[0]
        raise KtrayError(
            f"'{self.name}' has no weights in one file: {' or '.join(_WEIGHTS[self.kind])}",
            f"Choose another {self.key}; weights in several files are not read.",
        )

    @property
    def architecture(self) -> str:
        """The name of a model in timm, of a snapshot of timm."""
        return str(self.config["architecture"])

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the model, of a snapshot of timm."""
        return dict(self.config.get("model_args") or {})

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The entries of timm's ``pretrained_cfg`` for input and preprocessing."""
        if self.kind == TRANSFORMERS:
            return _preprocessing(self.preprocessor or {})
        own = self.config.get("pretrained_cfg") or {}
        return {name: own[name] for name in _ALLOWED if own.get(name) is not None}


def is_snapshot(name: str) -> bool:
    """Whether a name in a recipe is that of a repository or of a folder."""
    return name.startswith((f"{HUB}:", f"{FOLDER}:"))


def open_snapshot(name: str, key: str) -> Snapshot:
    """Read the config of a published model.

    Args:
        name: ``hf-hub:ORG/NAME[@REVISION]`` or ``local-dir:FOLDER``.
        key: the recipe key with the name.

    Raises:
        KtrayError: there is no such repository, revision or folder, it has no config that is understood, or the config
            would load something from another place.
    """
    if found := _file(name, _OPEN_CLIP_CONFIG, key):
        return Snapshot(name, key, OPEN_CLIP, _json(name, found[0]), found[1])
    found = _file(name, _CONFIG, key)
    config = _json(name, found[0]) if found else {}
    commit = found[1] if found else ""
    if "architecture" in config:
        _check(name, key, config)
        return Snapshot(name, key, TIMM, config, commit)
    if "model_type" in config:
        processor = _file(name, _PREPROCESSOR, key, commit)
        return Snapshot(name, key, TRANSFORMERS, config, commit, _json(name, processor[0]) if processor else None)
    raise KtrayError(
        f"'{name}' has no {_OPEN_CLIP_CONFIG}, and no {_CONFIG} of timm (architecture) or transformers (model_type)",
        f"Set {key} to a repository or folder of one of these libraries.",
    )


def _check(name: str, key: str, config: dict[str, Any]) -> None:
    architecture, arguments = config["architecture"], config.get("model_args") or {}
    if not isinstance(architecture, str) or ":" in architecture or not timm.is_model(architecture):
        raise KtrayError(
            f"The config of '{name}' names the architecture '{architecture}', which the installed timm does not have",
            f"Install a newer timm, or choose another {key}.",
        )
    wrong = [argument for argument in arguments if argument in _REFUSED]
    if wrong:
        raise KtrayError(
            f"The config of '{name}' sets the argument {wrong[0]}, which names weights in another place",
            "Do not use this model, or remove the argument from model_args.",
        )


def _file(name: str, file: str, key: str, commit: str = "") -> tuple[Path, str] | None:
    """A file of a snapshot on this machine, and its commit; None if the snapshot has no such file."""
    prefix, _, place = name.partition(":")
    if prefix == FOLDER:
        folder = Path(place).expanduser()
        if not folder.is_absolute():
            raise KtrayError(
                f"'{name}' is a relative path, and workers run in other folders", f"Set {key} to its full path."
            )
        if not folder.is_dir():
            raise KtrayError(f"There is no folder '{place}'", f"Set {key}={FOLDER}: to an existing folder.")
        return (folder / file, "") if (folder / file).is_file() else None
    return _fetched(name, place, file, key, commit)


def _fetched(name: str, place: str, file: str, key: str, commit: str) -> tuple[Path, str] | None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = place.partition("@")
    try:
        path = huggingface_hub.hf_hub_download(
            repository,
            file,
            revision=commit or revision or None,
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            library_name="ktray",
        )
    except LocalEntryNotFoundError as error:
        raise KtrayError(
            f"'{name}' is not in the local cache of the hub, and the hub does not answer or is not asked "
            "(HF_HUB_OFFLINE)",
            f"Check the network, or set {key}={FOLDER}:FOLDER to a copy (`hf download {repository}`).",
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the hub's client and of its network library
        raise KtrayError(
            f"'{name}' cannot be read from the hub: {cause(error)}",
            f"Check {key} (hf-hub:ORG/NAME[@REVISION]); for a private or gated repository, accept its terms and set "
            "HF_TOKEN.",
        ) from error
    # .../snapshots/COMMIT/FILE
    return Path(path), Path(path).parts[-2]


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KtrayError(f"{path.name} of '{name}' is not JSON: {cause(error)}", "Download it again.") from error
    if not isinstance(found, dict):
        raise KtrayError(f"{path.name} of '{name}' is not an object of JSON", "Download it again.")
    return found


def _preprocessing(facts: dict[str, Any]) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers as entries of a ``pretrained_cfg``."""
    found: dict[str, Any] = {}
    if facts.get("do_normalize", True) and "image_mean" in facts and "image_std" in facts:
        found |= {"mean": tuple(facts["image_mean"]), "std": tuple(facts["image_std"])}
    if facts.get("resample") in _INTERPOLATIONS:
        found["interpolation"] = _INTERPOLATIONS[facts["resample"]]
    size, crop = _side(facts.get("size")), _side(facts.get("crop_size"))
    if crop and facts.get("do_center_crop", True):
        found |= {"input_size": (3, crop, crop), "crop_pct": crop / size if size else 1.0, "crop_mode": "center"}
    elif size:
        found |= {"input_size": (3, size, size), "crop_pct": 1.0, "crop_mode": "squash"}
    return found


def _side(size: Any) -> int:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else 0
