"""Unlabelled images: what the user names (a folder, tars, Parquet, a list, any mix) becomes shards.

A shard is a small description of some images; `ktray.data.sources.fetch` reads it, on any machine that sees the same
files. Listing reads directories, Parquet footers and CSV lists, never an image.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.parquets import PATH_NAMES, caption_column, image_column, read_footer
from ktray.data.sources.records import is_csv, is_image, is_parquet, is_tar
from ktray.errors import KtrayError

ROWS = 1024
KINDS = "images, .tar/.tar.gz/.tgz shards, .parquet files or a .csv list with a path column"


@dataclass(frozen=True)
class Shard:
    """Some images that are read together. Picklable.

    Attributes:
        kind: ``files`` (``paths`` are images), ``tar`` or ``parquet`` (``paths[0]`` is the file), or ``embedded``
            (see `ktray.data.sources.clip_retrieval`).
        fingerprint: hash of paths, sizes and modification times (not of contents). For images from a CSV list
            it covers the list's rows, not the images.
        count: images in it; None where only reading tells (tars, a Parquet file whose footer is broken).
        start: first row of a Parquet file or of embeddings.
        column: the Parquet file's image column.
        named: the user named the column, so that uris must carry it.
        caption: the Parquet file's caption column.
        captions: one for each of ``paths`` (CSV lists), or empty.
    """

    kind: Literal["files", "tar", "parquet", "embedded"]
    paths: tuple[str, ...]
    fingerprint: str
    count: int | None
    start: int = 0
    column: str | None = None
    named: bool = False
    caption: str | None = None
    captions: tuple[str | None, ...] = ()


@dataclass
class _Found:
    """Files by kind. Keyed by path, so that what two entries name is read once."""

    images: dict[str, FileStat] = field(default_factory=dict)
    tars: dict[str, FileStat] = field(default_factory=dict)
    parquets: dict[str, FileStat] = field(default_factory=dict)
    lists: dict[str, FileStat] = field(default_factory=dict)

    def add(self, file: FileStat) -> bool:
        for fits, kind in (
            (is_image, self.images),
            (is_tar, self.tars),
            (is_parquet, self.parquets),
            (is_csv, self.lists),
        ):
            if fits(file.path):
                kind[file.path] = file
                return True
        return False

    def merge(self, other: _Found) -> None:
        for mine, theirs in zip(self.kinds(), other.kinds(), strict=True):
            mine.update(theirs)

    def kinds(self) -> tuple[dict[str, FileStat], ...]:
        return self.images, self.tars, self.parquets, self.lists


def list_shards(spec: str | Sequence[str], *, rows_per_shard: int = ROWS, column: str = "auto") -> list[Shard]:
    """The shards of a source of unlabelled images.

    Args:
        spec: one or several of: a folder (searched at any depth for images, or for tar shards, or for Parquet
            files; linked folders are not entered), a file of one of these kinds, a CSV list with a path column,
            a pattern with ``*``, ``?``, ``[...]``, ``**``. Local or ``s3://``.
        rows_per_shard: images in a shard, about (see `spans`). A tar is a shard.
        column: column of Parquet and CSV files with image bytes or paths; ``auto`` finds it.

    Returns:
        The same shards in the same order for the same files: loose images (sorted by path), CSV lists, tars,
        Parquet files.

    Raises:
        KtrayError: nothing there, no permission, no images, no such column, or a folder that mixes kinds.
    """
    found = _Found()
    entries = [spec] if isinstance(spec, str) else list(spec)
    if not entries:
        raise KtrayError("The list of image sources is empty", f"Name {KINDS}.")
    for entry in entries:
        found.merge(_entry(entry))
    shards = _file_shards(sorted(found.images.values(), key=lambda f: f.path), rows_per_shard)
    for _, file in sorted(found.lists.items()):
        shards += _list_shards(file, rows_per_shard, column)
    for _, file in sorted(found.tars.items()):
        shards.append(Shard("tar", (file.path,), fingerprint([file]), None))
    with ThreadPoolExecutor(16) as pool:  # footers on S3 are a round trip each
        files = sorted(found.parquets.values(), key=lambda f: f.path)
        for part in pool.map(lambda file: _parquet_shards(file, rows_per_shard, column), files):
            shards += part
    return shards


def fingerprint(files: Iterable[FileStat], *more: object) -> str:
    """32 hex digits over paths, sizes and modification times, and anything else by its repr."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(more).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _entry(entry: str) -> _Found:
    path = filesystem.normalise(entry)
    try:
        file, folder = filesystem.stat(path), filesystem.is_folder(path)
        if folder:
            return _folder(path)
        if file:
            return _file(file)
        if filesystem.has_glob(path):
            return _pattern(path)
    except OSError as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    raise KtrayError(f"'{path}' does not exist", _nearby(path))


