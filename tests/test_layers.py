"""The layers of the package, read from its imports: no circles, arrows that never go back, Ray in its own rooms.

Every import counts, also one inside a function or under ``TYPE_CHECKING``: who reads the code follows it all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ktray"

# From the bottom up. A module may import from its own layer and from those below it.
LAYERS = (
    ("errors", "redact", "bootstrap"),
    ("recipe", "storage", "accounting"),
    ("data", "reporting", "miniverse"),
    ("models",),
    ("objectives", "tasks"),
    ("distributed", "tracking"),
    ("retrieval", "targets", "training"),
    ("stages",),
    ("pipeline",),
    ("jobs",),
    ("cli", "api"),
)
# What may import Ray. Anything else runs, and is tested, without a cluster.
ON_RAY = ("ktray.distributed.", "ktray.training.ray_train", "ktray.jobs.")


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports; the name is empty for ``import module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def graph(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """By module, the modules of the same package that it imports."""
    # The package itself is left out: it is imported with any of its modules, and offers `load_student` when asked.
    known = {name: path for name, path in known.items() if "." in name}
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for module, symbol in imports(path):
            full = f"{module}.{symbol}"
            target = full if full in known else module
            if target in known and target != name:
                edges[name].add(target)
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of more than one, Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in order:
            visit(node)
    return found


def layer(module: str) -> int:
    room = module.split(".")[1] if "." in module else ""
    places = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    assert len(places) == 1 or not room, f"{module} stands in no layer, or in two"
    return places[0] if places else -1


def test_no_modules_import_each_other() -> None:
    assert circles(graph(modules())) == []


def test_a_circle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(edges) == [["a", "b", "c"]]


def test_arrows_never_go_back_up() -> None:
    edges = graph(modules())
    back = [f"{a} -> {b}" for a, targets in edges.items() for b in sorted(targets) if layer(a) < layer(b)]
    assert back == []


def test_ray_is_imported_in_its_own_rooms_only() -> None:
    outside = {
        name
        for name, path in modules().items()
        if not name.startswith(ON_RAY) and any(module.split(".")[0] == "ray" for module, _ in imports(path))
    }
    assert outside == set()


@pytest.mark.parametrize("library", ["ray", "optuna", "mlflow"])
def test_private_names_of_a_library_stand_in_one_file(library: str) -> None:
    users = {
        name
        for name, path in modules().items()
        for module, symbol in imports(path)
        if module.split(".")[0] == library
        and any(part.startswith("_") and part != "__version__" for part in f"{module}.{symbol}".split(".")[1:])
    }
    assert len(users) <= 1, users


def test_the_top_of_the_package_is_folders() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def test_files_are_short() -> None:
    long = {name: n for name, path in modules().items() if (n := len(path.read_text("utf-8").splitlines())) >= 400}
    assert long == {}


def test_a_public_class_has_its_name_alone() -> None:
    """Two classes of one name make a reader ask which; configs of the recipe end in ``Config``."""
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
