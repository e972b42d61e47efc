"""The forms that labelled images come in, each read to plain rows."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.parquets import holds_bytes, image_column
from ktray.data.records import is_csv, is_image, is_parquet
from ktray.data.sources import read_csv, resolve
from ktray.data.uris import ImageRef
from ktray.errors import KtrayError

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
FORMS = (
    "Name a folder with train/ val/ test/ of class folders, a folder of class folders, or a CSV or Parquet list "
    "with path,label[,split]."
)


@dataclass(frozen=True)
class Row:
    """One labelled image as it was found.

    Attributes:
        uri: where it lies.
        key: its path inside the data, the same on every machine; what is drawn depends on it.
        label: the class's name, Unicode NFC.
        split: ``train``, ``val``, ``test``, or ``pool`` (a training image outside of the chosen split list).
        version: size and time of the file, or empty.
    """

    uri: str
    key: str
    label: str
    split: str
    version: str = ""


def read_rows(data: str, splits: str | None, labels_per_class: int | None) -> tuple[list[Row], list[str]]:
    """All labelled images under ``data``, and notes on what was left out."""
    path = filesystem.normalise(data)
    notes: list[str] = []
    try:
        if filesystem.is_folder(path):
            if splits:
                return _split_lists(path, filesystem.normalise(splits), labels_per_class, notes), notes
            return _folder(path, notes), notes
        file = filesystem.stat(path)
    except OSError as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    if file is None:
        raise KtrayError(f"'{path}' does not exist", f"Check task.data. {FORMS}")
    if splits:
        raise KtrayError(f"task.splits goes with a folder of images, and '{path}' is a list", "Leave one of them out.")
    if is_csv(path) or is_parquet(path):
        return _list(file, notes), notes
    raise KtrayError(f"'{path}' is not a kind of labelled data", FORMS)


def _folder(path: str, notes: list[str]) -> list[Row]:
    parts: dict[str, list[str]] = defaultdict(list)
    folders, _ = filesystem.children(path)
    for name in folders:
        if split := SPLITS.get(name.lower()):
            parts[split].append(name)
    if "train" in parts:
        twice = [names for names in parts.values() if len(names) > 1]
        if twice:
            raise KtrayError(
                f"'{path}' has two folders for one split: {' and '.join(twice[0])}", "Merge or remove one."
            )
        others = [n for n in folders if n.lower() not in SPLITS]
        if others:
            notes.append(f"Folders beside train, val and test are ignored: {', '.join(others[:5])}.")
        rows = [row for split, (name,) in sorted(parts.items()) for row in _classes(path, name, split, notes)]
    else:
        if parts and set(folders) == {name for names in parts.values() for name in names}:
            raise KtrayError(f"'{path}' has {' and '.join(sorted(parts))} but no train folder", FORMS)
        rows = _classes(path, "", "train", notes)
    if not rows:
        raise KtrayError(f"No image in a class folder was found in '{path}'", FORMS)
    return rows


def _classes(root: str, inside: str, split: str, notes: list[str]) -> list[Row]:
    """Rows of a folder of class folders. Images in folders below a class belong to the class."""
    folder = f"{root}/{inside}" if inside else root
    where = f"{inside}/" if inside else ""
    names, files = filesystem.children(folder)
    rows: list[Row] = []
    empty: list[str] = []
    counts = {"not images": 0, "named in something else than UTF-8": 0, "in linked or closed folders": 0}
    for name in names:
        before = len(rows)
        for file in filesystem.walk(f"{folder}/{name}"):
            key = where + name + file.path[len(folder) + 1 + len(name) :]
            if filesystem.printable(file.path) != file.path:
                counts["named in something else than UTF-8"] += 1
            elif file.size < 0:
                counts["in linked or closed folders"] += 1
            elif not is_image(file.path):
                counts["not images"] += 1
            else:
                rows.append(Row(file.path, _nfc(key), _nfc(name), split, f"{file.size}:{file.mtime_ns}"))
        if len(rows) == before:
            empty.append(filesystem.printable(name))
    for what, number in counts.items():
        if number:
            notes.append(f"{number} files in '{where or './'}' are ignored: {what}.")
    loose = sum(map(is_image, files))
    if loose:
        notes.append(f"{loose} images directly in '{where or './'}' are ignored: they are in no class folder.")
    if empty:
        shown = ", ".join(f"'{name}'" for name in empty[:5])
        notes.append(f"{len(empty)} class folders in '{where or './'}' hold no image and are dropped: {shown}.")
    return rows


def _list(file: FileStat, notes: list[str]) -> list[Row]:
    path = file.path
    version = f"{file.size}:{file.mtime_ns}"
    lines = read_csv(path) if is_csv(path) else _parquet_lines(path)
    if not lines:
        raise KtrayError(f"List '{path}' has no rows", "Its first line names the columns path,label[,split].")
    names = {name.lower(): name for name in reversed(list(lines[0]))}
    for needed in ("path", "label"):
        if needed not in names:
            near = difflib.get_close_matches(needed, names, n=1)
            hint = f"rename '{names[near[0]]}'" if near else f"its columns are {', '.join(lines[0])}"
            raise KtrayError(f"List '{path}' has no column '{needed}'", f"Lists have path,label[,split]: {hint}.")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2 if is_csv(path) else 1):
        name, label = line[names["path"]], _nfc(line[names["label"]])
        split = line[names["split"]].lower() if "split" in names else "train"
        if not name or not label or split not in SPLITS:
            what = "no path" if not name else "no label" if not label else f"split '{split}'"
            raise KtrayError(f"List '{path}' has {what} in row {number}", "Splits are train, val and test.")
        rows.append(Row(resolve(name, path), _nfc(name), label, SPLITS[split], version))
    if not any(map(_reachable, rows)):
        raise KtrayError(
            f"None of the {len(rows)} images of list '{path}' exists, for example '{rows[0].uri}'",
            "Paths in a list are absolute, s3://, or relative to the list's own folder.",
        )
    return rows


def _reachable(row: Row) -> bool:
    """False only where it is certain; single files that are missing are quarantined when they are read."""
    container = ImageRef.parse(row.uri).path
    return filesystem.is_remote(container) or filesystem.stat(container) is not None


def _parquet_lines(path: str) -> list[dict[str, str]]:
    """A Parquet list as text; images inside the file become uris of its rows."""
    try:
        with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
            schema = file.schema_arrow
            lower = {name.lower(): name for name in reversed(schema.names)}
            inside = "path" not in lower and any(holds_bytes(f.type) for f in schema)
            images = image_column(schema, "auto", path) if inside else None
            small = [f.name for f in schema if not pa.types.is_nested(f.type) and not holds_bytes(f.type)]
            columns: list[dict[str, Any]] = file.read(columns=small).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise KtrayError(
            f"List '{path}' is not a whole Parquet file: {filesystem.why(error)}", "Write it anew."
        ) from error
    lines = [{name: _text(value) for name, value in row.items()} for row in columns]
    if images is not None:
        lines = [{"path": str(ImageRef(path, row=i)), **line} for i, line in enumerate(lines)]
    return lines


def _text(value: Any) -> str:
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # integers with nulls come as floats from pandas
        return str(int(value))
    return str(value).strip()


def _split_lists(path: str, splits: str, labels_per_class: int | None, notes: list[str]) -> list[Row]:
    if not filesystem.is_folder(splits):
        raise KtrayError(f"task.splits '{splits}' is not a folder", "Name a folder with train*.txt, val.txt, test.txt.")
    lists: dict[str, list[str]] = defaultdict(list)
    for name in filesystem.children(splits)[1]:
        kind = SPLITS.get(re.split(r"[_.\-]", name.lower())[0])
        if kind and name.lower().endswith((".txt", ".csv")):
            lists[kind].append(f"{splits}/{name}")
    if not lists["train"]:
        raise KtrayError(f"'{splits}' has no train*.txt", "Split lists are named train*.txt, val*.txt and test*.txt.")
    chosen = {kind: _choose(paths, kind, labels_per_class) for kind, paths in lists.items() if paths}
    notes.append("Split lists: " + ", ".join(f"{c.rpartition('/')[2]}" for c in chosen.values()) + ".")
    index = _Index(path)
    rows = [index.row(name, label, kind) for kind, file in chosen.items() for name, label in _pairs(file)]
    named = {row.uri for row in rows if row.split == "train"}
    larger = [
        index.row(*pair, "pool") for other in lists["train"] if other != chosen["train"] for pair in _pairs(other)
    ]
    rows += {row.uri: row for row in larger if row.uri not in named}.values()
    index.check(splits)
    return rows


def _choose(paths: Sequence[str], kind: str, labels_per_class: int | None) -> str:
    if len(paths) == 1:
        return paths[0]
    wanted = rf"train_{labels_per_class}img" if labels_per_class else r"train_full|train\."
    fits = [p for p in paths if re.match(wanted, p.rpartition("/")[2])]
    if kind == "train" and len(fits) != 1 and labels_per_class:
        fits = [p for p in paths if re.match(r"train_full|train\.", p.rpartition("/")[2])]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(p.rpartition("/")[2] for p in paths)
    raise KtrayError(
        f"It is not clear which {kind} list is meant: {listed}",
        "Set task.labels_per_class to the number in one of the names, or leave one list in the folder.",
    )


def _pairs(path: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(filesystem.read_bytes(path).decode("utf-8-sig").splitlines(), 1):
        if line.strip():
            name, comma, label = (part.strip() for part in line.rpartition(","))
            if not comma or not name or not label:
                raise KtrayError(f"Split list '{path}' has no 'file,class' in line {number}", "Mend the line.")
            yield name, _nfc(label)


class _Index:
    """Finds the images that split lists name: by path below the data, or by name and class folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.by_name: dict[str, list[FileStat]] = defaultdict(list)
        self.missing: list[str] = []
        for file in filesystem.walk(root):
            self.by_name[file.path.rpartition("/")[2]].append(file)

    def row(self, name: str, label: str, split: str) -> Row:
        found = self._find(name, label)
        if found is None:
            self.missing.append(f"{name},{label}")
            return Row(f"{self.root}/{name}", name, label, split)
        key = _nfc(found.path[len(self.root) + 1 :])
        return Row(found.path, key, label, split, f"{found.size}:{found.mtime_ns}")

    def _find(self, name: str, label: str) -> FileStat | None:
        files = self.by_name.get(name.rpartition("/")[2], [])
        exact = [f for f in files if f.path == f"{self.root}/{name}"]
        # Places365's class "hunting_lodge_outdoor" lies in the folder "h/hunting_lodge/outdoor".
        wanted = "_" + label.replace("/", "_")
        in_class = [f for f in files if _below(f.path.rpartition("/")[0], self.root).endswith(wanted)]
        for candidates in (exact, in_class, files):
            if len(candidates) == 1:
                return candidates[0]
        return None

    def check(self, splits: str) -> None:
        if self.missing:
            shown = "; ".join(self.missing[:3])
            raise KtrayError(
                f"{len(self.missing)} images of the lists in '{splits}' are not (or not clearly) in '{self.root}': "
                f"{shown}",
                "Check task.data: files lie in it by the list's path, or in a folder of their class.",
            )


def _below(folder: str, root: str) -> str:
    return "_" + _nfc(folder[len(root) + 1 :]).replace("/", "_")


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
