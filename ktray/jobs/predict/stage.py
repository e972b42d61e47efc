"""PREDICT: the class of every image, shard by shard, into a folder of Parquet files that grows with the images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np

from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.errors import KtrayError
from ktray.jobs.predict.decode import DecodeShard
from ktray.jobs.predict.folder import SUFFIX, PredictedShard, PredictionFolder, table
from ktray.jobs.predict.models import Classifier, LoadsClassifier, predict
from ktray.stages.base import Reporter, Runtime
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.shard_summary import PieceSummary, pairs, whole_shards
from ktray.storage.columns import Rows
from ktray.storage.lease import Lease
from ktray.storage.store import Stage

logger = logging.getLogger("ktray")

STAGE = "predict"


@dataclass(frozen=True)
class PredictedPiece(PieceSummary):
    """The summary of one piece of a shard.

    Attributes:
        file, bytes: name and size of its file; "" and 0 if no image of the piece can be used.
        counts, confidence: see `PredictedShard`.
    """

    file: str = ""
    bytes: int = 0
    counts: Sequence[int] = ()
    confidence: float = 0.0


@dataclass(frozen=True)
class PredictShard:
    """Predicts the images of a piece, and writes them as one file."""

    folder: PredictionFolder
    model: LoadsClassifier
    classes: list[str]
    probabilities: bool
    embedding: bool
    flops: float  # for one image
    thresholds: tuple[float, ...] | None = None  # of sets of classes; None: an image has one class

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    def compute(self, model: Classifier, columns: Rows) -> Rows:
        found, embedded = predict(model, columns["pixels"], self.embedding, self.thresholds is not None)
        return {"probabilities": found} if embedded is None else {"probabilities": found, "embedding": embedded}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        found, number = computed["probabilities"], int(item.get("piece", 0))
        file = f"{item['name']}-{number:05d}{SUFFIX}" if len(found) else ""
        size, decided = 0, None if self.thresholds is None else found >= np.array(self.thresholds)
        if file:
            rows = table(columns["uri"], found, computed.get("embedding"), self.classes, self.probabilities, decided)
            size = self.folder.write(file, rows)
        return PredictedPiece(
            item["name"],
            rows=len(found),
            read=int(columns["read"][0]),
            bad=pairs(columns["bad"].tolist()),
            images=len(found),
            flops=self.flops * len(found),
            piece=number,
            pieces=item.get("pieces"),
            file=file,
            bytes=size,
            counts=_counts(found, decided).tolist() if file else [],
            confidence=_confidence(found, decided) if file else 0.0,
        ).to_json()


def _counts(found: np.ndarray, decided: np.ndarray | None) -> np.ndarray:
    """(C,) int64 number of images by class; an image with several classes counts for each."""
    if decided is not None:
        return np.asarray(decided.sum(0))
    return np.bincount(found.argmax(1), minlength=found.shape[1])


def _confidence(found: np.ndarray, decided: np.ndarray | None) -> float:
    """The sum over images of the probability of the predicted class, or of the mean probability of the decisions on
    all classes."""
    if decided is not None:
        return float(np.where(decided, found, 1 - found).mean(1).sum())
    return float(found.max(1).sum())


@dataclass(frozen=True)
class PredictInputs(StageInputs):
    """The inputs of PREDICT.

    Attributes:
        names: names of the shards, which are hashes of their content.
        facts: everything that a prediction depends on: model, columns, limits.
        out: the folder in ``predict.out``; None: a folder in the store.
    """

    stage = STAGE
    version = 1

    names: list[str]
    facts: dict[str, Any]
    out: str | None
    items: Annotated[list[Item], NotInKey("addresses of the images of `names`")] = field(repr=False)
    decode: Annotated[DecodeShard, NotInKey("reads `items`, with the settings in `facts`")] = field(repr=False)
    score: Annotated[PredictShard, NotInKey("the model and the columns that `facts` describes")]
    total: Annotated[int | None, NotInKey("number of images in `items`, for the progress line")]
    named: Annotated[str, NotInKey("name of the model, for measured speeds")] = ""

    @property
    def speed(self) -> dict[str, Any]:
        embedding = bool(self.facts["embedding"])
        return {"model": self.named, "size": self.decode.preprocess.size[0], "embedding": embedding}

    @property
    def folder(self) -> PredictionFolder:
        return self.score.folder


def work(inputs: PredictInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> dict[str, Any]:
    folder, names, plan = inputs.folder, inputs.names, runtime.plan
    # Jobs with other images may use the same folder. The lease is where readers of Parquet do not look.
    with Lease(folder.shards) as lease:
        folder.settle(inputs.facts)
        finished = folder.finished(names)
        reporter.expect(inputs.total)
        reporter.shards(shard.resumed() for shard in finished.values())
        if finished and len(finished) < len(names):
            logger.info(f"predict   {len(finished):,} of {len(names):,} shards are already in {folder.home.uri}")
        todo = [item for item in inputs.items if item["name"] not in finished]
        pieces = PredictedPiece.each(map_shards(todo, inputs.decode, inputs.score, plan))
        for group in whole_shards(reporter.counted(pieces)):
            lease.check()
            shard = _joined(group)
            folder.finish(shard)
            finished[shard.name] = shard
        if dropped := folder.drop_others(finished):
            logger.info(f"predict   deleted {dropped:,} files of images that have changed or are not there any more")
    images = sum(shard.rows for shard in finished.values())
    if not images:
        raise KtrayError("No image of predict.data can be used", "Check predict.data and the quarantine list.")
    counts = np.sum([shard.counts for shard in finished.values() if shard.rows], axis=0).tolist()
    return {
        "folder": folder.home.uri,
        "images": images,
        "shards": len(names),
        "files_written": sum(len(shard.files) for shard in finished.values()),
        "bytes": sum(size for shard in finished.values() for size in shard.files.values()),
        "counts": dict(zip(inputs.score.classes, counts, strict=True)),
        "confidence": sum(shard.confidence for shard in finished.values()) / images,
    }


def _joined(pieces: list[PredictedPiece]) -> PredictedShard:
    written = [piece for piece in pieces if piece.file]
    return PredictedShard(
        pieces[0].name,
        rows=sum(piece.rows for piece in pieces),
        read=sum(piece.read for piece in pieces),
        bad=tuple(bad for piece in pieces for bad in piece.bad),
        images=sum(piece.images for piece in pieces),
        flops=sum(piece.flops for piece in pieces),
        files={piece.file: piece.bytes for piece in written},
        counts=np.sum([piece.counts for piece in written], axis=0).tolist() if written else [],
        confidence=sum(piece.confidence for piece in pieces),
    )
