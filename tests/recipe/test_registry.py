"""Registries: the folder, entry points of other packages, and what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import KtrayError
from ktray.recipe.registry import Registry


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    home = folder / name
    home.mkdir(parents=True)
    for file, text in files.items():
        (home / file).write_text(text)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder on the path with a home package ``toyhome`` that holds a registry and a module."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = 'from ktray.recipe.registry import Registry\nTOYS = Registry("toy", "toy.name", "toyhome", "toy.group")\n'
    own = "from toyhome import TOYS\n\n\n@TOYS.register('square')\ndef square(x):\n    return x * x\n"
    package(tmp_path, "toyhome", {"__init__.py": text, "square.py": own})
    import toyhome  # type: ignore[import-not-found]

    yield toyhome.TOYS
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(folder: Path, target: str) -> None:
    package(folder, "toy_outside-1.0.dist-info", {"entry_points.txt": f"[toy.group]\ncube = {target}\n"})
    (folder / "toy_outside-1.0.dist-info" / "METADATA").write_text("Name: toy_outside\nVersion: 1.0\n")


def test_the_folders_modules_are_found_without_being_named(toys: Registry[Any]) -> None:
    assert toys.names() == ["square"]
    assert toys.get("square")(3) == 9
    assert "square" in toys
    assert "cube" not in toys


def test_another_package_adds_by_entry_point(toys: Registry[Any], tmp_path: Path) -> None:
    outside = "from toyhome import TOYS\n\n\n@TOYS.register('cube')\ndef cube(x):\n    return x**3\n"
    package(tmp_path, "toyoutside", {"__init__.py": "", "cube.py": outside})
    install(tmp_path, "toyoutside.cube")
    assert [name for name, _ in toys] == ["cube", "square"]
    assert toys.get("cube")(3) == 27


def test_an_unknown_name_is_told_with_the_nearest(toys: Registry[Any]) -> None:
    with pytest.raises(KtrayError, match=r"No toy is named 'sqare' \(toy\.name\).*Did you mean 'square'\?"):
        toys.get("sqare")


def test_a_package_that_cannot_be_imported_is_named(toys: Registry[Any], tmp_path: Path) -> None:
    install(tmp_path, "toyabsent.cube")
    with pytest.raises(
        KtrayError, match=r"The toy 'cube' of the package '.+' cannot be imported from 'toyabsent\.cube'"
    ):
        toys.names()
    with pytest.raises(KtrayError, match="cannot be imported"):  # and again, not only the first time
        toys.names()


def test_a_name_is_taken_once(toys: Registry[Any]) -> None:
    toys.names()
    with pytest.raises(KtrayError, match=r"Two toys are named 'square': toyhome\.square\.square and "):
        toys.register("square")(lambda x: x)
