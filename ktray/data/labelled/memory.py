"""What is known of labelled images, kept in the store, so that not each start of a job reads all of them again; and in
the process, while a job plans several runs with the same images."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ktray.storage.store import Dir

Files = Sequence[tuple[str, str]]  # uri and version (size and modification time) of each image
Pairs = list[tuple[str, str]]

_place: contextvars.ContextVar[Dir | None] = contextvars.ContextVar("labelled", default=None)
_read_sets: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("read_sets", default=None)
_VERSION = 1  # of the comparison; raise it if the same images give other copies


@contextlib.contextmanager
def kept_in(directory: Dir | None) -> Iterator[None]:
    """Keep what is found inside the ``with`` block in a directory of the store; None: do not keep it."""
    token = _place.set(directory)
    try:
        yield
    finally:
        _place.reset(token)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Read the same labelled images only once inside the ``with`` block: a list of a million images takes a minute.

    For planning, which takes seconds to minutes. A run reads its images anew, because they may have changed.
    """
    known = _read_sets.get()
    token = _read_sets.set({} if known is None else known)
    try:
        yield
    finally:
        _read_sets.reset(token)


Read = TypeVar("Read")


def once(what: str, read: Callable[[], Read]) -> Read:
    """The result of ``read``, or that of an earlier call for ``what`` inside `read_once`."""
    known = _read_sets.get()
    if known is None:
        return read()
    if what not in known:
        known[what] = read()
    found: Read = known[what]
    return found


def recall_copies(files: Files) -> Pairs | None:
    """The stored copies among these files; None if they are not stored, or a file has no version to know it by."""
    name = _copies(files)
    found = _read(name) if name else None
    return None if found is None else [(str(a), str(b)) for a, b in found]


def keep_copies(files: Files, pairs: Pairs) -> None:
    """Store the copies among these files, if there is a place for them."""
    if name := _copies(files):
        _write(name, [list(pair) for pair in pairs])


def recall_contents(files: Files) -> dict[str, tuple[str, str]]:
    """By uri, the version and the digest of the content that were stored for these files."""
    found = _read(_contents(files)) or {}
    return {str(uri): (str(version), str(digest)) for uri, (version, digest) in found.items()}


def keep_contents(files: Files, contents: dict[str, tuple[str, str]]) -> None:
    """Store versions and digests of the contents of these files, if there is a place for them."""
    _write(_contents(files), {uri: list(facts) for uri, facts in contents.items()})


def _copies(files: Files) -> str:
    return f"{_digest([_VERSION, sorted(files)])}.json" if all(version for _, version in files) else ""


def _contents(files: Files) -> str:
    return f"contents-{_digest(sorted(uri for uri, _ in files))}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:16]


def _read(name: str) -> Any:
    place = _place.get()
    if place is None or not place.exists(name):
        return None
    return place.read_json(name)


def _write(name: str, value: Any) -> None:
    place = _place.get()
    if place is not None:
        place.write_json(name, value)
