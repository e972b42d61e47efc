"""Watch the unusable images of a stage while it reads: end it once there are certainly too many, and warn early."""

from __future__ import annotations

import logging

from ktray.data.quarantine import BadLimit, Quarantine

logger = logging.getLogger("ktray")

_EARLY = 200  # number of images after which a large share of unusable ones is reported


class BadImageWatch:
    """The watch of one attempt of a stage.

    Args:
        name: name of the stage in messages.
        limit: how many images may be unusable.

    Attributes:
        total: number of images that the stage will read; 0: unknown.
    """

    def __init__(self, name: str, limit: BadLimit) -> None:
        self.name, self.limit, self.total = name, limit, 0
        self._warned = False

    def look(self, quarantine: Quarantine, read: int) -> None:
        """Look at the images that were read so far.

        Raises:
            KtrayError: more are unusable than all images of the stage may have.
        """
        if self.total and quarantine.exceeds(max(self.total, read), self.limit):
            quarantine.check(read, self.limit)
        if not self._warned and read >= _EARLY and quarantine.exceeds(read, self.limit):
            self._warned = True
            logger.warning(
                f"{self.name:<9} {quarantine.describe(read, self.limit)}. If this share remains, the stage will fail: "
                f"{quarantine.raised(read)}, or repair the images"
            )
