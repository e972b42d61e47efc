"""Small images for the cases of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import picture

Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """``put("a/b", 3)`` writes three JPEGs into a folder, ``put("x.txt", b"...")`` a file, ``put("x.HEIC", "JPEG")`` an
    image of a format."""

    def write(name: str, content: int | bytes | str = 1) -> None:
        path = tmp_path / name
        if isinstance(content, int):
            path.mkdir(parents=True, exist_ok=True)
            for i in range(content):
                (path / f"{i:03d}.jpg").write_bytes(picture(f"{name}/{i}"))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else picture(name, content))

    return write
