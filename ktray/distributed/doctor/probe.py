"""The probe: a task that runs on a node and reports its versions, GPUs, files and speed."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from ktray.data import filesystem
from ktray.storage.store import Dir

_DECODE_SECONDS = 0.5


@dataclass(frozen=True)
class ProbeRequest:
    """What a probe checks.

    Attributes:
        store: folder or address of the store.
        token: name of a folder in the store that holds the driver's file, and into which the node writes its own.
        files: files that the node must be able to read, such as the teacher's checkpoint.
        decode: whether to measure how fast a core decodes images.
    """

    store: str
    token: str
    files: tuple[str, ...] = ()
    decode: bool = True


def probe(request: ProbeRequest, node: str) -> dict[str, Any]:
    """Probe the node that this function runs on.

    Returns:
        ``host``; ``versions``; ``gpus``: the number that torch sees; ``store`` and, for each file, ``files``: None, or
        what is wrong; ``decode``: JPEGs of 500 x 375 per second and core.
    """
    import torch

    from ktray.accounting.device import versions

    report: dict[str, Any] = {"host": socket.gethostname(), "versions": versions()}
    report["versions"].pop("platform")
    report["gpus"] = torch.cuda.device_count()
    report["store"] = _store(request, node)
    report["files"] = {path: _file(path) for path in request.files}
    if request.decode:
        report["decode"] = _decode_rate()
    return report


def clock() -> float:
    """The node's time, in seconds since 1970."""
    return time.time()


def _store(request: ProbeRequest, node: str) -> str | None:
    """Look for the driver's file, and write a file for the driver to look for."""
    folder = Dir(request.store)
    try:
        if not folder.exists(f"{request.token}/driver"):
            return "this node cannot see the driver's file, so it is not the same place"
        folder.write(f"{request.token}/{node}", node.encode())
    except Exception as error:
        return filesystem.why(error)
    return None


def _file(path: str) -> str | None:
    try:
        return None if filesystem.stat(path) else "does not exist"
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
