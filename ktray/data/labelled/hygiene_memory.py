"""The copies among labelled images, kept in the store, so that not each start of a job decodes all images again."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
from collections.abc import Iterator, Sequence

from ktray.storage.store import Dir

Files = Sequence[tuple[str, str]]  # uri and version (size and modification time) of each image
Pairs = list[tuple[str, str]]

_place: contextvars.ContextVar[Dir | None] = contextvars.ContextVar("copies", default=None)
_VERSION = 1  # of the comparison; raise it if the same images give other copies


@contextlib.contextmanager
def copies_kept_in(directory: Dir | None) -> Iterator[None]:
    """Keep the copies that are found inside the ``with`` block in a directory of the store; None: do not keep them."""
    token = _place.set(directory)
    try:
        yield
    finally:
        _place.reset(token)


def recall(files: Files) -> Pairs | None:
    """The stored copies among these files; None if they are not stored, or a file has no version to know it by."""
    place = _place.get()
    if place is None or not _known(files) or not place.exists(_name(files)):
        return None
    return [(str(a), str(b)) for a, b in place.read_json(_name(files))]


def keep(files: Files, pairs: Pairs) -> None:
    """Store the copies among these files, if there is a place for them."""
    place = _place.get()
    if place is not None and _known(files):
        place.write_json(_name(files), [list(pair) for pair in pairs])


def _known(files: Files) -> bool:
    return all(version for _, version in files)


def _name(files: Files) -> str:
    text = json.dumps([_VERSION, sorted(files)], ensure_ascii=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
