"""The content of ``manifest.json`` for each stage. Later stages and the result of a run read it.

`ktray.stages.base.run_stage` adds the entries that all stages have (`StageManifest`). The keys are those of stored
files, so they must not change.
"""

from __future__ import annotations

from typing import Any, TypedDict


class StageManifest(TypedDict):
    """The entries that every manifest has in addition to those of its stage.

    Attributes:
        key: key of the stage, a digest of ``inputs``; the name of its folder.
        stage: name of the stage.
        inputs: everything that the result of the stage depends on.
        run: id of the run that computed the stage.
        read: number of images that were read.
        quarantine: images that could not be used, as [uri, reason, stage].
        files: files of the folder, with their sizes in bytes.
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
        scores: by candidate, the metrics on validation, ``loss`` and ``temperature``.
        val: the task's metric of the chosen candidate.
        embed_dim, patch_dim: widths of the tower's embeddings; ``patch_dim`` is None without patches.
        directory: folder of the chosen candidate.
        frozen: folder of a head for the embeddings of the frozen tower; None where there is none.
    """

    chosen: str
    scores: dict[str, dict[str, float]]
    val: float
    embed_dim: int
    patch_dim: int | None
    directory: str
    frozen: str | None


class EnsembleMember(TypedDict):
    """One of several teachers: its name, how it was adapted, its metric on validation, and its weight."""

    teacher: str
    adapt: str
    val: float
    weight: float


class EnsembleManifest(TypedDict):
    """ENSEMBLE.

    Attributes:
        members: the teachers, in order.
        val: the task's metric of their mean prediction on validation; ``scores`` has all metrics.
        embed_dim, patch_dim: those of the first teacher.
    """

    members: list[EnsembleMember]
    val: float
    scores: dict[str, float]
    embed_dim: int
    patch_dim: int | None


class HygieneManifest(TypedDict):
    """HYGIENE.

    Attributes:
        counts: numbers by kind of finding (`ktray.data.labelled.hygiene.counts`).
        torn: groups that are in more than one split, with these splits.
        checked: number of images that were compared.
    """

    counts: dict[str, int]
    torn: dict[str, list[str]]
    checked: int


class IndexClasses(TypedDict, total=False):
    """``classes``: class names, if the gallery is the labelled generic set."""

    classes: list[str]


class IndexManifest(IndexClasses):
    """INDEX.

    Attributes:
        search: the compressed index (`ktray.retrieval.faiss_index.Compressed`); None: exact search.
        rows: number of embeddings.
        folder: folder of the index, relative to the root of the store, or absolute.
        shards: (name, rows) of the parts of the index, in order.
        shard_count: number of shards of the source.
        images: number of usable images.
        cosine_to_float32: mean and least cosine similarity of some embeddings with those of a teacher in float32; None
            where the teacher computes in float32, or no shard was embedded.
    """

    search: dict[str, Any] | None
    rows: int
    folder: str
    shards: list[tuple[str, int]]
    shard_count: int
    images: int
    cosine_to_float32: list[float] | None


class OnTask(TypedDict):
    """How much of a retrieved transfer set belongs to the task.

    Attributes:
        floor: similarity floors, ascending; several where there are several kinds of queries, none if the labelled
            images do not give one. They are calibrated or given in the recipe.
        applied: whether images below the floor were left out.
        below: number of images below the floor in the set of the same strategy and size without a floor.
        curve: `ktray.retrieval.on_task.Judged.curve` of that set; None if it is empty.
        sets: `ktray.retrieval.on_task.Judged.figures` of the chosen set and of others of its size; ``random`` is last.
    """

    floor: list[float]
    applied: bool
    below: int
    curve: dict[str, Any] | None
    sets: list[dict[str, Any]]


class CurateFacts(TypedDict, total=False):
    """Entries of a transfer set that comes from a gallery: `ktray.retrieval.coverage` (None without queries), by
    strategy the share of the set that this strategy would also have chosen, and `OnTask` (None without queries; older
    manifests do not have it)."""

    coverage: dict[str, Any] | None
    agreement: dict[str, float]
    on_task: OnTask | None


