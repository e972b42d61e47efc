"""Transfer sets from lists of images: paths, uris, or names of gallery images.

CSV and Parquet lists have a path column, as in galleries. A text list has one image per line: a path or uri or, if the
gallery consists of image files, a file name with or without suffix, as in the lists that were published with the paper
(YFCC15M images retrieved for ADE20K).
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence

from ktray.data import filesystem
from ktray.data.sources.base import Shard
from ktray.data.sources.files import path_shards
from ktray.data.sources.listing import folder_shards, list_shards
from ktray.data.sources.uris import resolve
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

_SHOWN = 3


def gallery_shards(
    data: str | Sequence[str] | None, column: str, listed: str | None, images: str | Sequence[str] | None = None
) -> list[Shard]:
    """The shards from which a transfer set is chosen.

    Args:
        data: ``gallery.data``.
        column: ``gallery.column``.
        listed: ``transfer.list``. If it is set, the result is the images of this list.
        images: ``gallery.images``, the places of the images of embedded folders.

    Returns:
        The shards; none if neither ``data`` nor ``listed`` is set.
    """
    if listed is not None:
        return listed_shards(listed, data, column)
    if data is None:
        return []
    entries = [data] if isinstance(data, str) else list(data)
    whole_folders = {
        entry: shards_of_folder
        for entry in entries
        if (shards_of_folder := folder_shards(entry, images, column=column)) is not None
    }
    remaining = [entry for entry in entries if entry not in whole_folders]
    shards = list_shards(remaining, column=column) if remaining or not whole_folders else []
    return [*shards, *(shard for entry in entries if entry in whole_folders for shard in whole_folders[entry])]


def embedded_only(data: str | Sequence[str], images: str | Sequence[str] | None, column: str = "auto") -> list[Shard]:
    """The shards of `gallery_shards` that are from folders with embeddings."""
    entries = [data] if isinstance(data, str) else data
    found = (shard for entry in entries for shard in folder_shards(entry, images, embedded=True, column=column) or [])
    return [shard for shard in found if shard.source.has_embeddings]


def listed_shards(path: str, gallery: str | Sequence[str] | None, column: str = "auto") -> list[Shard]:
    """The images of a list.

    Args:
        path: the list.
        gallery: the gallery with the named images; None if the list contains paths (relative paths start at the folder
            of the list).
        column: column of a CSV or Parquet list.

    Raises:
        KtrayError: the list cannot be read, is empty or repeats an image, or a name matches no gallery image or several
            of them.
    """
    path = filesystem.normalise(path)
    if any(source.lists_images and source.fits(path) for _, source in SOURCES):
        return list_shards(path, column=column)
    try:
        with io.TextIOWrapper(filesystem.open_stream(path), encoding="utf-8-sig") as lines:
            names = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise KtrayError(f"List '{path}' cannot be read: {filesystem.why(error)}", "Check the path.") from error
    if not names:
        raise KtrayError(f"List '{path}' is empty", "Write one image per line.")
    if len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(names) < 10_000 else []
        shown = f", for example {', '.join(twice[:_SHOWN])}" if twice else ""
        raise KtrayError(f"List '{path}' repeats {len(names) - len(set(names))} images{shown}", "List each image once.")
    if gallery is None:
        return path_shards([resolve(name, path) for name in names])
    return path_shards(_look_up(names, path, gallery))


def _look_up(names: list[str], path: str, gallery: str | Sequence[str]) -> list[str]:
    shards = list_shards(gallery)
    if not all(shard.source.loose for shard in shards):
        raise KtrayError(
            f"List '{path}' contains names of images, but the gallery does not consist of image files only",
            "Names can only refer to image files. Unpack the gallery, or list uris (X.tar#member=...).",
        )
    path_of: dict[str, str | None] = {}
    for shard in shards:
        for file in shard.paths:
            base = posixpath.basename(file)
            for name in {file, base, posixpath.splitext(base)[0]}:
                path_of[name] = None if name in path_of else file
    # Absolute paths and uris need no lookup.
    path_of |= {name: name for name in names if name.startswith("/") or filesystem.is_remote(name)}
    missing = [name for name in names if name not in path_of]
    if missing:
        raise KtrayError(
            f"{len(missing):,} of the {len(names):,} images of '{path}' are not in the gallery: "
            f"{', '.join(missing[:_SHOWN])}",
            "Set gallery.data to the folder with these images.",
        )
    ambiguous = [name for name in names if path_of[name] is None]
    if ambiguous:
        raise KtrayError(
            f"{len(ambiguous):,} names of '{path}' match several gallery images: {', '.join(ambiguous[:_SHOWN])}",
            "List the paths of these images.",
        )
    return [str(path_of[name]) for name in names]
