"""List the shards of unlabelled images in folders, tars, Parquet files and CSV lists.

A shard is a small description of a group of images. Its source can read it on any machine that has access to the same
files. Listing reads directories, Parquet footers and CSV lists, but no images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.magic import HEAD_BYTES, decodable
from ktray.data.sources.base import ROWS, Cut, Shard, in_order
from ktray.data.sources.fetch import at_once
from ktray.data.sources.files import FILES
from ktray.data.sources.parquets import is_parquet
from ktray.data.sources.records import may_be_image
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES
from ktray.storage import concurrent


def kinds() -> str:
    """Description of all accepted files and lists, for messages."""
    *most, last = [source.accepts for _, source in in_order() if source.noun]
    return f"{', '.join(most)} or {last}"


class _Files:
    """Files by the name of their source and by path, so that a file that two entries match is read once."""

    def __init__(self) -> None:
        self.files: defaultdict[str, dict[str, FileStat]] = defaultdict(dict)
        self.sources = in_order()

    def add(self, file: FileStat, in_folder: bool = False) -> bool:
        """Add a file; returns whether a source can read it."""
        for name, source in self.sources:
            if source.fits(file.path) and (source.in_folders or not in_folder):
                self.files[name][file.path] = file
                return True
        return False

    def add_by_content(self, file: FileStat) -> bool:
        """Add a local file whose name does not say that it is an image, if its content does."""
        if filesystem.is_remote(file.path) or not may_be_image(file.path):
            return False
        try:
            head = filesystem.read_head(file.path, HEAD_BYTES)
        except OSError:
            return False
        if decodable(head):
            self.files[FILES][file.path] = file
            return True
        return False

    def leave_out_metadata(self) -> None:
        """Leave out tables that describe other files of the folder, as img2dataset writes them: ``00000.parquet``
        beside ``00000.tar`` or beside the folder ``00000``."""
        tables = [(name, path) for name, files in self.files.items() for path in files if is_parquet(path)]
        others = [path for files in self.files.values() for path in files if not is_parquet(path)]
        stems = {path.rpartition(".")[0] for path in others} | {path.rpartition("/")[0] for path in others}
        described = [(name, path) for name, path in tables if path.rpartition(".")[0] in stems]
        if len(described) < len(tables):
            return
        for name, path in described:
            del self.files[name][path]
            if not self.files[name]:
                del self.files[name]

    def merge(self, other: _Files) -> None:
        for name, files in other.files.items():
            self.files[name].update(files)


def list_shards(spec: str | Sequence[str], *, rows_per_shard: int = ROWS, column: str = "auto") -> list[Shard]:
    """List the shards of unlabelled images.

    Args:
        spec: one or several local paths or ``s3://``. Each is a folder (searched at any depth for images, tar shards or
            Parquet files; linked folders are not entered), a file of one of these types, a CSV list with a path
            column, or a pattern with ``*``, ``?``, ``[...]``, ``**``.
        rows_per_shard: approximate number of images per shard (see `spans`). Each tar is one shard.
        column: column of Parquet and CSV files with image bytes or paths; ``auto`` detects it.

    Returns:
        The shards, in an order that depends only on the files: single images (sorted by path), CSV lists, tars, Parquet
        files, and then the sources of other packages.

    Raises:
        KtrayError: a path does not exist or cannot be read, there are no images, there is no such column, or a folder
            has files of several types.
    """
    files = _Files()
    entries = [spec] if isinstance(spec, str) else list(spec)
    if not entries:
        raise KtrayError("The list of image sources is empty", f"Set it to {kinds()}.")
    for entry in concurrent.in_order((partial(_entry, entry) for entry in entries), at_once(entries)):
        files.merge(entry)
    cut = Cut(rows_per_shard, column)
    return [
        shard
        for name, source in in_order()
        if files.files[name]
        for shard in source.shards([file for _, file in sorted(files.files[name].items())], cut)
    ]


def _entry(entry: str) -> _Files:
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
    raise KtrayError(f"'{path}' does not exist", filesystem.missing(path))


def _file(file: FileStat) -> _Files:
    files = _Files()
    if not files.add(file):
        raise KtrayError(f"'{file.path}' has an unsupported file type", f"Use {kinds()}.")
    return files


def _pattern(pattern: str) -> _Files:
    files = _Files()
    matches = filesystem.expand_files(pattern)
    for path, file in matches:
        if file:
            files.add(file)
        elif filesystem.is_folder(path):
            files.merge(_folder(path))
    if not files.files:
        matched = f"; it matches only {_summary([path for path, _ in matches])}" if matches else ""
        raise KtrayError(f"No images match '{pattern}'{matched}", f"A pattern must match {kinds()}.")
    return files


def _folder(path: str) -> _Files:
    files, unsupported, unread = _Files(), [], []
    for file in filesystem.walk(path):
        if file.size < 0:
            unread.append(file)
        elif not files.add(file, in_folder=True) and not files.add_by_content(file):
            unsupported.append(file.path)
    files.leave_out_metadata()
    if not files.files:
        content = f"it contains {_summary(unsupported)}" if unsupported else "it is empty"
        linked = f", and {len(unread)} linked or unreadable folders that are not entered" if unread else ""
        raise KtrayError(
            f"Folder '{path}' has no images: {content}{linked}", f"Use a folder or pattern with {kinds()}."
        )
    if len(files.files) > 1:
        contents = [(source, len(files.files[name])) for name, source in in_order() if name in files.files]
        patterns = " or ".join(f"'{path}/**/{source.pattern}'" for source, _ in contents)
        raise KtrayError(
            f"Folder '{path}' contains {' and '.join(f'{count} {source.noun}' for source, count in contents)}",
            f"Select one type with a pattern: {patterns}.",
        )
    files.files[FILES].update({file.path: file for file in unread})  # so that reading reports them
    return files


def _summary(paths: Sequence[str]) -> str:
    names = [path.rpartition("/")[2] for path in paths]
    ends = Counter("." + name.rpartition(".")[2] if "." in name else name for name in names)
    return ", ".join(f"{n} x {end}" for end, n in sorted(ends.most_common(5), key=lambda e: (-e[1], e[0])))


def folder_shards(
    folder: str, images: str | Sequence[str] | None, embedded: bool = False, column: str = "auto"
) -> list[Shard] | None:
    """The shards of a folder that a source reads as a whole, such as output of clip-retrieval; None for other paths.

    Args:
        folder: path of the folder.
        images: ``gallery.images``.
        embedded: use only sources with embeddings.
        column: see `list_shards`.
    """
    folder = filesystem.normalise(folder)
    if not filesystem.is_folder(folder):
        return None
    for _, source in SOURCES:
        if (source.has_embeddings or not embedded) and source.fits_folder(folder):
            shards: list[Shard] = source.folder_shards(folder, images, Cut(column=column))
            return shards
    return None
