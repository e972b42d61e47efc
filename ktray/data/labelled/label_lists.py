"""Sets of classes in a CSV or Parquet list with the columns path,label[,split][,group].

A cell of ``label`` has any number of class names, separated by ``|`` or ``;``. An empty cell is the empty set. In
Parquet, ``label`` may also be a column of lists of names, whose names may contain these separators.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.rows import LabelledRow, nfc
from ktray.data.labelled.tables import cell_text, read_table
from ktray.data.sources.csv_lists import is_csv
from ktray.data.sources.parquets import is_parquet
from ktray.errors import KtrayError

_SEPARATORS = re.compile(r"[|;]")


def fits(path: str, file: FileStat | None) -> bool:
    return file is not None and (is_csv(path) or is_parquet(path))


def read(path: str, file: FileStat | None, notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    """The rows of a list. Their labels are those of `encode`.

    Raises:
        KtrayError: the list cannot be read or lacks a column, or its images do not exist.
    """
    assert file is not None  # see `fits`
    sets = None if is_csv(path) else _lists(path, asked.label or "label")
    if sets is not None:
        return read_table(file, notes, asked, labels=[encode(names) for names in sets])
    rows = read_table(file, notes, asked, unlabelled=True)
    return [replace(row, label=encode(split_names(row.label))) for row in rows]


def split_names(cell: str) -> list[str]:
    """The class names in a cell, each once and in order; none in an empty cell or in a lone separator."""
    names = (nfc(name.strip()) for name in _SEPARATORS.split(cell))
    return [name for name in dict.fromkeys(names) if name]


def encode(names: Iterable[str]) -> str:
    """A set of class names as the text of a row's label, which is the same for each order of the names."""
    stripped = {nfc(name.strip()) for name in names}
    return json.dumps(sorted(stripped - {""}), ensure_ascii=False)


def decode(label: str) -> list[str]:
    """The class names that `encode` has written, sorted."""
    names: list[str] = json.loads(label)
    return names


def _lists(path: str, label: str) -> list[list[str]] | None:
    """The names of each row, if the column ``label`` of a Parquet file has lists; None: it has something else."""
    try:
        with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
            columns = {field.name.lower(): field for field in reversed(list(file.schema_arrow))}
            field = columns.get(label.lower())
            if field is None or not (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)):
                return None
            if pa.types.is_nested(field.type.value_type):
                raise KtrayError(
                    f"Column '{field.name}' of '{path}' has the type {field.type}", "Write a list of class names."
                )
            values: list[Any] = file.read(columns=[field.name]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise KtrayError(
            f"List '{path}' is not a complete Parquet file: {filesystem.why(error)}", "Write the file again."
        ) from error
    return [[cell_text(name) for name in value or []] for value in values]
