"""A transfer set of one's own: a list of images, as paths or uris, or as the names of gallery images.

CSV and Parquet lists have a path column (as galleries have). A text list has an image a line: a path or uri, or, with a
gallery of loose files, a file's name with or without its suffix, as in the lists that accompany the paper (YFCC15M
images retrieved for ADE20K).
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from ktray.data import filesystem
from ktray.data.sources.clip_retrieval import embedded_shards, is_embedded
from ktray.data.sources.listing import Shard, list_shards, path_shards, resolve
from ktray.data.sources.records import is_csv, is_parquet
from ktray.errors import KtrayError

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
    others = [entry for entry in entries if not is_embedded(entry)]
    embedded = embedded_only(data, images)
    return [*(list_shards(others, column=column) if others or not embedded else []), *embedded]


def embedded_only(data: str | Sequence[str], images: str | Sequence[str] | None) -> list[Shard]:
    """Of ``gallery_shards`` those of folders with embeddings."""
    entries = [data] if isinstance(data, str) else data
    return [shard for entry in entries if is_embedded(entry) for shard in embedded_shards(entry, images)]


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
    if is_csv(path) or is_parquet(path):
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
    if any(shard.kind != "files" for shard in shards):
        raise KtrayError(
            f"The images of '{path}' are named, and the gallery has tar or Parquet files",
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
