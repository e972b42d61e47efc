"""Import torchvision and timm without ``torch._dynamo``.

``torchvision.ops.roi_align`` imports ``torch._dynamo.utils`` for one function, which it calls only on a GPU with
deterministic algorithms; timm marks a method as one that is not compiled. With ``torch._dynamo`` come the compiler,
sympy and ``torch.distributed``: more than a second in every process of a job. While the two packages are imported,
stand-ins with what they need are in the place of the modules. Whoever asks for anything else gets the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_PACKAGES = ("torchvision", "timm")
_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _StandIn(ModuleType):
    def is_compile_supported(self, device_type: Any) -> Any:
        return import_module("torch._dynamo.utils").is_compile_supported(device_type)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if options.keys() - {"reason"}:
            return self.__getattr__("disable")(fn, recursive, **options)
        return import_module("torch._compile")._disable_dynamo(fn, recursive)  # the same, when it is called first

    def __getattr__(self, name: str) -> Any:
        # `inspect` asks every module for its __file__. An import of a submodule asks its package for __path__.
        if name.startswith("__") and (self.__name__, name) != (_COMPILER[0], "__path__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in _COMPILER:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


@contextmanager
def _stand_ins() -> Iterator[None]:
    for name in _COMPILER:
        sys.modules.setdefault(name, _StandIn(name))
    try:
        yield
    finally:
        _remove_stand_ins()


class _LeanLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Those who look at the module later, such as importlib.resources, need its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        import_module("torch")  # completely, before anything stands in for a part of it
        with _stand_ins():
            self._loader.exec_module(module)


class _LeanFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PACKAGES or any(name in sys.modules for name in _COMPILER):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LeanLoader(spec.loader)
        return spec


def install() -> None:
    """Make later imports of torchvision and timm lean, in this process. Calling it again changes nothing."""
    if not any(isinstance(finder, _LeanFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LeanFinder())
