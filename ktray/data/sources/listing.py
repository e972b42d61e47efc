"""Unlabelled images: what the user names (a folder, tars, Parquet, a list, any mix) becomes shards.

A shard is a small description of some images; its source reads it, on any machine that sees the same files. Listing
reads directories, Parquet footers and CSV lists, never an image.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Sequence

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import ROWS, Cut, Shard, in_order
from ktray.data.sources.files import FILES
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES


def kinds() -> str:
    """What may be named, for messages."""
    *most, last = [source.accepts for _, source in in_order() if source.noun]
    return f"{', '.join(most)} or {last}"


class _Found:
    """Files by the name of their source. Keyed by path, so that what two entries name is read once."""

    def __init__(self) -> None:
        self.files: defaultdict[str, dict[str, FileStat]] = defaultdict(dict)
        self.sources = in_order()

    def add(self, file: FileStat, in_folder: bool = False) -> bool:
        """Whether some source reads the file."""
        for name, source in self.sources:
            if source.fits(file.path) and (source.in_folders or not in_folder):
                self.files[name][file.path] = file
                return True
        return False

    def merge(self, other: _Found) -> None:
        for name, files in other.files.items():
            self.files[name].update(files)


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
        Parquet files, then what other packages read.

    Raises:
        KtrayError: nothing there, no permission, no images, no such column, or a folder that mixes kinds.
    """
    found = _Found()
    entries = [spec] if isinstance(spec, str) else list(spec)
    if not entries:
        raise KtrayError("The list of image sources is empty", f"Name {kinds()}.")
    for entry in entries:
        found.merge(_entry(entry))
    cut = Cut(rows_per_shard, column)
    return [
        shard
        for name, source in in_order()
        if found.files[name]
        for shard in source.shards([file for _, file in sorted(found.files[name].items())], cut)
    ]


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
        raise KtrayError(f"'{file.path}' is of a kind that is not read", f"Name {kinds()}.")
    return found


def _pattern(pattern: str) -> _Found:
    found = _Found()
    matches = filesystem.expand(pattern)
    for path in matches:
        if filesystem.is_folder(path):
            found.merge(_folder(path))
        elif file := filesystem.stat(path):
            found.add(file)
    if not found.files:
        saw = f"; it matches {_saw(matches)}" if matches else ""
        raise KtrayError(f"No images match '{pattern}'{saw}", f"A pattern must match {kinds()}.")
    return found


def _folder(path: str) -> _Found:
    found, others, unread = _Found(), [], []
    for file in filesystem.walk(path):
        if file.size < 0:
            unread.append(file)
        elif not found.add(file, in_folder=True):
            others.append(file.path)
    if not found.files:
        saw = f"it holds {_saw(others)}" if others else "it is empty"
        linked = f", and {len(unread)} linked or closed folders that are not entered" if unread else ""
        raise KtrayError(f"Folder '{path}' has no images: {saw}{linked}", f"Name a folder or pattern with {kinds()}.")
    if len(found.files) > 1:
        held = [(source, len(found.files[name])) for name, source in in_order() if name in found.files]
        patterns = " or ".join(f"'{path}/**/{source.pattern}'" for source, _ in held)
        raise KtrayError(
            f"Folder '{path}' holds {' and '.join(f'{count} {source.noun}' for source, count in held)}",
            f"Say which are meant by a pattern: {patterns}.",
        )
    found.files[FILES].update({file.path: file for file in unread})  # so that reading reports them
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


def folder_shards(folder: str, images: str | Sequence[str] | None, embedded: bool = False) -> list[Shard] | None:
    """The shards of a folder that is as a whole of one kind, such as clip-retrieval's output; None for all else.

    Args:
        images: ``gallery.images``.
        embedded: only of sources with embeddings.
    """
    folder = filesystem.normalise(folder)
    if not filesystem.is_folder(folder):
        return None
    for _, source in SOURCES:
        if (source.has_embeddings or not embedded) and source.fits_folder(folder):
            found: list[Shard] = source.folder_shards(folder, images)
            return found
    return None
