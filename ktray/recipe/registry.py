"""Registries: things that one file can add to ktray, by name.

A registry imports the modules of one folder of ktray, and the entry points in one group of other installed packages. It
imports them on first use, so a file that registers something needs no entry anywhere else. An entry point names a
module (``toy = "toy_package.objective"``), whose import registers its content.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from ktray.errors import KtrayError

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind, by name.

    Args:
        kind: name of the kind in messages, for example ``objective``.
        key: the recipe key that chooses one.
        package: the folder of ktray whose modules register things, as a dotted name.
        group: the entry point group of other packages.
    """

    def __init__(self, kind: str, key: str, package: str, group: str) -> None:
        self.kind, self.key, self.package, self.group = kind, key, package, group
        self._items: dict[str, T] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class, a function or an instance under a name.

        Raises:
            KtrayError: the name is already registered for something else.
        """

        def add(item: T) -> T:
            registered = self._items.get(name)
            if registered is not None and _where(registered) != _where(item):
                raise KtrayError(
                    f"Two {self.kind}s are named '{name}': {_where(registered)} and {_where(item)}",
                    "Rename one of them, or uninstall its package.",
                )
            self._items[name] = item
            return item

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._all())

    def get(self, name: str) -> T:
        """The thing that is registered under a name.

        Raises:
            KtrayError: there is none; the message names the nearest name.
        """
        items = self._all()
        if name not in items:
            near = difflib.get_close_matches(name, items, n=1, cutoff=0.3)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise KtrayError(
                f"No {self.kind} is named '{name}' ({self.key})",
                f"{hint}Available: {', '.join(sorted(items)) or 'none'}. Other packages can add more with the entry "
                f"point group '{self.group}'.",
            )
        return items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return iter(sorted(self._all().items()))

    def _all(self) -> dict[str, T]:
        with self._lock:
            if not self._loaded:
                self._loaded = True  # first, because a module that is imported below may use the registry
                try:
                    self._load()
                except BaseException:
                    self._loaded = False
                    raise
            return self._items

    def _load(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:
                package_name = point.dist.name if point.dist else "another package"
                raise KtrayError(
                    f"The {self.kind} '{point.name}' of the package '{package_name}' cannot be imported from "
                    f"'{point.value}': {type(error).__name__}: {error}",
                    f"Repair or uninstall '{package_name}'.",
                ) from error


def _where(item: object) -> str:
    """Where an item is defined. The result is the same if the module is imported again."""
    kind = item if hasattr(item, "__qualname__") else type(item)
    return f"{kind.__module__}.{kind.__qualname__}"
