"""ADAPT: teach the target task to the teacher from the few labels.

Candidates: ``text`` (a head from class-name prompts), ``probe`` (the tower stays frozen, a head is trained on its
embeddings, started from the text head where there is one), ``finetune`` (tower and head). ``auto`` takes the
one that is best on validation. The temperature is fitted on validation too: a CLIP-like softmax is too flat to
teach with otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from ktray.data.views import ViewPolicy
from ktray.distributed import watchdog
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.models.teacher.adapted import save_candidate
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.spec import AdaptedSpec, TeacherSpec
from ktray.recipe.choice import strategies
from ktray.recipe.schema import TeacherFinetuneConfig
from ktray.stages import labels as labels_stage
from ktray.stages.adapt.heads import fit_heads
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.manifests import AdaptManifest
from ktray.stages.shard_summary import ShardSummary
from ktray.stages.teach.stage import view_policy
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage
from ktray.tasks.base import HeadSettings, task_kind
from ktray.training.loop import TrainerSettings
from ktray.training.programs import AdaptSpec

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class AdaptInputs(StageInputs):
    """What ADAPT reads.

    Attributes:
        labels: the labelled images in the teacher's geometry.
        wanted: candidates, in the order in which they are tried.
        names, prompts: the classes as text, and the templates they are put into.
        finetune, views, seed: of the candidate ``finetune``; None where it is not tried.
        head: what fitting the heads of this task kind reads of the recipe, and no other kind's does.
    """

    stage = "adapt"
    # 2: mean class accuracy, views keyed by image; 3: a head for the frozen embeddings is kept; 4: declared inputs
    version = 4

    labels: StageResult
    teacher: TeacherSpec
    kind: str
    wanted: list[str]
    classes: list[str]
    names: list[str]
    prompts: list[str]
    finetune: TeacherFinetuneConfig | None
    views: ViewPolicy | None
    seed: int | None
    metric: str
    head: Any
    levels: Annotated[int, NotInKey("`head` has it where the task kind reads it")]
    images: Annotated[int, NotInKey("how many are labelled, for the progress line")]

    @classmethod
    def of(cls, context: RunContext, spec: TeacherSpec) -> AdaptInputs:
        recipe = context.recipe
        wanted = candidates(context, spec)
        tuned = "finetune" in wanted
        return cls(
            labels=labels_stage.run(context, context.kind.teacher_preprocess(spec.preprocess)),
            teacher=spec,
            kind=recipe.task.kind,
            wanted=wanted,
            classes=context.task.classes,
            names=context.names,
            prompts=context.prompts,
            finetune=recipe.teacher.finetune if tuned else None,
            views=view_policy(recipe.teach) if tuned else None,
            seed=recipe.seed if tuned else None,
            metric=context.metric,
            head=context.kind.head_key(recipe.teacher),
            levels=recipe.teacher.levels,
            images=len(context.task.train) + len(context.task.val),
        )


def candidates(context: RunContext, spec: TeacherSpec) -> list[str]:
    """What is tried, in order. An objective that needs no predictions needs no adapted teacher: the probe costs nothing
    beyond the embeddings that retrieval needs, and leaves the tower as it is."""
    part = context.recipe.teacher
    if "logits" not in context.recipe.objective.traits.targets_needed:
        return ["probe"]
    return context.kind.candidates(part, spec.has_text)


def run(context: RunContext, spec: TeacherSpec) -> StageResult:
    """The adapted teacher (``adapted/``) and the frozen tower's embeddings of the labelled images."""
    return run_stage(context.runtime, AdaptInputs.of(context, spec), work)


