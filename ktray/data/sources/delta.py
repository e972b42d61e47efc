"""Tables of Delta Lake: folders with ``_delta_log/``. The package is deltalake (``ktray[delta]``)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.extras import require
from ktray.data.filesystem import why
from ktray.data.sources.lakes import LakeFile, LakeSource
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES
from ktray.storage import s3

_LOG = "_delta_log"
_PARTITION, _DELETED = "partition.", "deletionVectors"


class DeltaSource(LakeSource):
    """The newest version of a table of Delta Lake."""

    def fits_folder(self, folder: str) -> bool:
        return _LOG in filesystem.children(folder)[0]

    def files(self, folder: str) -> list[LakeFile]:
        delta = require("deltalake", "delta", f"The table of Delta Lake '{folder}'")
        try:
            table = delta.DeltaTable(folder, storage_options=_options(folder))
            mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
            paths: list[str] = table.file_uris()
            actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
            features = table.protocol().reader_features or []
            deleted = _DELETED in features and pa.table(table.deletion_vectors()).num_rows > 0
        except Exception as error:  # deltalake raises types of its own, with a trace of Rust in further lines
            reason = why(OSError(str(error).partition("\n")[0]))
            raise KtrayError(
                f"'{folder}' cannot be read as a table of Delta Lake: {reason}",
                "Restore its folder _delta_log, or name its Parquet files with a pattern.",
            ) from error
        if mapping != "none":
            raise KtrayError(
                f"The columns of the table '{folder}' have other names in its files (column mapping {mapping})",
                "Write the table again without delta.columnMapping.mode.",
            )
        if deleted:
            raise KtrayError(
                f"The table '{folder}' has deletion vectors: its files still contain rows that were deleted",
                "Rewrite these files: REORG TABLE ... APPLY (PURGE) in Spark.",
            )
        by_name = {str(row["path"]): row for row in actions}
        return [LakeFile(path, _partition(path, by_name)) for path in paths]


def _partition(path: str, actions: dict[str, dict[str, Any]]) -> dict[str, str]:
    row = next((row for name, row in actions.items() if path.endswith(name)), {})
    parts = {name.removeprefix(_PARTITION): value for name, value in row.items() if name.startswith(_PARTITION)}
    return {name: "" if value is None else str(value) for name, value in parts.items()}


def _options(folder: str) -> dict[str, str] | None:
    """deltalake reads credentials from the environment itself, but not that a server may be without TLS."""
    server = s3.endpoint() or ""
    return {"AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true"} if folder.startswith("s3:") and server else None


SOURCES.register("delta")(DeltaSource())
