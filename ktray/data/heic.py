"""HEIC, the format of phone photos: Pillow decodes it with the package pillow-heif (the extra ``heic``)."""

from __future__ import annotations

import functools
import importlib.util

FORMAT = "HEIF"  # pillow-heif's name of the format in Pillow
MISSING = "a HEIC image: pip install 'ktray[heic]' on all nodes, or convert it (docs/guide/data.md, Phone photos)"


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether this process can decode HEIC; from the first call on, Pillow knows the format."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    return True
