"""Labels in tar shards (WebDataset): ``KEY.cls`` or a key of ``KEY.json`` beside ``KEY.jpg``, and the names of class
numbers in ``classnames.txt`` or ``classes.txt`` beside the shards or in the folder above."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.filesystem import why
from ktray.data.sources.base import LabelTable
from ktray.data.sources.parquet_tables import LABEL_NAMES
from ktray.errors import KtrayError

LABEL_SUFFIXES = ("cls", "label", "json")
_NAMES = ("classnames.txt", "classes.txt")
_LABEL = LABEL_NAMES[0]
_FORM = "A labelled sample has KEY.jpg and KEY.cls (number or name of the class), or KEY.json with the key label."


@dataclass(frozen=True)
class Member:
    """A member of an archive that describes a sample.

    Attributes:
        key: the sample.
        name: name of the member.
        suffix: what follows the key, in lower case, such as ``cls``.
        uri: where the image is; empty if the member is not an image.
        content: the content of a member with one of `LABEL_SUFFIXES`; empty of others.
    """

    key: str
    name: str
    suffix: str
    uri: str = ""
    content: bytes = b""


@dataclass
class _Sample:
    images: list[Member] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def label_table(path: str, members: Iterable[Member]) -> LabelTable:
    """The labels of one archive.

    Raises:
        KtrayError: it has no images or no labels, or a label cannot be read.
    """
    samples: dict[str, _Sample] = {}
    suffixes: dict[str, None] = {}
    for member in members:
        sample = samples.setdefault(member.key, _Sample())
        suffixes[member.suffix] = None
        if member.uri:
            sample.images.append(member)
        elif member.suffix in LABEL_SUFFIXES:
            own = _facts(path, member)
            # A .cls says the class itself; a .json often has many other keys.
            sample.facts = {**sample.facts, **own} if member.suffix != "json" else {**own, **sample.facts}
    with_images = {key: sample for key, sample in samples.items() if sample.images}
    names = {name for sample in with_images.values() for name in sample.facts}
    if not {name.lower() for name in names} & set(LABEL_NAMES):
        listed = ", ".join(f".{suffix}" for suffix in list(suffixes)[:5]) or "no members"
        raise KtrayError(f"Tar shard '{path}' has no labels, only {listed}", _FORM)
    rows = [(image, sample.facts) for sample in with_images.values() for image in sample.images]
    columns = {name: _column([facts.get(name) for _, facts in rows]) for name in sorted(names)}
    uris = [image.uri for image, _ in rows]
    return LabelTable(
        path,
        _schema(path, columns),
        len(rows),
        lambda wanted: {name: columns[name].to_pylist() for name in wanted},
        lambda row: uris[row],
        keys=[image.name for image, _ in rows],
    )


def _facts(path: str, member: Member) -> dict[str, Any]:
    try:
        text = member.content.decode("utf-8-sig").strip()
        if member.suffix != "json":
            return {_LABEL: int(text) if text.lstrip("-").isdigit() else text}
        facts = json.loads(text)
    except ValueError as error:
        raise KtrayError(
            f"'{member.name}' in '{path}' is not {'JSON' if member.suffix == 'json' else 'text in UTF-8'}: "
            f"{why(error)}",
            _FORM,
        ) from error
    if not isinstance(facts, dict):
        return {_LABEL: facts}
    return {str(name): value for name, value in facts.items() if isinstance(value, str | int | float)}


def _column(values: list[Any]) -> pa.Array:
    """Numbers as numbers, which may have names; everything else as text."""
    if all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _schema(path: str, columns: dict[str, pa.Array]) -> pa.Schema:
    schema = pa.schema([(name, column.type) for name, column in columns.items()])
    names = _class_names(path)
    if not names:
        return schema
    features = {name: {"_type": "ClassLabel", "names": names} for name in columns if name.lower() in LABEL_NAMES}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _class_names(path: str) -> list[str]:
    folder = path.rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]):
        for name in _NAMES:
            if place and filesystem.stat(f"{place}/{name}") is not None:
                text = filesystem.read_bytes(f"{place}/{name}").decode("utf-8-sig", "replace")
                return [line.strip() for line in text.splitlines() if line.strip()]
    return []
