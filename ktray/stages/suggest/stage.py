"""SUGGEST: rank unlabelled images for labelling, by coverage in the teacher's probability space and, with a student, by
the disagreement of student and teacher (`ktray.retrieval.suggest`).

The teacher's predictions are those of its best head on the frozen tower, so that images whose embeddings INDEX has
stored are not embedded again. Images that show the same as a labelled image or as one of a higher rank are passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ktray.data.fingerprints import Fingerprints
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.retrieval.set_duplicates import SetDuplicates
from ktray.retrieval.suggest import disagreement, farthest_first
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.curate.heldout import heldout, recognisable
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.manifests import SuggestManifest
from ktray.stages.suggest.opinion import student_probabilities
from ktray.stages.suggest.pool import Pool, of_gallery, of_task
from ktray.storage.columns import write_rows
from ktray.storage.store import Stage
from ktray.tasks.students import StudentInFolder, load_student

logger = logging.getLogger("ktray")

LIST = "suggestions.parquet"
# Numbers of candidates above which a random draw is ranked: values of embeddings and probabilities in memory (400 MB in
# float32 each), and images that the student reads.
MOST_VALUES, MOST_READ = 100_000_000, 20_000
_NEVER = 2.0  # a cosine similarity that no pair reaches


@dataclass(frozen=True)
class SuggestInputs(StageInputs):
    """The inputs of SUGGEST.

    Attributes:
        count: number of images to suggest.
        adapt: the ADAPT stage, with the embeddings of the labelled images and a head for the frozen tower.
        encoder: the frozen teacher.
        index: the INDEX stage with embeddings; None: the candidates are the task's own unlabelled images.
        curate: the CURATE stage, which knows the gallery's copies of held-out images.
        dedup_similarity, repeat_similarity: see `ktray.recipe.schema.TransferConfig`.
        seed: draws the candidates where there are too many.
        student: `ktray.tasks.students.StudentInFolder.identity`; None: without a student.
    """

    stage = "suggest"
    version = 1

    count: int
    task: LabelledSet
    adapt: StageResult
    encoder: TeacherSpec
    index: StageResult | None
    curate: StageResult
    dedup_similarity: float
    repeat_similarity: float | None
    seed: int
    max_pixels: int
    student: str | None
    source: Annotated[StudentInFolder | None, NotInKey("`student` is a hash of the files in its folder")]

    @property
    def speed(self) -> dict[str, Any]:
        return {
            "model": self.encoder.source.name,
            "size": self.encoder.preprocess.size[0],
            "student": self.student is not None,
            "gallery": self.index is not None,
        }


def run(
    context: RunContext,
    adapt: StageResult,
    encoder: TeacherSpec,
    index: StageResult | None,
    curate: StageResult,
    student: StudentInFolder | None,
) -> StageResult:
    """Store ``suggestions.parquet``: ``uri``, ``suggested`` (the class that the teacher predicts), its ``probability``,
    ``distance`` and ``disagreement`` (NaN without a student), in the order of the ranks.

    Args:
        adapt, encoder, index, curate, student: see `SuggestInputs`.
    """
    recipe, part = context.recipe, context.recipe.transfer
    inputs = SuggestInputs(
        count=recipe.curate.suggest,
        task=context.task,
        adapt=adapt,
        encoder=encoder,
        index=index,
        curate=curate,
        dedup_similarity=part.dedup_similarity,
        repeat_similarity=part.repeat_similarity,
        seed=part.seed,
        max_pixels=recipe.data.max_pixels,
        student=student.identity() if student else None,
        source=student,
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: SuggestInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> SuggestManifest:
    classes = inputs.task.classes
    most = MOST_VALUES // max(inputs.encoder.embed_dim, len(classes))
    pool = _pool(inputs, min(most, MOST_READ) if inputs.source else most, runtime, stage, reporter)
    predict = adapt_stage.frozen_predictions(inputs.adapt)
    probabilities, labelled = predict(pool.embedding), predict(adapt_stage.train_embeddings(inputs.adapt)[0])
    differs = None
    if inputs.source:
        students = _students(inputs, inputs.source, pool, runtime, stage, reporter)
        read = np.array([i for i, uri in enumerate(pool.uris) if uri in students], dtype=np.int64)
        differs = np.full(len(pool), -1.0)  # below every weight: an image that cannot be read is not ranked
        opinions = np.array([students[pool.uris[i]] for i in read.tolist()]).reshape(len(read), len(classes))
        differs[read] = disagreement(probabilities[read], opinions)
    rows = np.arange(len(pool)) if differs is None else np.flatnonzero(differs >= 0)
    ranked = farthest_first(
        probabilities[rows],
        labelled,
        inputs.count,
        None if differs is None else differs[rows],
        _repeats(pool, rows, inputs.repeat_similarity),
    )
    best = rows[ranked.rows]
    logger.info(
        f"suggest   {len(best):,} of {len(rows):,} candidates, from {pool.images:,} unlabelled images; left out: "
        f"{pool.copies:,} labelled images and copies of them"
        + (f", {ranked.repeated:,} that show the same as a suggested one" if ranked.repeated else "")
    )
    write_rows(
        stage,
        LIST,
        {
            "uri": np.array([pool.uris[i] for i in best.tolist()], dtype=str),
            "suggested": np.array([classes[c] for c in probabilities[best].argmax(1).tolist()], dtype=str),
            "probability": probabilities[best].max(1).astype(np.float32),
            "distance": ranked.distance.astype(np.float32),
            "disagreement": (np.full(len(best), np.nan) if differs is None else differs[best]).astype(np.float32),
        },
    )
    return {
        "suggested": len(best),
        "candidates": len(rows),
        "images": pool.images,
        "copies": pool.copies,
        "repeated": ranked.repeated,
    }


def _pool(inputs: SuggestInputs, most: int, runtime: Runtime, stage: Stage, reporter: Reporter) -> Pool:
    """The candidates without copies of labelled images.

    Raises:
        KtrayError: there are none.
    """
    task, encoder, pixels = inputs.task, inputs.encoder, inputs.max_pixels
    folders = {name: Stage(stage.file(name)) for name in ("unlabelled", "labelled")}
    if inputs.index is not None:
        pool = of_gallery(inputs.index, inputs.curate, task, most, inputs.seed)
    else:
        pool = of_task(task, encoder, most, inputs.seed, pixels, runtime, folders["unlabelled"], reporter)
        if len(pool):  # no stage before this one has compared these images with the held-out ones
            kept_out = heldout(task, encoder, pixels, runtime, stage, reporter)
            pool = pool.without_copies(kept_out, inputs.dedup_similarity)
    if len(pool):
        train = [example.uri for example in task.train]
        known = recognisable(train, encoder, pixels, runtime, folders["labelled"], reporter)
        pool = pool.without_copies(known, inputs.dedup_similarity)
    if not len(pool):
        raise KtrayError(
            "There is no unlabelled image to suggest: the gallery, or without one the images beyond the label budget, "
            "has only labelled images and copies of them",
            "Set gallery.data to a folder with unlabelled images.",
        )
    return pool


def _students(
    inputs: SuggestInputs, source: StudentInFolder, pool: Pool, runtime: Runtime, stage: Stage, reporter: Reporter
) -> dict[str, np.ndarray]:
    with source.directory.local() as folder:
        preprocess = load_student(folder).preprocess
    place = Stage(stage.file("student"))
    return student_probabilities(pool.uris, source, preprocess, inputs.max_pixels, runtime, place, reporter)


def _repeats(pool: Pool, rows: np.ndarray, similarity: float | None) -> Callable[[int], bool]:
    """A function that takes a position in ``rows`` (rows of the pool), and returns whether its image shows the same as
    one of an earlier call. With None, only images with the same pixels show the same."""

    def look(of: np.ndarray) -> tuple[np.ndarray, Fingerprints]:
        return pool.embedding[of], Fingerprints(pool.prints.hash[of], pool.prints.digest[of])

    found = SetDuplicates(look, _NEVER if similarity is None else similarity)
    return lambda position: len(found(rows[position : position + 1])) > 0
