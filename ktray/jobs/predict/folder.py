"""The folder of predictions: Parquet files for readers of any library, and what a later job needs to add to them.

=====================  ==================================================================================
``NAME-PIECE.parquet``  the predictions for a piece of the shard ``NAME`` of ``predict.data``
``_predictions.json``  what all predictions of the folder have in common; only these may be added
``_shards/NAME.json``  which files and images a finished shard has
=====================  ==================================================================================

Readers of folders of Parquet files, such as pyarrow, pandas, Spark and Ray Data, ignore names that begin with ``_``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.errors import KtrayError
from ktray.stages.shard_summary import ShardSummary
from ktray.storage.store import Dir

MARK, SHARDS = "_predictions.json", "_shards"
SUFFIX = ".parquet"
_AT_ONCE = 16  # requests to S3 at a time


@dataclass(frozen=True)
class PredictedShard(ShardSummary):
    """The summary of a shard whose predictions are complete.

    Attributes:
        files: size in bytes of each file, by name.
        counts: number of images by predicted class, in the order of the classes.
        confidence: sum of the probabilities of the predicted classes.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    counts: Sequence[int] = ()
    confidence: float = 0.0


@dataclass(frozen=True)
class PredictionFolder:
    """A folder of predictions, on a local disk or on S3. It is picklable."""

    home: Dir

    @property
    def shards(self) -> Dir:
        return self.home.sub(SHARDS)

    def settle(self, facts: Mapping[str, Any]) -> None:
        """Begin to write into the folder.

        Args:
            facts: JSON-like description of the model and of the columns.

        Raises:
            KtrayError: the folder has predictions of another model or with other columns, or files of somebody else.
        """
        try:
            known = self.home.read_json(MARK)
        except FileNotFoundError:
            known = None
        except ValueError:  # damaged
            known = {}
        if known is None and (others := self.home.names(SUFFIX)):
            raise KtrayError(
                f"'{self.home.uri}' has Parquet files that are not predictions of ktray, for example {min(others)}",
                "Set predict.out to an empty or new folder.",
            )
        if known is not None and known != dict(facts):
            names = sorted(name for name in {*known, *facts} if known.get(name) != facts.get(name))
            raise KtrayError(
                f"'{self.home.uri}' has other predictions (they differ in: {', '.join(names)})",
                "Set predict.out to another folder, or delete this one.",
            )
        self.home.write_json(MARK, facts)

    def finished(self, names: Collection[str]) -> dict[str, PredictedShard]:
        """The shards out of ``names`` whose predictions are complete: all files exist and have their sizes."""
        sizes, wanted, folder = self.home.names(SUFFIX), set(names), self.shards
        files = [file for file in folder.names(".json") if file.removesuffix(".json") in wanted]
        with ThreadPoolExecutor(1 if folder.is_local else _AT_ONCE) as pool:
            shards = list(map(PredictedShard.from_json, pool.map(folder.read_json, files)))
        return {s.name: s for s in shards if all(sizes.get(name) == size for name, size in s.files.items())}

    def finish(self, shard: PredictedShard) -> None:
        """Declare a shard complete; its files must exist."""
        self.shards.write_json(f"{shard.name}.json", shard.to_json())

    def write(self, name: str, table: pa.Table) -> int:
        """Write a Parquet file; returns its size in bytes."""
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
        data = stream.getvalue().to_pybytes()
        self.home.write(name, data)
        return len(data)

    def drop_others(self, shards: Mapping[str, PredictedShard]) -> int:
        """Delete the files that belong to none of these shards: those of images that have changed or do not exist any
        more, and those of an interrupted attempt. Returns their number."""
        kept = {name for shard in shards.values() for name in shard.files}
        others = [name for name in self.home.names(SUFFIX) if name not in kept]
        # A shard without its summary counts as unfinished, so the summaries go first.
        for file in self.shards.names(".json"):
            if file.removesuffix(".json") not in shards:
                self.shards.delete(file)
        for name in others:
            self.home.delete(name)
        return len(others)


def table(
    uris: np.ndarray,
    probabilities: np.ndarray,
    embedding: np.ndarray | None,
    classes: Sequence[str],
    whole: bool,
    decided: np.ndarray | None = None,
) -> pa.Table:
    """The predictions for N images as a table with ``uri``, ``class`` (text), ``probability`` (of this class, float32)
    and, if wanted, ``probabilities`` and ``embedding`` (lists of float32 of a fixed size). Where an image has a set of
    classes, ``classes`` (a list of text, the most probable first) is in place of ``class`` and ``probability``.

    The names of the classes, in the order of the probabilities, are in the metadata of the schema (``classes``, JSON).

    Args:
        uris: (N,) text.
        probabilities: (N, C) float.
        embedding: (N, D) float32, or None.
        classes: the names of the C classes.
        whole: whether to write the probabilities of all classes.
        decided: (N, C) bool, the classes of each image; None: an image has one class, the most probable one.
    """
    columns: dict[str, pa.Array] = {"uri": pa.array(uris.tolist(), pa.string())}
    if decided is None:
        best = probabilities.argmax(1)
        columns["class"] = pa.array([classes[number] for number in best.tolist()], pa.string())
        columns["probability"] = pa.array(probabilities[np.arange(len(best)), best], pa.float32())
    else:
        order = np.argsort(-probabilities, axis=1, kind="stable")
        ranked = np.take_along_axis(decided, order, 1)
        sets = [[classes[c] for c in row[has].tolist()] for row, has in zip(order, ranked, strict=True)]
        columns["classes"] = pa.array(sets, pa.list_(pa.string()))
    if whole:
        columns["probabilities"] = _lists(probabilities)
    if embedding is not None:
        columns["embedding"] = _lists(embedding)
    return pa.table(columns).replace_schema_metadata({"classes": json.dumps(list(classes), ensure_ascii=False)})


def _lists(rows: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(rows, dtype=np.float32).ravel(), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
