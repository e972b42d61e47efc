"""``gs://``: Google Cloud Storage, with pyarrow's own client and Google's application default credentials.

``STORAGE_EMULATOR_HOST``, as for Google's own clients, names a server without credentials. Without credentials, only
public buckets can be read: set ``GOOGLE_CLOUD_ANONYMOUS=1`` for these.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import pyarrow.fs as pafs

from ktray.recipe.registries import SCHEMES
from ktray.storage.schemes.base import Scheme

_RETRY = timedelta(minutes=2)
_EMULATOR, _ANONYMOUS = "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_ANONYMOUS"


class GoogleCloud(Scheme):
    """Buckets of Google Cloud Storage."""

    form = "gs://BUCKET/KEY"
    remedy = (
        "Check the bucket and the key, and the credentials (`gcloud auth application-default login` or "
        f"GOOGLE_APPLICATION_CREDENTIALS; {_ANONYMOUS}=1 for public buckets)."
    )

    def open(self, bucket: str) -> pafs.FileSystem:
        return _open(os.environ.get(_EMULATOR, ""), bool(os.environ.get(_ANONYMOUS)))


@functools.lru_cache(maxsize=4)
def _open(emulator: str, anonymous: bool) -> pafs.FileSystem:
    if not emulator:
        return pafs.GcsFileSystem(anonymous=anonymous, retry_time_limit=_RETRY)
    scheme, _, host = emulator.rpartition("://")
    return pafs.GcsFileSystem(
        anonymous=True,
        scheme=scheme or "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=_RETRY,
    )


SCHEMES.register("gs")(GoogleCloud())
SCHEMES.register("gcs")(GoogleCloud())