def _file(file: FileStat) -> _Found:
    found = _Found()
    if not found.add(file):
        raise KtrayError(f"'{file.path}' is of a kind that is not read", f"Name {KINDS}.")
    return found


def _pattern(pattern: str) -> _Found:
    found = _Found()
    matches = filesystem.expand(pattern)
    for path in matches:
        if filesystem.is_folder(path):
            found.merge(_folder(path))
        elif file := filesystem.stat(path):
            found.add(file)
    if not any(found.kinds()):
        saw = f"; it matches {_saw(matches)}" if matches else ""
        raise KtrayError(f"No images match '{pattern}'{saw}", f"A pattern must match {KINDS}.")
    return found


def _folder(path: str) -> _Found:
    found, others, unread = _Found(), [], []
    for file in filesystem.walk(path):
        if file.size < 0:
            unread.append(file)
        elif is_csv(file.path) or not found.add(file):
            others.append(file.path)
    holds = [(found.images, "image files"), (found.tars, "tar shards"), (found.parquets, "Parquet files")]
    kinds = [f"{len(files)} {name}" for files, name in holds if files]
    if not kinds:
        saw = f"it holds {_saw(others)}" if others else "it is empty"
        linked = f", and {len(unread)} linked or closed folders that are not entered" if unread else ""
        raise KtrayError(f"Folder '{path}' has no images: {saw}{linked}", f"Name a folder or pattern with {KINDS}.")
    if len(kinds) > 1:
        raise KtrayError(
            f"Folder '{path}' holds {' and '.join(kinds)}",
            f"Say which are meant by a pattern: '{path}/**/*.tar', '{path}/**/*.parquet' or '{path}/**/*.jpg'.",
        )
    found.images.update({file.path: file for file in unread})  # so that reading reports them
    return found


def _saw(paths: Sequence[str]) -> str:
    names = [path.rpartition("/")[2] for path in paths]
    ends = Counter("." + name.rpartition(".")[2] if "." in name else name for name in names)
    return ", ".join(f"{n} x {end}" for end, n in sorted(ends.most_common(5), key=lambda e: (-e[1], e[0])))


def _nearby(path: str) -> str:
    """The nearest name in the folder above, as a remedy."""
    parent, _, name = path.rpartition("/")
    if filesystem.is_remote(path):
        return "Check bucket, key and credentials."
    if not filesystem.is_folder(parent or "/"):
        return "Check the path (a relative one starts at the current folder)."
    folders, files = filesystem.children(parent or "/")
    near = difflib.get_close_matches(name, [*folders, *files], n=1)
    return f"Did you mean '{parent}/{near[0]}'?" if near else f"Folder '{parent or '/'}' exists: check the last part."


def _file_shards(files: Sequence[FileStat], rows: int) -> list[Shard]:
    parts = (files[first:last] for first, last in spans([f.path for f in files], rows))
    return [Shard("files", tuple(f.path for f in part), fingerprint(part), len(part)) for part in parts]


def path_shards(paths: Sequence[str], captions: Sequence[str | None] = (), rows: int = ROWS) -> list[Shard]:
    """Shards of single images by path or uri, in the order given. Their fingerprints cover the paths and captions."""
    return [
        Shard(
            "files",
            part := tuple(paths[first:last]),
            fingerprint([], part, beside := tuple(captions[first:last])),
            len(part),
            captions=beside,
        )
        for first, last in spans(paths, rows)
    ]


