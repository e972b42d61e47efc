"""Labelled images in tables: CSV lists, and the tables of sources, with paths or with the images themselves.

Data sets as Hugging Face publishes them have an image column ``{bytes, path}``, class numbers whose names are in the
metadata of the schema, and several files for each split (``data/train-00000-of-00002.parquet``).
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.rows import SPLITS, LabelledRow, nfc
from ktray.data.sources.base import LabelTable, in_order
from ktray.data.sources.csv_lists import CsvTable, is_csv, no_rows
from ktray.data.sources.missing_shards import missing_shards
from ktray.data.sources.parquet_tables import LABEL_NAMES, PATH_NAMES
from ktray.data.sources.uris import ImageRef, resolve
from ktray.errors import KtrayError

# Names of the column with the split, the preferred ones first.
SPLIT_NAMES = ("split", "subset", "partition")
# Names of columns that probably name a group of images which are not independent.
_GROUP_LIKE = re.compile(
    r"(patient|subject|person|lesion|case|study|animal|product|item|video|clip|session|scene|slide|sequence|burst)"
    r"[ _-]?(id|no|nr|number|name|key)?",
    re.IGNORECASE,
)
_UNLABELLED = "-1"  # the class number of images without a label, as in the test splits of published sets


@dataclass
class _Table:
    """The columns of a table that describe labelled images, as rows of text.

    Attributes:
        rows: path, label, split and group of each row; "" where a column or a cell is missing.
        uri: takes the number of a row and returns the uri of its image; None: ``path`` names it.
        classes: names of the class numbers.
        first: number of the first row in messages.
        keys: see `LabelTable`.
        named: the files of the images may be missing.
    """

    rows: Iterator[tuple[str, str, str, str]]
    uri: Callable[[int], str] | None = None
    classes: list[str] = field(default_factory=list)
    first: int = 1
    keys: Sequence[str] = ()
    named: bool = True


def is_table(path: str) -> bool:
    """Whether a file of this name may be a list of labelled images."""
    return is_csv(path) or any(source.labelled and source.fits(path) for _, source in in_order())


def tables_of_folder(path: str) -> list[LabelTable]:
    """The tables of a folder that a source reads as a whole, such as a table of Delta Lake; none of other folders."""
    sources = (source for _, source in in_order() if source.labelled and source.fits_folder(path))
    found: list[LabelTable] = next((tables for source in sources if (tables := source.tables(path, None))), [])
    return found


def read_table(
    file: FileStat,
    notes: list[str],
    asked: ListColumns,
    split: str = "train",
    labels: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> list[LabelledRow]:
    """The labelled images of a list: a CSV file, or a file of a source with labels.

    Args:
        notes: decisions with their reasons are appended.
        asked: the columns that the recipe names.
        split: the split of rows without one.
        labels: the label of each row, if it is not a text in the column; None: it is.
        unlabelled: whether a label may be empty.

    Raises:
        KtrayError: the list cannot be read, lacks a column, or has a row without path or label, or none of its images
            exists.
    """
    path, version = file.path, f"list {file.size}:{file.mtime_ns}"
    if is_csv(path):
        return _labelled(path, version, _csv(path, asked, notes), notes, split, labels, unlabelled)
    source = next(source for _, source in in_order() if source.labelled and source.fits(path))
    rows: list[LabelledRow] = []
    for table in source.tables(path, file):
        part = _columns(table, asked, notes)
        rows += _labelled(path, version, part, notes, table.split or split, labels, unlabelled)
    return rows


def read_folder_tables(tables: Sequence[LabelTable], notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    """The labelled images of the tables of a folder (`tables_of_folder`).

    Raises:
        KtrayError: see `read_table`.
    """
    rows: list[LabelledRow] = []
    for table in tables:
        split = table.split or "train"
        rows += _labelled(table.path, table.version, _columns(table, asked, notes), notes, split)
    return rows


def _labelled(
    path: str,
    version: str,
    table: _Table,
    notes: list[str],
    split: str,
    labels: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> list[LabelledRow]:
    name_in_keys = path.rpartition("/")[2]
    rows: list[LabelledRow] = []
    without = 0
    for number, (name, label, own_split, member) in enumerate(table.rows, table.first):
        at = number - table.first
        # Interned: a million rows share the strings of a thousand classes.
        label = sys.intern(nfc(label)) if labels is None else labels[at]
        part = own_split.lower() or split
        if table.classes and label == _UNLABELLED:
            without += 1
            continue
        lacks_label = not label and not unlabelled
        lacks_path = not name and table.uri is None
        if lacks_path or lacks_label or part not in SPLITS:
            problem = "no path" if lacks_path else "no label" if lacks_label else f"split '{own_split}'"
            raise KtrayError(
                f"List '{path}' has {problem} in row {number}",
                "Fill in path and label; splits are train, val and test.",
            )
        if table.classes and labels is None:
            if not label.isdigit() or int(label) >= len(table.classes):
                raise KtrayError(
                    f"List '{path}' has the label {label} in row {number}, and its {len(table.classes)} classes are "
                    f"numbered from 0",
                    "Correct the label, or the class names in the metadata of its schema.",
                )
            label = nfc(table.classes[int(label)])
        uri = table.uri(at) if table.uri else resolve(name, path)
        inside = nfc(table.keys[at]) if table.keys else f"row={at}"
        key = f"{name_in_keys}#{inside}" if table.uri else nfc(name)
        rows.append(LabelledRow(uri, key, label, SPLITS[part], version, group=nfc(member)))
    if without:
        notes.append(f"{without} rows of '{name_in_keys}' have no label (-1) and are ignored.")
    if not rows and not without:
        raise no_rows(path)
    if rows and table.named and not any(map(_reachable, rows)):
        raise KtrayError(
            f"None of the {len(rows)} images of list '{path}' exists, for example '{rows[0].uri}'",
            "Check the paths: they are absolute, s3://, or relative to the folder of the list.",
        )
    return rows


def split_of_file(path: str) -> str | None:
    """The split that the name of a table begins with, as in ``train-00000-of-00002.parquet``; None if it names none."""
    stem = path.rpartition("/")[2].partition(".")[0].lower()
    first = re.split(r"[-_.]", stem, maxsplit=1)[0]
    return SPLITS.get(stem) or SPLITS.get(first)


def _splits(paths: Sequence[str]) -> dict[str, str | None]:
    """The split of each table by its name. If no name begins with one, such as ``photos-train-0000.tar``, it may stand
    anywhere; a single ``photos_test.parquet``, without a file for train, is not a test split."""
    splits = {path: split_of_file(path) for path in paths}
    if any(splits.values()):
        return splits
    words = {path: re.split(r"[-_.]", path.rpartition("/")[2].lower()) for path in paths}
    inside = {path: next((SPLITS[word] for word in words[path] if word in SPLITS), None) for path in paths}
    return inside if "train" in inside.values() and None not in inside.values() else splits


def read_tables(files: Sequence[FileStat], notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    """The labelled images of several tables, whose names begin with their splits (see `split_of_file`).

    Raises:
        KtrayError: see `read_table`; or a name begins with no split although others do.
    """
    splits = _splits([file.path for file in files])
    without = [path for path, split in splits.items() if split is None]
    if without and len(without) < len(files):
        raise KtrayError(
            f"The name of '{without[0]}' begins with no split, and those of {len(files) - len(without)} other files do",
            "Let the names begin with train, val or test, or name one file.",
        )
    read: dict[str, list[str]] = defaultdict(list)
    rows: list[LabelledRow] = []
    for file in sorted(files, key=lambda f: f.path):
        split = splits[file.path] or "train"
        rows += read_table(file, notes, asked, split)
        read[split].append(file.path)
    listed = ", ".join(f"{len(paths)} for {split}" for split, paths in sorted(read.items()))
    notes.append(f"{len(files)} tables are read: {listed}.")
    notes += missing_shards(file.path for file in files)
    classes = Counter(row.label for row in rows)
    if classes and all(name.isdigit() for name in classes) and len(classes) > 1:
        notes.append("The class names are numbers: the tables have no names for them.")
    return rows


def _csv(path: str, asked: ListColumns, notes: list[str]) -> _Table:
    table = CsvTable.open(path)
    paths = _column(table.names, ("path", *PATH_NAMES), "path", path)
    wanted = [paths, *_described(table.names, path, asked, notes)]
    present = [name for name in wanted if name]
    at = [present.index(name) if name else -1 for name in wanted]

    def rows() -> Iterator[tuple[str, str, str, str]]:
        for cells in table.rows(present):
            path_cell, label, split, member = (cells[i] if i >= 0 else "" for i in at)
            yield path_cell, label, split, member

    return _Table(rows(), first=2)


def _columns(table: LabelTable, asked: ListColumns, notes: list[str]) -> _Table:
    path = table.path
    names = [*(name for name in table.schema.names if name != table.images), *table.fixed]
    paths = "" if table.uri else _column(names, ("path", *PATH_NAMES), "path", path)
    described = _described(names, path, asked, notes)
    wanted = (paths, *described)
    columns = table.read([name for name in dict.fromkeys(wanted) if name and name not in table.fixed])
    columns |= {name: [value] * table.count for name, value in table.fixed.items()}

    def rows() -> Iterator[tuple[str, str, str, str]]:
        for i in range(table.count):
            path_cell, label, split, member = (cell_text(columns[name][i]) if name else "" for name in wanted)
            yield path_cell, label, split, member

    return _Table(
        rows(), table.uri, class_names(table.schema, described[0]), keys=table.keys, named=table.named or not table.uri
    )


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of class numbers that Hugging Face's ``datasets`` stores in a schema (feature ClassLabel); else []."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        feature = facts["info"]["features"][column]
        names = feature["names"] if feature.get("_type") == "ClassLabel" else []
        return [str(name) for name in names] if pa.types.is_integer(schema.field(column).type) else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _described(names: Sequence[str], path: str, asked: ListColumns, notes: list[str]) -> tuple[str, str, str]:
    """The columns with label, split and group; "" for a split or group that the table does not have."""
    if asked.label is not None:
        label = _column(names, (asked.label.lower(),), asked.label, path, " (task.label)")
    else:
        label = _column(names, LABEL_NAMES, "label", path)
        if label.lower() != LABEL_NAMES[0]:
            others = [name for name in names if name != label and name.lower() in LABEL_NAMES]
            other = f"; task.label={others[0]} takes another" if others else ""
            notes.append(f"The column '{label}' of '{path.rpartition('/')[2]}' has the labels{other}.")
    lower = {name.lower(): name for name in reversed(names)}
    split = next((lower[name] for name in SPLIT_NAMES if name in lower), "")
    if asked.group is not None:
        member = _column(names, (asked.group.lower(),), asked.group, path, " (task.group)")
    else:
        member = lower.get("group", "")
        seen = [name for name in names if _GROUP_LIKE.fullmatch(name) and name not in (label, split)]
        if not member and seen:
            notes.append(
                f"The column '{seen[0]}' may name images that belong together; task.group={seen[0]} keeps them in one "
                "split."
            )
    return label, split, member


def _column(names: Sequence[str], known: Sequence[str], needed: str, path: str, key: str = "") -> str:
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in known if name in lower), None)
    if found is not None:
        return found
    near = difflib.get_close_matches(needed.lower(), lower, n=1)
    if key:
        hint = f"Is '{lower[near[0]]}' meant?" if near else f"It has the columns {', '.join(names)}."
        raise KtrayError(f"List '{path}' has no column '{needed}'{key}", hint)
    hint = f"Rename '{lower[near[0]]}'" if near else f"This one has the columns {', '.join(names)}"
    other = ", or name yours in task.label" if needed == "label" else ""
    raise KtrayError(
        f"List '{path}' has no column '{needed}'",
        f"A list has the columns path,label[,split][,group]. {hint}{other}.",
    )


def cell_text(value: Any) -> str:
    """The text of a cell of a Parquet file, stripped; empty for null and NaN."""
    if value is None or value != value:  # null or NaN
        return ""
    if isinstance(value, bytes):  # Spark writes text without saying that it is text
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, float) and value.is_integer():  # pandas writes integers with nulls as floats
        return str(int(value))
    return str(value).strip()


def _reachable(row: LabelledRow) -> bool:
    """False if the file is certainly missing. Single missing files are quarantined when they are read."""
    container = ImageRef.parse(row.uri).path
    return filesystem.is_remote(container) or filesystem.stat(container) is not None
