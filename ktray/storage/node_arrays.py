"""Arrays on the disk of a node that its processes map into their memory, for rows that are too many to be held.

The pages of a mapped array belong to the operating system, which keeps as many as there is room for. Rows can be read
in any order, so that an array that is mapped gives the same results as one that is in memory. The files are in the
bounded folder of `ktray.storage.node_cache`; a file that is deleted stays readable for the processes that have mapped
it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ktray.storage.node_cache import NodeCache

Blocks = Iterable[Sequence[np.ndarray]]


def load_arrays(
    cache: NodeCache | None, key: str, count: int, blocks: Callable[[], Blocks], limit: int
) -> list[np.ndarray]:
    """Arrays in memory if they have at most ``limit`` bytes, otherwise mapped (in memory if there is no room on disk).

    Args:
        cache: the cache of this node; None: the arrays are in memory.
        key, count, blocks: see `map_arrays`; ``blocks`` yields at least one block.

    Raises:
        OSError: an error of ``blocks``.
    """
    if cache and (found := map_arrays(cache, key, count)):
        return found
    held: list[Sequence[np.ndarray]] = []
    size = 0
    for block in blocks():
        held.append(block)
        size += sum(array.nbytes for array in block)
        if cache and size > limit:
            held.clear()
            return map_arrays(cache, key, count, blocks) or load_arrays(None, key, count, blocks, limit)
    return [np.concatenate([block[number] for block in held]) for number in range(count)]


def map_arrays(cache: NodeCache, key: str, count: int, blocks: Callable[[], Blocks] | None = None) -> list[np.ndarray]:
    """Arrays of this node, mapped copy-on-write: what a process writes into them does not reach the file.

    Args:
        key: hexadecimal digest of what the content depends on.
        count: number of arrays.
        blocks: a function whose result yields ``count`` arrays (n, ...) at a time, which are concatenated. It is called
            if this node does not have the arrays, by one process at a time; None: the arrays are not made.

    Returns:
        The arrays; an empty list if the node does not have them, or has no room for them.

    Raises:
        OSError: an error of ``blocks``.
    """
    paths = [cache.folder / "files" / f"{key}-{number}.npy" for number in range(count)]
    found = _mapped(paths)
    if found or blocks is None:
        return found
    with contextlib.ExitStack() as held:
        with cache.harmless():
            held.enter_context(cache.locked(f"fetch-{key[:2]}"))
        found = _mapped(paths)  # another process may have made them while this one waited
        if found:
            return found
        writers: list[_Writer] = []
        with cache.harmless():
            writers += [held.enter_context(_Writer(path)) for path in paths]
        if len(writers) == count and _write(cache, writers, blocks()):
            with cache.harmless():
                for writer in writers:
                    writer.finish()
    return _mapped(paths)


def _write(cache: NodeCache, writers: Sequence[_Writer], blocks: Blocks) -> bool:
    """Write all blocks; returns whether there was room for them."""
    for block in blocks:  # an error of the store is not one of the cache
        written = False
        with cache.harmless():
            with cache.locked("used"):
                room = cache.make_room(sum(array.nbytes for array in block))
            if room:
                for writer, array in zip(writers, block, strict=True):
                    writer.append(array)
                written = True
        if not written:
            return False
    return True


def _mapped(paths: Sequence[Path]) -> list[np.ndarray]:
    """The arrays of the files; an empty list if one is missing or too short."""
    arrays = []
    for path in paths:
        try:
            arrays.append(np.load(path, mmap_mode="c", allow_pickle=False))
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return []
    return arrays


class _Writer:
    """Writes an ``.npy`` file whose number of rows is known at its end. The file has its name when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self.kind: tuple[np.dtype, tuple[int, ...]] | None = None
        handle, self.temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        self.file: IO[bytes] = open(handle, "wb")  # noqa: SIM115 - `discard` closes it

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def append(self, array: np.ndarray) -> None:
        if self.kind is None:
            self.kind = array.dtype, array.shape[1:]
            self._header()
        if (array.dtype, array.shape[1:]) != self.kind:
            raise ValueError(f"a block has {array.dtype} {array.shape[1:]} instead of {self.kind}")
        if array.size:
            self.file.write(np.ascontiguousarray(array).data)
            self.file.flush()  # so that the cache sees how large the file is
        self.rows += len(array)

    def finish(self) -> None:
        """Give the file its name."""
        if self.kind is None:
            return
        self.file.seek(0)
        self._header()
        self.file.flush()
        os.fsync(self.file.fileno())  # or a loss of power may leave a file of this name with other content
        self.file.close()
        os.replace(self.temporary, self.path)

    def _header(self) -> None:
        assert self.kind is not None
        dtype, shape = self.kind
        facts = {"descr": dtype.str, "fortran_order": False, "shape": (self.rows, *shape)}
        # numpy leaves room in the header for a larger number of rows, so it has one length for all of them.
        np.lib.format.write_array_header_1_0(self.file, facts)

    def discard(self) -> None:
        """Delete the file unless it has its name."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)
