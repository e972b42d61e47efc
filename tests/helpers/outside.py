"""Packages that are not part of ktray: written into a folder, found by their entry points, without any installer."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_package(folder: Path, name: str, modules: dict[str, str], points: dict[str, dict[str, str]]) -> Path:
    """A package as an installer would leave it; returns ``folder``, which goes on the path.

    Args:
        folder: stands for ``site-packages``.
        name: of the package.
        modules: file name to text; ``__init__.py`` is added where there is none.
        points: entry point group to its points, name to module: ``{"ktray.objectives": {"huber": "toy.huber"}}``.
    """
    home = folder / name
    home.mkdir(parents=True)
    for file, text in {"__init__.py": "", **modules}.items():
        (home / file).write_text(text, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def environment(*folders: Path) -> dict[str, str]:
    """Variables for a process (and for the Ray workers that it starts) that has these folders on its path."""
    paths = [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "RAY_AUTH_MODE": "disabled"}
    found.pop("RAY_ADDRESS", None)
    return found


def run_job(job: str, arguments: list[str], folders: list[Path], timeout: float = 600) -> subprocess.CompletedProcess:
    """``python jobs/JOB.py ARGUMENTS`` with the packages of these folders installed; its output as text."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.run(command, env=environment(*folders), capture_output=True, text=True, timeout=timeout)


@contextlib.contextmanager
def installed(folder: Path, *registries):
    """The packages of a folder in this process: the registries find them inside the block, and not after it."""
    for registry in registries:
        registry.names()  # what ktray itself has is imported, and so registered, only once
    modules, kept = set(sys.modules), [(r, dict(r._items), r._loaded) for r in registries]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    for registry in registries:
        registry._loaded = False
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for registry, items, loaded in kept:
            registry._items, registry._loaded = items, loaded
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in {path.name for path in folder.iterdir()}:
                del sys.modules[name]
