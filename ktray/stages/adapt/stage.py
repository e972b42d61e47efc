"""ADAPT: adapt the teacher to the task with the labelled images.

The candidates are ``text`` (a head from prompts with the class names), ``probe`` (the tower stays frozen and a head is
trained on its embeddings, starting from the text head where there is one), ``finetune`` (tower and head are trained)
and ``lora`` (the head is trained together with products of low rank, which are then added to the tower's weights).
``auto`` chooses the best candidate on validation. The temperature is fitted on validation, too, because the softmax of
a CLIP-like teacher is too flat to learn from.
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
from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.models.device import device
from ktray.models.teacher.adapted import save_candidate
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.spec import AdaptedSpec, TeacherSpec, laid_out, tower_flops
from ktray.models.teacher.teacher import products_on
from ktray.recipe.choice import strategies
from ktray.recipe.teacher import TRAINED_TOWERS, TeacherFinetuneConfig, TeacherLoraConfig
from ktray.stages import labels as labels_stage
from ktray.stages.adapt.embed import embed_labels, pieces
from ktray.stages.adapt.heads import fit_heads
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import AddedLater, NotInKey, StageInputs
from ktray.stages.manifests import AdaptManifest
from ktray.stages.shard_summary import ShardSummary
from ktray.stages.teach.stage import view_policy
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage
from ktray.tasks.base import HeadSettings, task_kind
from ktray.training.adapt_program import AdaptSpec, predict_split
from ktray.training.loop import TrainerSettings

logger = logging.getLogger("ktray")

SCORES = "scores.json"  # the scores of a trained candidate, in its folder
TRAINED = "trained.safetensors"  # weights of a candidate that is not calibrated yet
TOWER_EVALS = 5  # validations of the training of a tower, after the first


@dataclass(frozen=True)
class AdaptInputs(StageInputs):
    """The inputs of ADAPT.

    Attributes:
        labels: the labelled images in the teacher's geometry.
        wanted: the candidates, in the order in which they are tried.
        names, prompts: the class names as text, and the templates for them.
        finetune, lora: settings of these candidates; None where they are not tried.
        views, seed: settings of the candidates that train the tower; None where none of them is tried.
        head: recipe values that only this task kind reads to fit its heads.
        products: number format of the teacher's matrix products.
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
    lora: TeacherLoraConfig | None
    views: ViewPolicy | None
    seed: int | None
    metric: str
    head: Any
    products: Annotated[str, AddedLater("fp32")]
    levels: Annotated[int, NotInKey("`head` contains it where the task kind reads it")]
    images: Annotated[int, NotInKey("the number of labelled images, for the progress line")]

    @classmethod
    def of(cls, context: RunContext, spec: TeacherSpec) -> AdaptInputs:
        recipe = context.recipe
        wanted = candidates(context, spec)
        tuned = any(name in wanted for name in TRAINED_TOWERS)
        return cls(
            labels=labels_stage.run(context, context.kind.teacher_preprocess(spec.preprocess)),
            teacher=spec,
            kind=recipe.task.kind,
            wanted=wanted,
            classes=context.task.classes,
            names=context.names,
            prompts=context.prompts,
            finetune=recipe.teacher.finetune if "finetune" in wanted else None,
            lora=recipe.teacher.lora if "lora" in wanted else None,
            views=view_policy(recipe.teach) if tuned else None,
            seed=recipe.seed if tuned else None,
            metric=context.metric,
            head=context.kind.head_key(recipe.teacher),
            products=products_on(context.plan.actor_gpus > 0),
            levels=recipe.teacher.levels,
            images=len(context.task.train) + len(context.task.val),
        )

    @property
    def speed(self) -> dict[str, Any]:
        return {"model": self.teacher.source.name, "size": self.teacher.preprocess.size[0], "tried": self.wanted}