def spans(keys: Sequence[str], rows: int) -> list[tuple[int, int]]:
    """(first, last + 1) of groups of half to twice ``rows`` keys, cut where a key's hash says so.

    So a key that comes or goes changes its own group and perhaps a neighbour, and an index of the others still holds;
    groups of equal size would all be others from there on.
    """
    out, first = [], 0
    least = max(1, rows // 2)
    for at, key in enumerate(keys, 1):
        size = at - first
        cut = zlib.crc32(key.encode("utf-8", "surrogateescape")) % least == 0
        if size >= 2 * rows or (size >= least and cut) or at == len(keys):
            out.append((first, at))
            first = at
    return out


def _list_shards(file: FileStat, rows: int, column: str) -> list[Shard]:
    table = read_csv(file.path)
    names = list(table[0]) if table else []
    schema = pa.schema([(name, pa.string()) for name in names])
    if not table:
        raise KtrayError(f"List '{file.path}' has no rows", "Its first line names the columns, path among them.")
    if column == "auto" and not {n.lower() for n in names} & set(PATH_NAMES):
        raise KtrayError(
            f"List '{file.path}' has no path column, only {', '.join(names)}",
            "Name the column 'path', or say which it is with gallery.column.",
        )
    paths_in = image_column(schema, column, file.path)
    captions_in = caption_column(schema)
    paths = [resolve(row[paths_in], file.path) for row in table]
    captions = [row[captions_in] or None for row in table] if captions_in else []
    return path_shards(paths, captions, rows)


def _parquet_shards(file: FileStat, rows: int, column: str) -> list[Shard]:
    try:
        footer = read_footer(file.path)
    except (OSError, pa.ArrowException):
        return [Shard("parquet", (file.path,), fingerprint([file]), None)]  # reading it reports it
    images, captions = image_column(footer.schema, column, file.path), caption_column(footer.schema)
    return [
        Shard(
            "parquet",
            (file.path,),
            fingerprint([file], start, count, images),
            count,
            start,
            images,
            named=column != "auto",
            caption=captions if captions != images else None,
        )
        for start, count in _ranges(footer.group_rows, rows)
    ]


def _ranges(group_rows: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(first, count) of about ``rows`` each: whole row groups where they are small, parts of large ones."""
    out: list[tuple[int, int]] = []
    first = count = 0
    for group in group_rows:
        if count and count + group > rows:
            out.append((first, count))
            first, count = first + count, 0
        count += group
        while count > rows:
            out.append((first, rows))
            first, count = first + rows, count - rows
    return [*out, (first, count)] if count else out


def read_csv(path: str) -> list[dict[str, str]]:
    """Rows of a CSV list with a header, cells stripped, missing cells empty.

    Raises:
        KtrayError: unreadable, not UTF-8, or rows longer than the header.
    """
    try:
        text = filesystem.read_bytes(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows = list(reader)
    except OSError as error:
        raise KtrayError(f"List '{path}' cannot be read: {filesystem.why(error)}", "Check the path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise KtrayError(f"List '{path}' is not CSV in UTF-8: {error}", "Save it as comma-separated UTF-8.") from error
    for number, row in enumerate(rows, 2):
        if None in row:
            raise KtrayError(
                f"List '{path}' has more cells than columns in line {number}", 'Put "..." around cells with commas.'
            )
    return [{(k or "").strip(): (v or "").strip() for k, v in row.items()} for row in rows]


def resolve(path: str, listed_in: str) -> str:
    """A path from a list: absolute, a uri, or relative to the list's folder."""
    if not path:
        return path
    if filesystem.is_remote(path):
        return filesystem.normalise(path)
    folder = listed_in.rpartition("/")[0]
    if filesystem.is_remote(listed_in):  # a list from elsewhere names no files of this machine, file:// or not
        return f"{folder}/{path}"
    return filesystem.normalise(path if path.startswith(("/", "~", "file://")) else f"{folder}/{path}")