class CurateManifest(CurateFacts):
    """CURATE.

    Attributes:
        kept: number of images in the transfer set.
        dropped: number of images that were left out, by reason.
        gallery: number of images to choose from.
        similar_kept: number of images whose embeddings are similar to that of a held-out image, and which were kept
            because their pixels differ.
    """

    kept: int
    dropped: dict[str, int]
    gallery: int
    similar_kept: int


class SuggestManifest(TypedDict):
    """SUGGEST.

    Attributes:
        suggested: number of images in the list.
        candidates: number of images that were ranked.
        images: number of whole images that were looked at, in the gallery or beyond the label budget.
        copies: number of images that were left out as labelled images or copies of them.
        repeated: number of images that were passed over because they show the same as one of a higher rank.
    """

    suggested: int
    candidates: int
    images: int
    copies: int
    repeated: int


class TargetSizes(TypedDict):
    """Sizes of the targets, as in `ktray.training.inputs.TargetSet`; 0 for a target that the rows do not have."""

    classes: int
    embed_dim: int
    patch_dim: int
    vocabulary: int
    text_length: int
    source_classes: int


class TeachManifest(TargetSizes):
    """TEACH.

    Attributes:
        mode: ``teach.mode``: whether the rows are stored, or computed during training.
        jpeg: JPEG quality of stored views; None: raw pixels.
        images: number of images in the transfer set.
        rows: number of views.
        row_bytes: size of one row in memory.
        targets: names of the targets in the rows.
        view_size: side of the views that the teacher reads, pixels.
        shards: [name, rows].
        cosine_to_float32: least cosine similarity of some stored targets with those of a teacher in float32; None where
            the teacher computes in float32, or no targets are stored.
    """

    mode: str
    jpeg: int | None
    images: int
    rows: int
    row_bytes: int
    targets: list[str]
    view_size: int
    shards: list[tuple[str, int]]
    cosine_to_float32: float | None


class WorkerStart(TypedDict):
    """A start of training: ``workers`` workers started at ``step``."""

    step: int
    workers: int


class TrainedManifest(TypedDict):
    """TRANSFER, FINETUNE and the scratch baseline.

    Attributes:
        steps, seconds: steps and duration of the training loop, over all attempts.
        best_step: the step after which validation was best.
        curve: one row for each evaluation (`ktray.training.loop.State`).
        images_per_second: mean over all attempts.
        flops_per_step: sum over all workers.
        precision: number format of the matrix products.
        compiled: how ``torch.compile`` was used, and why (`ktray.models.compilation`); empty: this training is never
            compiled.
        starts: the starts of workers in the last attempt.
    """

    steps: int
    seconds: float
    best_step: int
    curve: list[dict[str, float]]
    images_per_second: float
    flops_per_step: float
    precision: str
    compiled: str
    starts: list[WorkerStart]


class EvaluateDecisions(TypedDict, total=False):
    """``decisions``: by model, what `ktray.tasks.base.TaskKind.fit_decisions` has fitted on validation."""

    decisions: dict[str, dict[str, dict[str, float]]]


class EvaluateManifest(EvaluateDecisions):
    """EVALUATE. ``metrics``: by model (student, scratch, teacher), the metrics of the task kind on the test split."""

    metrics: dict[str, dict[str, Any]]


MANIFESTS: dict[str, type] = {
    "labels": LabelsManifest,
    "adapt": AdaptManifest,
    "ensemble": EnsembleManifest,
    "hygiene": HygieneManifest,
    "index": IndexManifest,
    "curate": CurateManifest,
    "suggest": SuggestManifest,
    "teach": TeachManifest,
    "transfer": TrainedManifest,
    "finetune": TrainedManifest,
    "scratch": TrainedManifest,
    "evaluate": EvaluateManifest,
}
