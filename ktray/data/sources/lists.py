"""A transfer set of one's own: a list of images, as paths or uris, or as the names of gallery images.

CSV and Parquet lists have a path column (as galleries have). A text list has an image a line: a path or uri, or, with a
gallery of loose files, a file's name with or without its suffix, as in the lists that accompany the paper (YFCC15M
images retrieved for ADE20K).
"""

from __future__ import annotations

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
    """Where a transfer set may come from: ``gallery.data``, or the images of ``transfer.list``; none without either.

    Args:
        images: ``gallery.images``, where the images of embedded folders lie.
    """
    if listed is not None:
        return listed_shards(listed, data, column)
    if data is None:
        return []
    entries = [data] if isinstance(data, str) else list(data)
    whole = {entry: found for entry in entries if (found := folder_shards(entry, images)) is not None}
    others = [entry for entry in entries if entry not in whole]
    shards = list_shards(others, column=column) if others or not whole else []
    return [*shards, *(shard for entry in entries if entry in whole for shard in whole[entry])]


def embedded_only(data: str | Sequence[str], images: str | Sequence[str] | None) -> list[Shard]:
    """Of ``gallery_shards`` those of folders with embeddings."""
    entries = [data] if isinstance(data, str) else data
    return [shard for entry in entries for shard in folder_shards(entry, images, embedded=True) or []]


def listed_shards(path: str, gallery: str | Sequence[str] | None, column: str = "auto") -> list[Shard]:
    """The images of a list.

    Args:
        path: the list.
        gallery: where named images lie; None where the list holds paths (relative ones start at the list's folder).
        column: column of a CSV or Parquet list.

    Raises:
        KtrayError: it cannot be read, is empty, repeats an image, or names images that the gallery has not or has
            several times.
    """
    path = filesystem.normalise(path)
    if any(source.lists_images and source.fits(path) for _, source in SOURCES):
        return list_shards(path, column=column)
    try:
        text = filesystem.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KtrayError(f"List '{path}' cannot be read: {filesystem.why(error)}", "Check the path.") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise KtrayError(f"List '{path}' is empty", "It names an image a line.")
    if len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(names) < 10_000 else []
        shown = f", {', '.join(twice[:_SHOWN])} among them" if twice else ""
        raise KtrayError(f"List '{path}' repeats {len(names) - len(set(names))} images{shown}", "Name each once.")
    if gallery is None:
        return path_shards([resolve(name, path) for name in names])
    return path_shards(_found(names, path, gallery))


def _found(names: list[str], path: str, gallery: str | Sequence[str]) -> list[str]:
    shards = list_shards(gallery)
    if not all(shard.source.loose for shard in shards):
        raise KtrayError(
            f"The images of '{path}' are named, and the gallery is not made of image files alone",
            "Names are looked up among loose files: unpack them, or list uris (X.tar#member=...).",
        )
    known: dict[str, str | None] = {}
    for shard in shards:
        for file in shard.paths:
            base = posixpath.basename(file)
            for name in {file, base, posixpath.splitext(base)[0]}:
                known[name] = None if name in known else file
    # A full path or a uri needs no looking up.
    known |= {name: name for name in names if name.startswith("/") or filesystem.is_remote(name)}
    missing = [name for name in names if name not in known]
    if missing:
        raise KtrayError(
            f"{len(missing):,} of the {len(names):,} images of '{path}' are not in the gallery: "
            f"{', '.join(missing[:_SHOWN])}",
            "Point gallery.data at the folder that holds them.",
        )
    several = [name for name in names if known[name] is None]
    if several:
        raise KtrayError(
            f"{len(several):,} names of '{path}' stand for several gallery images: {', '.join(several[:_SHOWN])}",
            "List their paths.",
        )
    return [str(known[name]) for name in names]
