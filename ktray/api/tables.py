"""Images in memory as Parquet files in the store: pairs, lists of files, and tables of other libraries.

=============================================  ===============================================================
pairs (image, label), triples with a split     labelled images
list of image files                            unlabelled images
pandas ``DataFrame``, pyarrow ``Table``        both; one row for each image
Ray ``Dataset``                                both; each of its blocks becomes a file
``datasets.Dataset``, ``DatasetDict``          both (Hugging Face); names of classes and splits are kept
=============================================  ===============================================================

A table has a column ``path`` or ``image`` (or another name that galleries know); labelled images also need ``label``
and may have ``split`` and ``group``; unlabelled ones may have ``caption``. An image is a path, encoded bytes, ``{bytes,
path}``, a PIL image, or an (H, W, 3) uint8 array.

The name of a file is the hash of its content, so that a repeated call with the same images finds the same stages.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ktray.data import filesystem
from ktray.data.sources.fetch import fetch
from ktray.data.sources.parquet_tables import CAPTION_NAMES, holds_text, image_column
from ktray.data.sources.records import is_image
from ktray.data.sources.uris import ImageRef
from ktray.errors import KtrayError
from ktray.storage.store import Dir

FOLDER = "tables"  # in the store
_ROWS = 256  # of a row group; readers hold one in memory
_FORMS = (
    "Use a folder or list, pairs (path, label), or a pandas, pyarrow, Ray or Hugging Face table with the columns path "
    "or image, and label."
)


def labelled(value: Any, store: str) -> str:
    """Write labelled images as one Parquet list; returns its address.

    Raises:
        KtrayError: the value is in none of the forms, or a file cannot be read.
    """
    parts = [_columns(part, ("label", "split", "group"), store) for part in _tables(value) if part.num_rows]
    if not parts:
        raise KtrayError("The labelled images in memory are empty", _FORMS)
    missing = [part for part in parts if "label" not in part.column_names]
    if missing:
        raise KtrayError(
            f"The table of labelled images has no column 'label', only {', '.join(missing[0].column_names)}",
            "Rename the column with the names of the classes to label.",
        )
    return _write(pa.concat_tables(parts, promote_options="default"), store)


def unlabelled(value: Any, store: str) -> list[str]:
    """Write unlabelled images as Parquet files; returns their addresses. Addresses of folders and of lists, and single
    image files among them, are returned as they are.

    Raises:
        KtrayError: see `labelled`.
    """
    if isinstance(value, Sequence) and value and all(isinstance(item, str | os.PathLike) for item in value):
        paths = [os.fspath(item) for item in value]
        if not all(_is_one(path) for path in paths):
            return paths
    written = {_write(_columns(part, CAPTION_NAMES, store), store) for part in _tables(value) if part.num_rows}
    if not written:
        raise KtrayError("The unlabelled images in memory are empty", _FORMS)
    return sorted(written)


def _is_one(path: str) -> bool:
    """Whether the address is that of one image: of a file, or of a part of one, as predictions have."""
    return bool(ImageRef.parse(path).fragment) or (is_image(path) and not filesystem.has_glob(path))


def _tables(value: Any) -> Iterator[pa.Table]:
    """The value as tables: one, or one for each block or split."""
    module = type(value).__module__.partition(".")[0]
    if isinstance(value, pa.Table):
        yield value
    elif isinstance(value, pa.RecordBatch):
        yield pa.Table.from_batches([value])
    elif module == "pandas" and hasattr(value, "columns"):
        yield _from_columns({str(name): value[name].tolist() for name in value.columns})
    elif module == "ray" and hasattr(value, "iter_batches"):
        yield from value.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    elif module == "datasets":
        yield from _from_hugging_face(value)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield _from_rows(value)
    else:
        raise KtrayError(f"Images cannot be read from a {type(value).__qualname__}", _FORMS)


def _from_rows(rows: Sequence[Any]) -> pa.Table:
    """Pairs, triples, or images alone."""
    if any(isinstance(row, tuple) for row in rows):
        widths = {len(row) if isinstance(row, tuple) else 1 for row in rows}
        if widths not in ({2}, {3}):
            raise KtrayError(
                "The list of labelled images does not have one form: its rows have "
                f"{' and '.join(str(width) for width in sorted(widths))} entries",
                "Use pairs (path, label) or triples (path, label, split).",
            )
        names = ("path", "label", "split")[: widths.pop()]
        return _from_columns({name: [row[i] for row in rows] for i, name in enumerate(names)})
    return _from_columns({"path": list(rows)})


def _from_columns(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        first = next((value for value in values if value is not None), None)
        if isinstance(first, Image.Image | np.ndarray | os.PathLike):
            values = [_plain(value) for value in values]
            first = next(value for value in values if value is not None)
        # A column of bytes that is named path would be taken for paths.
        known = "image" if name == "path" and isinstance(first, bytes) else name
        try:
            arrays[known] = pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError):
            continue  # a column of other objects, which has no images and no labels
    return pa.table(arrays)


def _from_hugging_face(value: Any) -> Iterator[pa.Table]:
    """The splits of a ``DatasetDict``, or one ``Dataset``, with the names of its classes."""
    for split, part in value.items() if isinstance(value, Mapping) else ((None, value),):
        if not hasattr(part, "__len__"):
            raise KtrayError(
                "A streamed Hugging Face dataset is not in memory", "Load it without streaming=True, or name its files."
            )
        found: pa.Table = part.with_format("arrow")[:]
        names = getattr(part.features.get("label"), "names", None)
        if names:
            numbers = found.column("label").to_pylist()
            label = pa.array([None if number is None or number < 0 else names[number] for number in numbers])
            found = found.set_column(found.column_names.index("label"), "label", label)
        if split is not None and "split" not in found.column_names:
            found = found.append_column("split", pa.array([str(split)] * found.num_rows))
        yield found


def _columns(table: pa.Table, wanted: Iterable[str], store: str) -> pa.Table:
    """Only the columns that ktray reads: the images as ``path`` (absolute) or ``image``, and those in ``wanted``."""
    table = _with_encoded(table.replace_schema_metadata(None))
    lower = {name.lower(): name for name in reversed(table.column_names)}
    try:
        name = image_column(table.schema)
    except KtrayError as error:
        raise KtrayError(
            "The table has no column that is recognised as the images; its columns are "
            f"{', '.join(table.column_names)}",
            "Rename the column to path or image.",
        ) from error
    images = table.column(name)
    columns: dict[str, Any] = {}
    if holds_text(images.type):
        paths = [None if path is None else filesystem.normalise(path) for path in images.to_pylist()]
        # A list on a remote store cannot name local files.
        if filesystem.is_remote(store) and not all(path is None or filesystem.is_remote(path) for path in paths):
            columns["image"] = pa.array(_read(paths), pa.binary())
        else:
            columns["path"] = pa.array(paths, pa.string())
    else:
        columns["image"] = images
    for own in wanted:
        if own in lower and lower[own] != name:
            column = table.column(lower[own])
            columns[own] = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    return pa.table(columns)


def _with_encoded(table: pa.Table) -> pa.Table:
    """The table with columns of arrays (Ray's tensors) as encoded images."""
    for number, field in enumerate(table.schema):
        if isinstance(field.type, pa.ExtensionType) and "tensor" in field.type.extension_name:
            arrays = [array for chunk in table.column(number).chunks for array in chunk.to_numpy(zero_copy_only=False)]
            encoded = pa.array([_plain(np.asarray(array)) for array in arrays], pa.binary())
            table = table.set_column(number, field.name, encoded)
    return table


def _plain(value: Any) -> Any:
    """An image as encoded bytes, a path as text; everything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise KtrayError(
                f"An array of type {value.dtype} and shape {value.shape} is not an image",
                "Use arrays of uint8 with the shape (height, width, 3).",
            )
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, "PNG", compress_level=1)
        return stream.getvalue()
    return value


def _read(paths: Sequence[str | None]) -> list[bytes | None]:
    """The content of files; a file that cannot be read has none, and is quarantined later."""
    return [data for _, data, _ in fetch([path or "" for path in paths])]


def _write(table: pa.Table, store: str) -> str:
    """Write a table into the store, unless it is there; returns its address."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, row_group_size=_ROWS, compression="zstd", compression_level=1)
    data = stream.getvalue().to_pybytes()
    folder, name = Dir(store).sub(FOLDER), f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
    # A file that is there keeps its modification time, which is part of the keys of stages.
    if not folder.exists(name):
        folder.write(name, data)
    return folder.file(name)
