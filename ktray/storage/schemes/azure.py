"""``az://``: Azure Blob Storage, with pyarrow's own client.

The account and its key come from the variables of Azure's own tools: ``AZURE_STORAGE_ACCOUNT``, ``AZURE_STORAGE_KEY``
or ``AZURE_STORAGE_SAS_TOKEN``; without a key, Azure's default credentials are used. ``AZURE_STORAGE_BLOB_ENDPOINT``
(``http://HOST:PORT``) names an emulator.
"""

from __future__ import annotations

import functools
import os

import pyarrow.fs as pafs

from ktray.errors import KtrayError
from ktray.recipe.registries import SCHEMES
from ktray.storage.schemes.base import Scheme

_ACCOUNT = ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
_KEY = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY")
_SAS, _ENDPOINT = "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_BLOB_ENDPOINT"


class Azure(Scheme):
    """Containers of one storage account."""

    form = "az://CONTAINER/BLOB"
    remedy = (
        "Check the container and the blob, AZURE_STORAGE_ACCOUNT, and the credentials (AZURE_STORAGE_KEY, "
        "AZURE_STORAGE_SAS_TOKEN or `az login`)."
    )

    def open(self, bucket: str) -> pafs.FileSystem:
        account = _variable(_ACCOUNT)
        if not account:
            raise KtrayError(
                f"az://{bucket} needs the name of a storage account", "Set AZURE_STORAGE_ACCOUNT to its name."
            )
        return _open(account, _variable(_KEY), os.environ.get(_SAS, ""), os.environ.get(_ENDPOINT, ""))


def _variable(names: tuple[str, ...]) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


@functools.lru_cache(maxsize=4)
def _open(account: str, key: str, sas: str, endpoint: str) -> pafs.FileSystem:
    options: dict[str, str] = {}
    if key:
        options["account_key"] = key
    elif sas:
        options["sas_token"] = sas
    if endpoint:
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        options |= {"blob_storage_authority": host, "blob_storage_scheme": scheme or "https"}
        options |= {"dfs_storage_authority": host, "dfs_storage_scheme": scheme or "https"}
    return pafs.AzureFileSystem(account, **options)


for _name in ("az", "abfs"):
    SCHEMES.register(_name)(Azure())
