"""Open an address of any scheme: those that are registered in ``SCHEMES``, ``s3://``, and those that pyarrow knows."""

from __future__ import annotations

import pyarrow.fs as pafs

from ktray.recipe.registries import SCHEMES
from ktray.storage import s3


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address, and the path inside it. Paths are not decoded.

    Raises:
        OSError, ValueError, KtrayError: the scheme or the bucket does not exist, or it cannot be reached.
    """
    scheme, _, path = uri.partition("://")
    if scheme not in SCHEMES:
        return s3.open_uri(uri)
    return SCHEMES.get(scheme).open(path.partition("/")[0]), path.rstrip("/")


def form(uri: str) -> str:
    """The form of addresses of the same scheme, for messages."""
    scheme = uri.partition("://")[0]
    return str(SCHEMES.get(scheme).form) if scheme in SCHEMES else "s3://BUCKET/KEY"


def remedy(uri: str) -> str:
    """What to check if a place does not exist or cannot be opened."""
    scheme = uri.partition("://")[0]
    if scheme in SCHEMES:
        return str(SCHEMES.get(scheme).remedy)
    return "Check its name, the credentials and AWS_ENDPOINT_URL."
