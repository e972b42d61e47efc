"""The file formats of labelled images: folders of class folders and lists are read as rows of one type."""

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
    "Name a folder with train/, val/ and test/ that contain class folders, a folder of class folders, or a CSV or "
    "Parquet list with the columns path,label[,split]."
)


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One labelled image before the splits are drawn.

    Attributes:
        uri: where the image is.
        key: path of the image inside the data, or ``class/file`` of a split list. It is the same on every machine, and
            random draws depend on it.
        label: the name of the class, Unicode NFC; empty if a mask contains the classes.
        split: ``train``, ``val``, ``test``, or ``pool`` (a training image that is not in the chosen split list).
        version: size and modification time of the file (and of its mask), or empty.
        mask: where the label map of the image is, or empty.
        group: name of a group of images that are not independent, such as those of one patient or of one video, or
            empty. A split that ktray draws keeps the group together.
    """

    uri: str
    key: str
    label: str
    split: str
    version: str = ""
    mask: str = field(default="", repr=False)
    group: str = field(default="", repr=False)


def read_rows(data: str, notes: list[str], group: str | None = None) -> list[LabelledRow]:
    """All labelled images of a folder of class folders or of a list. Ignored files are reported in ``notes``.

    Args:
        group: the column of a list with the group of each image; None: the column ``group``, if there is one.

    Raises:
        KtrayError: there is nothing that can be read, or no such column.
    """
    path, file = place(data)
    if file is None:
        no_groups(group, path)
        return _folder(path, notes)
    if is_csv(path) or is_parquet(path):
        return list_rows(file, notes, group)
    raise KtrayError(f"'{path}' is not in a format of labelled data", FORMS)


def no_groups(group: str | None, path: str) -> None:
    """Raises KtrayError if task.group is set, for data without columns."""
    if group is not None:
        raise KtrayError(
            f"task.group={group} is a column of a CSV or Parquet list, and '{path}' is a folder",
            "Remove task.group, or set task.data to a list with the columns path,label and this one.",
        )


def place(data: str) -> tuple[str, FileStat | None]:
    """The absolute path, and its `FileStat` if it is a file, or None if it is a folder.

    Raises:
        KtrayError: it is neither a file nor a folder, or cannot be read.
    """
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
                f"'{path}' has two folders for one split: {' and '.join(twice[0])}", "Merge the folders, or remove one."
            )
        ignored = [n for n in folders if n.lower() not in SPLITS]
        if ignored:
            notes.append(f"Folders other than train, val and test are ignored: {', '.join(ignored[:5])}.")
        rows = [row for split, (name,) in sorted(parts.items()) for row in _classes(path, name, split, notes)]
    else:
        if parts and set(folders) == {name for names in parts.values() for name in names}:
            raise KtrayError(f"'{path}' has {' and '.join(sorted(parts))} but no train folder", FORMS)
        rows = _classes(path, "", "train", notes)
    if not rows:
        raise KtrayError(f"'{path}' has no images in class folders", FORMS)
    return rows


def _classes(root: str, inside: str, split: str, notes: list[str]) -> list[LabelledRow]:
    """Rows of a folder of class folders. Images in subfolders of a class folder belong to its class."""
    folder = f"{root}/{inside}" if inside else root
    prefix = f"{inside}/" if inside else ""
    names, files = filesystem.children(folder)
    rows: list[LabelledRow] = []
    empty: list[str] = []
    counts = {"they are not images": 0, "their names are not UTF-8": 0, "they are in linked or unreadable folders": 0}
    for name in names:
        before = len(rows)
        for file in filesystem.walk(f"{folder}/{name}"):
            key = prefix + name + file.path[len(folder) + 1 + len(name) :]
            if filesystem.printable(file.path) != file.path:
                counts["their names are not UTF-8"] += 1
            elif file.size < 0:
                counts["they are in linked or unreadable folders"] += 1
            elif not is_image(file.path):
                counts["they are not images"] += 1
            else:
                rows.append(LabelledRow(file.path, nfc(key), nfc(name), split, f"{file.size}:{file.mtime_ns}"))
        if len(rows) == before:
            empty.append(filesystem.printable(name))
    for reason, number in counts.items():
        if number:
            notes.append(f"{number} files in '{prefix or './'}' are ignored: {reason}.")
    loose = sum(map(is_image, files))
    if loose:
        notes.append(f"{loose} images directly in '{prefix or './'}' are ignored: they are not in a class folder.")
    if empty:
        shown = ", ".join(f"'{name}'" for name in empty[:5])
        notes.append(f"{len(empty)} class folders in '{prefix or './'}' have no images and are ignored: {shown}.")
    return rows


def list_rows(
    file: FileStat,
    notes: list[str],
    group: str | None,
    lines: list[dict[str, str]] | None = None,
    unlabelled: bool = False,
) -> list[LabelledRow]:
    """The rows of a list; see `read_rows`.

    Args:
        lines: the cells of the list, where they are read in another way; None: they are read here.
        unlabelled: whether a label may be empty.
    """
    path = file.path
    version = f"{file.size}:{file.mtime_ns}"
    if lines is None:
        lines = read_csv(path) if is_csv(path) else parquet_lines(path)
    if not lines:
        raise KtrayError(
            f"List '{path}' has no rows",
            "The first line has the column names path,label[,split]. Add one line per image.",
        )
    names = {name.lower(): name for name in reversed(list(lines[0]))}
    groups = (group or "group").lower()
    for needed in ("path", "label", *([groups] if group else [])):
        if needed not in names:
            near = difflib.get_close_matches(needed, names, n=1)
            hint = f"Rename '{names[near[0]]}'" if near else f"This one has the columns {', '.join(lines[0])}"
            raise KtrayError(
                f"List '{path}' has no column '{needed}'{' (task.group)' if needed == groups else ''}",
                f"A list has the columns path,label[,split][,group]. {hint}.",
            )
    rows: list[LabelledRow] = []
    for number, line in enumerate(lines, 2 if is_csv(path) else 1):
        name, label = line[names["path"]], nfc(line[names["label"]])
        split = line[names["split"]].lower() if "split" in names else "train"
        if not name or not (label or unlabelled) or split not in SPLITS:
            unnamed = not label and not unlabelled
            problem = "no path" if not name else "no label" if unnamed else f"split '{split}'"
            raise KtrayError(
                f"List '{path}' has {problem} in row {number}",
                "Fill in path and label; splits are train, val and test.",
            )
        member = nfc(line[names[groups]]) if groups in names else ""
        rows.append(LabelledRow(resolve(name, path), nfc(name), label, SPLITS[split], version, group=member))
    if not any(map(_reachable, rows)):
        raise KtrayError(
            f"None of the {len(rows)} images of list '{path}' exists, for example '{rows[0].uri}'",
            "Check the paths: they are absolute, s3://, or relative to the folder of the list.",
        )
    return rows


def _reachable(row: LabelledRow) -> bool:
    """False if the file is certainly missing. Single missing files are quarantined when they are read."""
    container = ImageRef.parse(row.uri).path
    return filesystem.is_remote(container) or filesystem.stat(container) is not None


def parquet_lines(path: str) -> list[dict[str, str]]:
    """The rows of a Parquet list as text. For images inside the file, the path is the uri of the row."""
    try:
        with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
            schema = file.schema_arrow
            lower = {name.lower(): name for name in reversed(schema.names)}
            inside = "path" not in lower and any(holds_bytes(f.type) for f in schema)
            images = image_column(schema, "auto", path) if inside else None
            text_columns = [f.name for f in schema if not pa.types.is_nested(f.type) and not holds_bytes(f.type)]
            columns: list[dict[str, Any]] = [{} for _ in range(file.metadata.num_rows)]
            if text_columns:
                columns = file.read(columns=text_columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise KtrayError(
            f"List '{path}' is not a complete Parquet file: {filesystem.why(error)}", "Write the file again."
        ) from error
    lines = [{name: cell_text(value) for name, value in row.items()} for row in columns]
    if images is not None:
        lines = [{"path": str(ParquetRow(path, row=i)), **line} for i, line in enumerate(lines)]
    return lines


def cell_text(value: Any) -> str:
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas writes integers with nulls as floats
        return str(int(value))
    return str(value).strip()


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def three(names: Iterable[str]) -> str:
    """Up to three of the names, and the number of further names."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(f"'{filesystem.printable(name)}'" for name in listed[:3]) + more


def count(things: Sized, one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"