def candidates(context: RunContext, spec: TeacherSpec) -> list[str]:
    """The candidates, in order. An objective that needs no predictions needs no adapted teacher. For it, only the probe
    is tried: the probe does not change the tower and costs no more than the embeddings that retrieval needs."""
    part = context.recipe.teacher
    if "logits" not in context.recipe.objective.traits.targets_needed:
        return ["probe"]
    return context.kind.candidates(part, spec.has_text)


def run(context: RunContext, spec: TeacherSpec) -> StageResult:
    """Store the adapted teacher and the embeddings of the labelled images by the frozen tower."""
    return run_stage(context.runtime, AdaptInputs.of(context, spec), work)


def work(inputs: AdaptInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> AdaptManifest:
    plan, spec, metric, wanted = runtime.plan, inputs.teacher, inputs.metric, inputs.wanted
    reporter.expect(inputs.images)
    kind, labels = task_kind(inputs.kind), labels_stage.labels_of(inputs.labels, inputs.kind)
    names: list[str] = inputs.labels.manifest["shards"]
    embed_labels(labels, spec, names, runtime, stage, reporter)
    heads = HeadSettings(inputs.classes, inputs.names, inputs.prompts, wanted, inputs.levels)
    fit = partial(fit_heads, stage, labels, names, spec, heads, metric, plan.worker_threads)
    watchdog.waiting_for("the teacher's heads", f"{plan.actor_cpus:g} CPUs and {plan.actor_gpus:g} GPUs")
    who, remedy = (
        "the task that fits the teacher's heads",
        "Choose a smaller teacher, or use machines with more memory.",
    )
    logger.info("adapt     the labelled images are embedded; fitting the heads of the teacher")
    with open_mailbox(reporter.post) as mailbox, reporter.task() as at:
        fitted = run_with_retries(
            fit,
            who,
            remedy,
            runtime.cluster.max_failures,
            cpus=plan.actor_cpus,
            gpus=plan.actor_gpus,
            at=at,
            mailbox=mailbox,
        )
    reporter.shards([ShardSummary("heads", flops=fitted["flops"])])
    scores: dict[str, dict[str, float]] = fitted["scores"]
    for name in TRAINED_TOWERS:
        if name in wanted:
            scores[name] = _train(name, inputs, runtime, stage, fitted["start"], reporter)
    pieces(stage).delete()
    chosen = max((n for n in wanted), key=lambda n: (round(scores[n][metric], 9), -scores[n]["loss"]))
    for name in stage.children():
        if name.startswith("candidate-") and name not in (f"candidate-{chosen}", f"candidate-{fitted['start']}"):
            stage.delete(name)
    listed = ", ".join(f"{n} {scores[n][metric]:.1%}" for n in wanted)
    logger.info(f"adapt     on validation: {listed}; chosen: {chosen}, temperature {scores[chosen]['temperature']:.3g}")
    return {
        "chosen": chosen,
        "scores": scores,
        "val": scores[chosen][metric],
        "embed_dim": spec.embed_dim,
        "patch_dim": spec.patch_dim,
        "directory": f"candidate-{chosen}",
        "frozen": f"candidate-{fitted['start']}" if kind.image_classes else None,
    }


def adapted(context: RunContext, done: StageResult, spec: TeacherSpec) -> AdaptedSpec:
    """The adapted teacher in the folder of an ADAPT stage. For a plan, the stage may not exist yet; then the folder
    does not exist either."""
    folder, kind = done.stage.sub(done.manifest.get("directory", "unmade")), context.kind
    return AdaptedSpec(folder, kind.teacher_preprocess(spec.preprocess), kind.teacher_form, spec.source)


def train_embeddings(done: StageResult) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The queries: unit embeddings (N, D) float32 of the labelled images by the frozen tower, their uris and labels."""
    rows = read_rows(done.stage, "embedding-train.parquet")
    return rows["embedding"].astype(np.float32), [str(u) for u in rows["uri"]], rows["label"]


def train_classes(done: StageResult) -> np.ndarray | None:
    """(N, C) uint8, the classes of each labelled image: 1 for each class of its set; None if images have no sets of
    classes."""
    return read_rows(done.stage, "embedding-train.parquet").get("classes")


def frozen_predictions(done: StageResult) -> Callable[[np.ndarray], np.ndarray]:
    """A function from unit embeddings (N, D) of the frozen tower to class probabilities (N, C) float32, by the best
    head on the frozen tower. It predicts the classes of gallery images without embedding them again.

    Raises:
        KtrayError: the task has no such head.
    """
    from safetensors.torch import load

    if not done.manifest["frozen"]:
        alternatives = [config.strategy_name() for config in strategies() if not config.needs_predictions]
        raise KtrayError(
            "This transfer.strategy needs a class for each image, and this task kind has no classes of images",
            f"Set transfer.strategy to one of: {', '.join(alternatives)}.",
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


def _train(
    name: str, inputs: AdaptInputs, runtime: Runtime, stage: Stage, start: str, reporter: Reporter
) -> dict[str, float]:
    """Train the candidate ``name``, store it and return its scores."""
    from ktray.training.ray_train import train

    part, views = getattr(inputs, name), inputs.views
    assert part is not None  # set whenever the candidate is tried
    assert views is not None
    done = f"candidate-{name}/{SCORES}"
    if stage.exists(done):  # by an attempt that was interrupted later, in the training of another candidate
        return dict(stage.read_json(done))
    settings = TrainerSettings.of(
        part, warmup=0.1, clip=1.0, seed=int(inputs.seed or 0), evals=TOWER_EVALS, keep="best"
    )
    base = stage.sub(f"candidate-{start}")
    labels = labels_stage.labels_of(inputs.labels, inputs.kind)
    job = AdaptSpec(settings, base, labels, views, part, inputs.metric)
    plan, result = runtime.plan, dict[str, float]()

    def finish(weights: Path) -> None:
        stage.write(TRAINED, weights.read_bytes())
        with reporter.task() as at:
            calibrated = run_with_retries(
                partial(_calibrate, job, stage, name),
                "the task that calibrates the teacher",
                "Choose a smaller teacher, or use machines with more memory.",
                runtime.cluster.max_failures,
                cpus=plan.actor_cpus,
                gpus=plan.actor_gpus,
                at=at,
                mailbox=board,
            )
        result.update(calibrated["scores"])
        reporter.shards([ShardSummary(f"calibrate-{name}", images=calibrated["images"], flops=calibrated["flops"])])
        stage.delete(TRAINED)
        stage.write_json(done, result)

    # Each candidate has checkpoints of its own, so that none resumes from those of another.
    home = stage if name == "finetune" else Stage(stage.sub(f"training-{name}").uri)
    with open_mailbox(reporter.post) as board:
        train(
            job,
            home,
            runtime.plan,
            board,
            max_failures=runtime.cluster.max_failures,
            on_weights=finish,
            resize_seconds=runtime.cluster.resize_seconds,
        )
    if home is not stage:
        home.delete()
    return result


def _calibrate(job: AdaptSpec, stage: Stage, name: str) -> dict[str, Any]:
    """Store the trained candidate with its temperature. Returns its ``scores``, and the work as ``images`` and
    ``flops``."""
    from safetensors.torch import load_file

    labels = job.labels
    with job.start.local() as folder:
        teacher = labels.kind.teacher_form.load(folder)
    job.prepare(teacher)
    with stage.local(TRAINED) as weights:
        teacher.load_state_dict(load_file(str(weights)))
    job.complete(teacher)
    laid_out(teacher.to(device()))
    outputs, label = predict_split(teacher, labels, "val")
    teacher.temperature, scores = labels.kind.calibrate(outputs * teacher.temperature, label)
    save_candidate(stage, name, teacher.cpu())
    return {
        "scores": {**scores, "temperature": teacher.temperature},
        "images": len(label),
        "flops": tower_flops(teacher) * len(label),
    }
