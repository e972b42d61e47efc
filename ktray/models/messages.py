"""Error messages about models."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ktray.errors import KtrayError


def unknown_name(kind: str, name: str, known: Sequence[str], key: str) -> KtrayError:
    """The error for a name that a library does not have.

    Args:
        kind: what the name stands for, e.g. "timm model".
        name: the unknown name.
        known: all names of the library.
        key: the recipe key with the name.
    """
    lower = {k.lower(): k for k in known}
    near = [lower[k] for k in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    remedy = f"Did you mean {' or '.join(near)}? Set {key}=." if near else f"Set {key}= to a name that the library has."
    return KtrayError(f"There is no {kind} '{name}'", remedy)


def cause(error: BaseException) -> str:
    """The first line of the message of a library's exception, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
