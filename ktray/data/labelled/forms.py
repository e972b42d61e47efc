"""The forms that labelled images come in, each read to plain rows."""

from __future__ import annotations

import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.csv_lists import is_csv, read_csv
from ktray.data.sources.parquet_tables import holds_bytes, image_column
from ktray.data.sources.parquets import ParquetRow, is_parquet
from ktray.data.sources.records import is_image
from ktray.data.sources.uris import ImageRef, resolve
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


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One labelled image as it was found.

    Attributes:
        uri: where it lies.
        key: its path inside the data, or ``class/file`` of a split list: the same on every machine; what is drawn
            depends on it.
        label: the class's name, Unicode NFC; empty where a mask holds the classes.
        split: ``train``, ``val``, ``test``, or ``pool`` (a training image outside of the chosen split list).
        version: size and time of the file (and of its mask), or empty.
        mask: where its label map lies, or empty.
    """

    uri: str
    key: str
    label: str
    split: str
    version: str = ""
    mask: str = field(default="", repr=False)


def read_rows(data: str, notes: list[str]) -> list[LabelledRow]:
    """All labelled images of a folder of class folders or of a list; what was left out goes to ``notes``."""
    path, file = place(data)
    if file is None:
        return _folder(path, notes)
    if is_csv(path) or is_parquet(path):
        return _list(file, notes)
    raise KtrayError(f"'{path}' is not a kind of labelled data", FORMS)


def place(data: str) -> tuple[str, FileStat | None]:
    """The absolute path, and its `FileStat` when it is a file and no folder. Raises KtrayError: it is neither."""
    path = filesystem.normalise(data)
    try:
        if filesystem.is_folder(path):
            return path, None
        file = filesystem.stat(path)
    except OSError as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    if file is None:
        raise KtrayError(f"'{path}' does not exist", f"Check task.data. {FORMS}")
    return path, file


def _folder(path: str, notes: list[str]) -> list[LabelledRow]:
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


def _classes(root: str, inside: str, split: str, notes: list[str]) -> list[LabelledRow]:
    """Rows of a folder of class folders. Images in folders below a class belong to the class."""
    folder = f"{root}/{inside}" if inside else root
    where = f"{inside}/" if inside else ""
    names, files = filesystem.children(folder)
    rows: list[LabelledRow] = []
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
                rows.append(LabelledRow(file.path, nfc(key), nfc(name), split, f"{file.size}:{file.mtime_ns}"))
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


def _list(file: FileStat, notes: list[str]) -> list[LabelledRow]:
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
    rows: list[LabelledRow] = []
    for number, line in enumerate(lines, 2 if is_csv(path) else 1):
        name, label = line[names["path"]], nfc(line[names["label"]])
        split = line[names["split"]].lower() if "split" in names else "train"
        if not name or not label or split not in SPLITS:
            what = "no path" if not name else "no label" if not label else f"split '{split}'"
            raise KtrayError(f"List '{path}' has {what} in row {number}", "Splits are train, val and test.")
        rows.append(LabelledRow(resolve(name, path), nfc(name), label, SPLITS[split], version))
    if not any(map(_reachable, rows)):
        raise KtrayError(
            f"None of the {len(rows)} images of list '{path}' exists, for example '{rows[0].uri}'",
            "Paths in a list are absolute, s3://, or relative to the list's own folder.",
        )
    return rows


def _reachable(row: LabelledRow) -> bool:
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
        lines = [{"path": str(ParquetRow(path, row=i)), **line} for i, line in enumerate(lines)]
    return lines


def _text(value: Any) -> str:
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # integers with nulls come as floats from pandas
        return str(int(value))
    return str(value).strip()


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def three(names: Iterable[str]) -> str:
    """Up to three of some names, and how many more."""
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(f"'{filesystem.printable(name)}'" for name in every[:3]) + more


def count(things: Sized, one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"
