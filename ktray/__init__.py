"""ktray: knowledge transfer on Ray, from a vision foundation model to a small model for one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktray.tasks.students import load_student

__version__ = "0.1.0"
__all__ = ["__version__", "load_student"]


def __getattr__(name: str) -> Any:
    # Importing ktray must stay light: the installer runs before torch is there.
    if name == "load_student":
        from ktray.tasks.students import load_student

        return load_student
    raise AttributeError(name)
