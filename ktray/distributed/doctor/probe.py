"""What is found out on a node, by a task that runs there."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from ktray.data import filesystem
from ktray.storage.store import Dir

_DECODE_SECONDS = 0.5


@dataclass(frozen=True)
class Ask:
    """What to look at.

    Attributes:
        store: folder or address of the store.
        token: name of the file there that the driver has written, and of the folder for the node's own.
        files: that have to be there, such as the teacher's checkpoint.
        decode: also measure how fast a core decodes.
    """

    store: str
    token: str
    files: tuple[str, ...] = ()
    decode: bool = True


def probe(ask: Ask, node: str) -> dict[str, Any]:
    """``versions``, ``gpus`` that torch sees, ``store`` and ``files`` (None, or what is wrong), ``decode`` (JPEGs of
    500 x 375 a second and core)."""
    import torch

    from ktray.accounting.device import versions

    found: dict[str, Any] = {"host": socket.gethostname(), "versions": versions()}
    found["versions"].pop("platform")
    found["gpus"] = torch.cuda.device_count()
    found["store"] = _store(ask, node)
    found["files"] = {path: _file(path) for path in ask.files}
    if ask.decode:
        found["decode"] = _decode_rate()
    return found


def clock() -> float:
    """The node's time."""
    return time.time()


def _store(ask: Ask, node: str) -> str | None:
    """Read what the driver wrote, write something for it to read."""
    folder = Dir(ask.store)
    try:
        if not folder.exists(f"{ask.token}/driver"):
            return "cannot see what the driver wrote there: it is not the same place"
        folder.write(f"{ask.token}/{node}", node.encode())
    except Exception as error:
        return filesystem.why(error)
    return None


def _file(path: str) -> str | None:
    try:
        return None if filesystem.stat(path) else "is not there"
    except Exception as error:
        return filesystem.why(error)


def _decode_rate() -> float:
    from ktray.data.decode import decode_rgb
    from ktray.miniverse.photos import jpeg

    data = jpeg(0)
    began, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < _DECODE_SECONDS:
        decode_rgb(data)
        images += 1
    return images / spent