def work(inputs: AdaptInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> AdaptManifest:
    plan, spec, metric, wanted = runtime.plan, inputs.teacher, inputs.metric, inputs.wanted
    reporter.expect(inputs.images)
    kind = task_kind(inputs.kind)
    heads = HeadSettings(inputs.classes, inputs.names, inputs.prompts, wanted, inputs.levels)
    fit = partial(fit_heads, stage, inputs.labels.stage, spec, kind, heads, metric, plan.worker_threads)
    watchdog.waiting_for("the teacher's heads", f"{plan.actor_cpus:g} CPUs and {plan.actor_gpus:g} GPUs")
    who, remedy = "the task that fits the teacher's heads", "Take a smaller teacher, or machines with more memory."
    found = run_with_retries(fit, who, remedy, runtime.cluster.max_failures, cpus=plan.actor_cpus, gpus=plan.actor_gpus)
    reporter.shards([ShardSummary("heads", images=found["images"], flops=found["flops"])])
    if reporter.progress:
        reporter.progress.update(found["images"])
    scores: dict[str, dict[str, float]] = found["scores"]
    if "finetune" in wanted:
        scores["finetune"] = _finetune(inputs, runtime, stage, found["start"], reporter)
    chosen = max((n for n in wanted), key=lambda n: (round(scores[n][metric], 9), -scores[n]["loss"]))
    for name in stage.children():
        if name.startswith("candidate-") and name not in (f"candidate-{chosen}", f"candidate-{found['start']}"):
            stage.delete(name)
    listed = ", ".join(f"{n} {scores[n][metric]:.1%}" for n in wanted)
    logger.info(f"adapt     on validation: {listed}; takes {chosen}, temperature {scores[chosen]['temperature']:.3g}")
    return {
        "chosen": chosen,
        "scores": scores,
        "val": scores[chosen][metric],
        "embed_dim": spec.embed_dim,
        "patch_dim": spec.patch_dim,
        "directory": f"candidate-{chosen}",
        "frozen": f"candidate-{found['start']}" if kind.image_classes else None,
    }


def adapted(context: RunContext, done: StageResult, spec: TeacherSpec) -> AdaptedSpec:
    """The adapted teacher of an ADAPT directory; where a plan asks before it is made, the place of none."""
    folder, kind = done.stage.sub(done.manifest.get("directory", "unmade")), context.kind
    return AdaptedSpec(folder, kind.teacher_preprocess(spec.preprocess), kind.teacher_form)


def train_embeddings(done: StageResult) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Unit embeddings (N, D) float32 by the frozen tower, uris and labels of the labelled images: the queries."""
    rows = read_rows(done.stage, "embedding-train.parquet")
    return rows["embedding"].astype(np.float32), [str(u) for u in rows["uri"]], rows["label"]


def frozen_predictions(done: StageResult) -> Callable[[np.ndarray], np.ndarray]:
    """Class probabilities (N, C) float32 of unit embeddings (N, D) by the frozen tower, under the best of the heads
    that leave the tower as it is: what can be said of gallery images without embedding them again.

    Raises:
        KtrayError: a task that has no such head.
    """
    from safetensors.torch import load

    if not done.manifest["frozen"]:
        able = [config.strategy_name() for config in strategies() if not config.needs_predictions]
        raise KtrayError(
            "This transfer.strategy asks the teacher for an image's class, and this task kind has none",
            f"Set transfer.strategy to one of: {', '.join(able)}.",
        )
    folder = done.stage.sub(done.manifest["frozen"])
    weights = load(folder.read("head.safetensors"))
    head = LinearHead(weights["weight"], weights["bias"])
    temperature = float(folder.read_json("adapted.json")["temperature"])

    @torch.inference_mode()
    def predict(embedding: np.ndarray) -> np.ndarray:
        logits = head(torch.from_numpy(embedding.astype(np.float32))) / temperature
        return logits.softmax(1).numpy()

    return predict


def _finetune(inputs: AdaptInputs, runtime: Runtime, stage: Stage, start: str, reporter: Reporter) -> dict[str, float]:
    from ktray.distributed.mailbox import open_mailbox
    from ktray.training.ray_train import train

    part, views = inputs.finetune, inputs.views
    assert part is not None  # asked for with the candidate
    assert views is not None
    settings = TrainerSettings.of(part, warmup=0.1, clip=1.0, seed=int(inputs.seed or 0), evals=5, keep="best")
    base = stage.sub(f"candidate-{start}")
    labels = labels_stage.labels_of(inputs.labels, inputs.kind)
    job = AdaptSpec(settings, base, labels, views, part, inputs.metric)
    result: dict[str, float] = {}

    def finish(weights: Path) -> None:
        from safetensors.torch import load_file

        with base.local() as folder:
            teacher = labels.kind.teacher_form.load(folder)
        teacher.load_state_dict(load_file(str(weights)))
        teacher.finetuned = True
        pixels, label = labels.load("val", "pixels")
        with torch.inference_mode():
            raw = torch.cat([teacher.logits(pixels[i : i + 256]) for i in range(0, len(pixels), 256)])
        teacher.temperature, scores = labels.kind.calibrate(raw * teacher.temperature, label)
        result.update(scores, temperature=teacher.temperature)
        save_candidate(stage, "finetune", teacher)

    with open_mailbox(reporter.post) as board:
        train(
            job,
            stage,
            runtime.plan,
            board,
            max_failures=runtime.cluster.max_failures,
            on_weights=finish,
            resize_seconds=runtime.cluster.resize_seconds,
        )
    return result
