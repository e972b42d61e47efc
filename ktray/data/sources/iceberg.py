"""Tables of Apache Iceberg: folders with ``metadata/*.metadata.json``, read without a catalogue.

The newest metadata is the one that ``metadata/version-hint.text`` names, or else the one with the highest number. The
package is pyiceberg (``ktray[iceberg]``).
"""

from __future__ import annotations

import re

from ktray.data import filesystem
from ktray.data.extras import require
from ktray.data.filesystem import why
from ktray.data.sources.lakes import LakeFile, LakeSource
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

_FOLDER, _SUFFIX, _HINT = "metadata", ".metadata.json", "version-hint.text"


class IcebergSource(LakeSource):
    """The current snapshot of a table of Apache Iceberg."""

    def fits_folder(self, folder: str) -> bool:
        return _FOLDER in filesystem.children(folder)[0] and bool(_metadata(folder))

    def files(self, folder: str) -> list[LakeFile]:
        tables = require("pyiceberg.table", "iceberg", f"The table of Iceberg '{folder}'")
        newest = _newest(folder)
        try:
            table = tables.StaticTable.from_metadata(newest)
            tasks = list(table.scan().plan_files())
        except Exception as error:  # pyiceberg and its libraries raise types of their own
            reason = why(OSError(str(error).partition("\n")[0]))
            raise KtrayError(
                f"'{newest}' cannot be read as metadata of Iceberg: {reason}",
                "Restore the folder metadata of the table, or name its Parquet files with a pattern.",
            ) from error
        if any(task.delete_files for task in tasks):
            raise KtrayError(
                f"The table '{folder}' has delete files: its data files still contain rows that were deleted",
                "Rewrite these files: CALL system.rewrite_data_files in Spark.",
            )
        others = [str(task.file.file_path) for task in tasks if str(task.file.file_format.value) != "PARQUET"]
        if others:
            raise KtrayError(f"The table '{folder}' has files that are not Parquet: '{others[0]}'", "Write Parquet.")
        return [LakeFile(filesystem.normalise(str(task.file.file_path))) for task in tasks]


def _metadata(folder: str) -> list[str]:
    return [name for name in filesystem.children(f"{folder}/{_FOLDER}")[1] if name.endswith(_SUFFIX)]


def _newest(folder: str) -> str:
    names = _metadata(folder)
    hint = f"{folder}/{_FOLDER}/{_HINT}"
    if filesystem.stat(hint) is not None:
        number = filesystem.read_bytes(hint).decode("utf-8", "replace").strip()
        hinted = [name for name in names if name in (f"v{number}{_SUFFIX}", f"{number}{_SUFFIX}")]
        names = hinted or names
    return f"{folder}/{_FOLDER}/{max(names, key=_number)}"


def _number(name: str) -> int:
    """The version in ``00002-UUID.metadata.json`` or ``v2.metadata.json``; -1 without one."""
    match = re.match(r"v?(\d+)", name)
    return int(match[1]) if match else -1


SOURCES.register("iceberg")(IcebergSource())
