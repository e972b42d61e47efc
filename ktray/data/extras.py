"""Libraries that are not installed by default: the extras of the package, such as ``pip install 'ktray[lance]'``."""

from __future__ import annotations

import importlib
from typing import Any

from ktray.errors import KtrayError


def require(module: str, extra: str, what: str) -> Any:
    """Import a module of an extra.

    Args:
        module: name of the module.
        extra: the extra of ktray that installs it.
        what: what needs it, as the beginning of a sentence.

    Raises:
        KtrayError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise KtrayError(
            f"{what} needs the package {missing}, which is not installed", f"Run: pip install 'ktray[{extra}]'"
        ) from error
