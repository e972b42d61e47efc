"""TEACH: K replayable views of each image of the transfer set, and the targets that the objective needs for each view.

The targets of a teacher are its predictions or embeddings of exactly the view that the student will see; a caption or a
generic label is copied. ``teach.mode=cached`` stores the targets with the pixels of the view at the student's size, so
that training never decodes an original image again. Cached outputs are never transformed, and a sample of them is
compared with the live teacher's outputs before training uses them. In the other modes, only lists of images are stored,
and training computes the same rows from them. An objective that cuts its own views gets one whole image instead of K
views.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Annotated, Any, cast

from ktray.data.captions import tokenise
from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import cpu_shards, map_shards
from ktray.errors import KtrayError
from ktray.models.teacher.ensemble import EnsembleSpec
from ktray.models.teacher.spec import AdaptedSpec
from ktray.recipe.objective import TEACHER_TARGETS
from ktray.recipe.schema import TeachConfig
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.labels import canvas_preprocess
from ktray.stages.manifests import TargetSizes, TeachManifest
from ktray.stages.shard_summary import ShardSummary, finished_shards
from ktray.stages.speed_facts import teach_facts
from ktray.stages.teach.items import images_per_shard, shard_items
from ktray.stages.teach.shards import CheckedShard, CheckTargets, WithoutTeacher, WithTeacher, list_images, sample
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Predict
from ktray.targets.top_k import columns, per_prediction
from ktray.training.inputs import TargetSet

logger = logging.getLogger("ktray")

Targets = tuple[str, ...]


@dataclass
class TeachResult:
    """The result of TEACH, with what is needed to compute rows that are not stored."""

    done: StageResult
    cut: MakeViews
    predict: Predict | None
    mode: str

    @property
    def key(self) -> str:
        return self.done.key

    @property
    def images(self) -> int:
        """The number of images that training decodes itself."""
        return self.manifest["images"] if self.manifest["mode"] != "cached" else 0

    @property
    def manifest(self) -> TeachManifest:
        return cast(TeachManifest, self.done.manifest)

    def taught(self) -> TargetSet:
        """The complete TEACH stage as training reads it."""
        m = self.manifest
        mode = m["mode"]
        return TargetSet(
            self.done.stage,
            tuple((name, rows) for name, rows in m["shards"] if rows),
            m["row_bytes"],
            tuple(m["targets"]),
            mode,
            self.cut if mode != "cached" else None,
            self.predict if mode != "cached" else None,
            jpeg=mode == "cached" and m["jpeg"] is not None,
            embed_dim=m["embed_dim"],
            patch_dim=m["patch_dim"],
            vocabulary=m["vocabulary"],
            text_length=m["text_length"],
            source_classes=m["source_classes"],
            classes=m["classes"],
            views=self.cut.per_image,
            version=self.done.version,
        )


@dataclass(frozen=True)
class TeachInputs(StageInputs):
    """The inputs of TEACH.

    Attributes:
        adapt: the stage of the teacher, ADAPT or ENSEMBLE; None where the objective needs no teacher.
        targets: the targets that the objective needs for each view.
        cut: how views are cut; whole images for an objective that cuts its own views.
        student_size: side of the student's input, pixels.
        map_side: side of the student's last feature map, to which patch embeddings are resampled; 0 without them.
        classes: number of classes of the task.
        positions: number of predictions for a view, to estimate the size of a row that is not stored.
    """

    stage = "teach"
    # 2: view ids, captions, labels, patch embeddings, whole images; 3: modes, page checksums; 4: torch's resize;
    # 5: declared inputs; 6: images in random order
    version = 6

    curate: StageResult
    adapt: StageResult | None
    targets: Targets
    teach: TeachConfig
    cut: MakeViews
    student_size: int
    map_side: int
    classes: int
    positions: int
    predict: Annotated[Predict | None, NotInKey("it uses the teacher of ADAPT, at the sizes above")]
    teacher: Annotated[str | None, NotInKey("name of the teacher of `adapt`, for measured speeds")]

    @property
    def speed(self) -> dict[str, Any]:
        return teach_facts(self.teacher, self.cut.size, self.targets, self.teach.jpeg is not None)


def run(
    context: RunContext,
    curate: StageResult,
    adapt: StageResult | None,
    spec: AdaptedSpec | EnsembleSpec | None,
    student: Preprocess,
    map_side: int,
) -> TeachResult:
    """Store shards of ``uri``, ``view_index``, ``view_id``, ``view``, ``pixels`` and what the objective needs:
    ``logits`` (fp16, calibrated), ``embedding``, ``patch_embedding`` (fp16, not normalised), ``text`` (int32),
    ``label`` (int64).

    Args:
        adapt, spec: the stage ADAPT or ENSEMBLE and its teacher; None where the objective needs no teacher.
        student: the student's preprocessing.
        map_side: side of the student's last feature map, to which patch embeddings are resampled.
    """
    recipe, part = context.recipe, context.recipe.teach
    traits = recipe.objective.traits
    targets: Targets = tuple(sorted(traits.targets_needed))
    student_size = int(recipe.image_size or 0)
    view_size = max(student_size, *spec.preprocess.size) if spec else student_size
    canvas = canvas_preprocess(student, context.canvas) if traits.views == "canvas" else None
    map_side = map_side if "patch_embedding" in targets else 0
    teacher_targets = tuple(t for t in targets if t in TEACHER_TARGETS)
    relative = context.kind.matching.exclusive
    inputs = TeachInputs(
        curate=curate,
        adapt=adapt,
        targets=targets,
        teach=part,
        cut=MakeViews(view_policy(part), part.view_count, part.seed, view_size, recipe.data.max_pixels, canvas),
        student_size=student_size,
        map_side=map_side,
        classes=len(context.task.classes),
        positions=context.kind.positions(view_size),
        predict=Predict(spec, teacher_targets, student_size, map_side, top_k=int(part.top_k), relative=relative)
        if spec
        else None,
        teacher="+".join([str(recipe.teacher.name), *(o.name for o in recipe.teacher.others)]) if spec else None,
    )
    return TeachResult(run_stage(context.runtime, inputs, work), inputs.cut, inputs.predict, part.mode)


def work(inputs: TeachInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> TeachManifest:
    part, targets, cut = inputs.teach, inputs.targets, inputs.cut
    cached, view_size = part.mode == "cached", cut.size
    facts = inputs.adapt.manifest if inputs.adapt else {}
    wanted = [column for name, column in (("text", "caption"), ("label", "label")) if name in targets]
    table = read_rows(inputs.curate.stage, "transfer.parquet", ["uri", *wanted])
    uris = table["uri"].tolist()
    tokens, vocabulary = tokenise(table["caption"].tolist()) if "text" in targets else (None, 0)
    extra = {"text": tokens, "label": table.get("label")}
    per_shard = images_per_shard(len(uris), part.view_count, view_size)
    items = shard_items(uris, extra, per_shard, part.seed)
    rows, exact = (
        _store(inputs, runtime, stage, reporter, items) if cached else (list_images(stage, items, cut.per_image), None)
    )
    if not sum(rows.values()):
        raise KtrayError(
            "No image of the transfer set can be used",
            "Check gallery.data and the files that the quarantine list names.",
        )
    sizes: TargetSizes = {
        "classes": inputs.classes if part.top_k and "logits" in targets else 0,
        "embed_dim": int(facts.get("embed_dim", 0)) if "embedding" in targets else 0,
        "patch_dim": int(facts.get("patch_dim") or 0) if "patch_embedding" in targets else 0,
        "vocabulary": vocabulary,
        "text_length": tokens.shape[1] if tokens is not None else 0,
        "source_classes": int(table["label"].max()) + 1 if "label" in targets else 0,
    }
    logits = 0
    if "logits" in targets and cached:
        stored = columns(("logits",), int(part.top_k))
        first = read_rows(stage, next(name for name in rows if rows[name]), stored)
        logits = sum(math.prod(value.shape[1:]) * value.dtype.itemsize for value in first.values()) // 2
    elif "logits" in targets:  # an estimate for maps of predictions; it only sets the size of a window
        logits = per_prediction(inputs.classes, int(part.top_k)) * inputs.positions
    halves = logits + sizes["embed_dim"] + sizes["patch_dim"] * inputs.map_side**2
    side = cut.canvas.size[0] if cut.canvas else inputs.student_size
    if part.mode == "live":
        side, halves = view_size, 0
    halves += 2 * sizes["text_length"]
    return {
        "mode": part.mode,
        "jpeg": part.jpeg,
        "images": len(uris),
        "rows": sum(rows.values()),
        "row_bytes": 3 * side**2 + 2 * halves + 16,
        "targets": list(targets),
        "view_size": view_size,
        "shards": [(name, rows[name]) for name in sorted(rows)],
        "cosine_to_float32": exact,
        **sizes,
    }


def _store(
    inputs: TeachInputs, runtime: Runtime, stage: Stage, reporter: Reporter, items: list[Item]
) -> tuple[dict[str, int], float | None]:
    """Store all shards; returns the number of rows of each shard by name, and `TeachManifest.cosine_to_float32`."""
    exact = None
    cut, predict, jpeg = inputs.cut, inputs.predict, inputs.teach.jpeg
    reporter.expect(sum(len(item["uris"]) for item in items))
    finished = finished_shards(stage)
    before = reporter.shards(s.resumed() for s in finished.values())
    todo = [item for item in items if item["name"] not in finished]
    summaries = (
        map_shards(todo, cut, WithTeacher(stage, predict, jpeg), runtime.plan)
        if predict
        else cpu_shards(todo, WithoutTeacher(stage, cut, jpeg), runtime.plan)
    )
    rows = {s.name: s.rows for s in [*before, *reporter.shards(ShardSummary.each(summaries))]}
    if predict and any(rows.values()):
        checks = map_shards(sample(items, rows), cut, CheckTargets(stage, predict), runtime.plan)
        checked = reporter.shards(CheckedShard.each(checks))
        logger.info(
            f"teach     compared the stored targets of {sum(s.checked for s in checked)} views with the live teacher's "
            f"outputs: lowest cosine similarity {min(s.cosine for s in checked):.5f}"
        )
        exact = min((s.to_float32 for s in checked if s.to_float32 is not None), default=None)
        if exact is not None:
            logger.info(f"teach     lowest cosine similarity with those of a teacher in float32: {exact:.5f}")
    return rows, exact


def view_policy(part: TeachConfig) -> ViewPolicy:
    """The view policy of training."""
    return ViewPolicy(
        scale=(part.crop_min, 1.0),
        hflip=part.hflip,
        brightness=part.jitter,
        contrast=part.jitter,
        saturation=part.jitter,
    )
