"""The interface of a file system that addresses name by their scheme, such as ``gs://bucket/key``.

A scheme is registered in `ktray.recipe.registries.SCHEMES` under the word before ``://``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyarrow.fs as pafs


class Scheme(ABC):
    """Opens the places of one scheme. Instances have no state."""

    form: str
    """The form of its addresses, for messages."""
    remedy: str
    """What to check if a place does not exist or cannot be opened, as a sentence."""

    @abstractmethod
    def open(self, bucket: str) -> pafs.FileSystem:
        """The file system of a bucket. Paths inside it begin with the name of the bucket.

        Args:
            bucket: the part of the address up to the first slash; letters, digits, dots and dashes only.

        Raises:
            OSError, ValueError, KtrayError: it cannot be opened.
        """
