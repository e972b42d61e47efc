"""What each stage says of itself in its ``manifest.json``, for later stages and for the result of a run.

`ktray.stages.base.run_stage` adds what all have in common (`StageManifest`). Keys are those of stored files: they stay.
"""

from __future__ import annotations

from typing import Any, TypedDict


class StageManifest(TypedDict):
    """What every manifest has beside its stage's own entries.

    Attributes:
        key: of the stage's directory; a digest of ``inputs``.
        stage: its name.
        inputs: everything that the stage's result depends on.
        run: id of the run that made it.
        read: images that were looked at.
        quarantine: those that could not be used, as [uri, reason, stage].
        files: of the directory, with their sizes in bytes.
    """

    key: str
    stage: str
    inputs: Any
    run: str
    read: int
    quarantine: list[list[str]]
    files: dict[str, int]


class LabelsManifest(TypedDict):
    """LABELS. ``canvas``, ``size``: height and width of what is stored for training and for evaluation."""

    canvas: tuple[int, int]
    size: tuple[int, int]
    shards: list[str]


class AdaptManifest(TypedDict):
    """ADAPT.

    Attributes:
        chosen: the best candidate on validation.
        scores: by candidate, metrics on validation, ``loss`` and ``temperature``.
        val: of the chosen one, the task's metric.
        embed_dim, patch_dim: widths of the tower's embeddings; ``patch_dim`` is None without patches.
        directory: the chosen candidate's.
        frozen: directory of a head for the frozen tower's embeddings; None where there is none.
    """

    chosen: str
    scores: dict[str, dict[str, float]]
    val: float
    embed_dim: int
    patch_dim: int | None
    directory: str
    frozen: str | None


class IndexClasses(TypedDict, total=False):
    """``classes``: names, where the gallery is the labelled generic set."""

    classes: list[str]


class IndexManifest(IndexClasses):
    """INDEX.

    Attributes:
        search: the compressed index (`ktray.retrieval.faiss_index.Compressed`); None: every row is compared.
        rows: embeddings.
        folder: of the index, from the store's root or absolute.
        shards: (name, rows) of its parts, in order.
        shard_count: of the source.
        images: that could be used.
    """

    search: dict[str, Any] | None
    rows: int
    folder: str
    shards: list[tuple[str, int]]
    shard_count: int
    images: int


class CurateFacts(TypedDict, total=False):
    """What a set has that was drawn from a gallery: `ktray.retrieval.coverage` (None without queries), and by strategy
    the share of the set that it would have taken too."""

    coverage: dict[str, Any] | None
    agreement: dict[str, float]


class CurateManifest(CurateFacts):
    """CURATE. Counts of images: in the set, left out by reason, to choose from, and kept although an encoder finds
    them similar to a held-out one, as their pixels differ."""

    kept: int
    dropped: dict[str, int]
    gallery: int
    similar_kept: int


class TargetSizes(TypedDict):
    """Sizes of the targets, as `ktray.training.inputs.TargetSet` has them; 0 for a target that is not there."""

    classes: int
    embed_dim: int
    patch_dim: int
    vocabulary: int
    text_length: int
    source_classes: int


class TeachManifest(TargetSizes):
    """TEACH.

    Attributes:
        mode: ``teach.mode``: whether rows are stored, or made while training asks for them.
        jpeg: quality of stored views; None: raw pixels.
        images: of the transfer set.
        rows: views.
        row_bytes: of one row in memory.
        targets: that the rows have.
        view_size: side of the views that the teacher sees, pixels.
        shards: [name, rows].
    """

    mode: str
    jpeg: int | None
    images: int
    rows: int
    row_bytes: int
    targets: list[str]
    view_size: int
    shards: list[tuple[str, int]]


class WorkerStart(TypedDict):
    """Training workers began at ``step``, ``workers`` of them."""

    step: int
    workers: int


class TrainedManifest(TypedDict):
    """TRANSFER, FINETUNE and the scratch floor.

    Attributes:
        steps, seconds: of the loop, over all attempts.
        best_step: after which validation was best.
        curve: a row for each evaluation (`ktray.training.loop.State`).
        images_per_second: over all attempts.
        flops_per_step: over all workers.
        precision: number format of the matrix products.
        starts: each time that workers began in the last attempt.
    """

    steps: int
    seconds: float
    best_step: int
    curve: list[dict[str, float]]
    images_per_second: float
    flops_per_step: float
    precision: str
    starts: list[WorkerStart]


class EvaluateManifest(TypedDict):
    """EVALUATE. ``metrics``: by model (student, scratch, teacher) what its task's kind measures on the test split."""

    metrics: dict[str, dict[str, Any]]


MANIFESTS: dict[str, type] = {
    "labels": LabelsManifest,
    "adapt": AdaptManifest,
    "index": IndexManifest,
    "curate": CurateManifest,
    "teach": TeachManifest,
    "transfer": TrainedManifest,
    "finetune": TrainedManifest,
    "scratch": TrainedManifest,
    "evaluate": EvaluateManifest,
}
