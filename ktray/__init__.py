"""ktray: knowledge transfer on Ray, from a vision foundation model to a small model for one task."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ktray.models import lean_imports

if TYPE_CHECKING:
    from ktray.api.calls import compare, curate, distill, export, index, open_run, predict, tune
    from ktray.api.results import Run
    from ktray.errors import KtrayError
    from ktray.tasks.students import load_student

__version__ = "0.1.0"
__all__ = [
    "KtrayError",
    "Run",
    "__version__",
    "compare",
    "curate",
    "distill",
    "export",
    "index",
    "load_student",
    "open_run",
    "predict",
    "tune",
]

_CALLS = ("compare", "curate", "distill", "export", "index", "open_run", "predict", "tune")
_PLACES = {
    **dict.fromkeys(_CALLS, "ktray.api.calls"),
    "KtrayError": "ktray.errors",
    "Run": "ktray.api.results",
    "load_student": "ktray.tasks.students",
}

lean_imports.install()


def __getattr__(name: str) -> Any:
    # Importing ktray must stay light: the installer runs before torch is there.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ktray' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
