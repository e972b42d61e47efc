"""ADAPT: teach the target task to the teacher from the few labels.

Candidates: ``text`` (a head from class-name prompts), ``probe`` (the tower stays frozen, a head is trained on its
embeddings, started from the text head where there is one), ``finetune`` (tower and head). ``auto`` takes the
one that is best on validation. The temperature is fitted on validation too: a CLIP-like softmax is too flat to
teach with otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.preprocess import Preprocess
from ktray.distributed import watchdog
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.models.flops import count_flops
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.adapted_dense import load_adapted, save_candidate
from ktray.models.teacher.dense_head import fit_map_temperature
from ktray.models.teacher.heads import LinearHead, fit_temperature, probe_head, text_head
from ktray.models.teacher.spec import AdaptedSpec, TeacherSpec, embed_numpy, tower_flops
from ktray.objectives import build_objective
from ktray.stages import labels as labels_stage
from ktray.stages.adapt.dense import fit_heads, score_maps
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.stages.manifests import AdaptManifest
from ktray.stages.shard_summary import ShardSummary
from ktray.stages.teach.stage import view_policy
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Stage
from ktray.training.evaluation import class_scores
from ktray.training.loop import TrainerSettings
from ktray.training.programs import AdaptSpec

VERSION = 3  # 2: mean class accuracy, views keyed by image; 3: a head for the frozen embeddings is kept


def candidates(context: RunContext, spec: TeacherSpec) -> list[str]:
    """What is tried, in order. An objective that needs no predictions needs no adapted teacher: the probe costs nothing
    beyond the embeddings that retrieval needs, and leaves the tower as it is."""
    part = context.recipe.teacher
    if "logits" not in build_objective(context.recipe.objective).targets_needed:
        return ["probe"]
    wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
    if context.recipe.task.kind == "segmentation":
        # There is no text head of pixels.
        if wanted == ["text"]:
            raise KtrayError("teacher.adapt=text is for classification", "Set teacher.adapt=probe.")
        return [name for name in wanted if name != "text"]
    if wanted == ["text"] and not spec.has_text:
        raise KtrayError(f"Teacher '{spec.source.name}' has no text tower", "Set teacher.adapt=probe.")
    return [name for name in wanted if name != "text" or spec.has_text]


def run(context: RunContext, spec: TeacherSpec, max_failures: int) -> StageResult:
    """The adapted teacher (``adapted/``) and the frozen tower's embeddings of the labelled images."""
    wanted = candidates(context, spec)
    part, dense = context.recipe.teacher, context.recipe.task.kind == "segmentation"
    decoded = labels_stage.run(context, _preprocess(context, spec))
    metric = context.metric

    def work(stage: Stage, reporter: Reporter) -> AdaptManifest:
        plan = context.plan
        reporter.expect(len(context.task.train) + len(context.task.val))
        names = context.class_names if len(context.class_names) == len(context.task.classes) else context.task.classes
        given = (stage, decoded.stage, spec, context.task.classes)
        fit: Callable[[], dict[str, Any]] = (
            partial(fit_heads, *given, part.levels, plan.worker_threads)
            if dense
            else partial(_fit_heads, *given, names, context.prompts, wanted, metric, plan.worker_threads)
        )
        watchdog.waiting_for("the teacher's heads", f"{plan.actor_cpus:g} CPUs and {plan.actor_gpus:g} GPUs")
        who, remedy = "the task that fits the teacher's heads", "Take a smaller teacher, or machines with more memory."
        found = run_with_retries(fit, who, remedy, max_failures, cpus=plan.actor_cpus, gpus=plan.actor_gpus)
        reporter.shards([ShardSummary("heads", images=found["images"], flops=found["flops"])])
        if reporter.progress:
            reporter.progress.update(found["images"])
        scores: dict[str, dict[str, float]] = found["scores"]
        if "finetune" in wanted:
            scores["finetune"] = _finetune(context, stage, decoded, found["start"], reporter, max_failures)
        chosen = max((n for n in wanted), key=lambda n: (round(scores[n][metric], 9), -scores[n]["loss"]))
        for name in stage.children():
            if name.startswith("candidate-") and name not in (f"candidate-{chosen}", f"candidate-{found['start']}"):
                stage.delete(name)
        listed = ", ".join(f"{n} {scores[n][metric]:.1%}" for n in wanted)
        context.say(
            f"adapt     on validation: {listed}; takes {chosen}, temperature {scores[chosen]['temperature']:.3g}"
        )
        return {
            "chosen": chosen,
            "scores": scores,
            "val": scores[chosen][metric],
            "embed_dim": spec.embed_dim,
            "patch_dim": spec.patch_dim,
            "directory": f"candidate-{chosen}",
            "frozen": None if dense else f"candidate-{found['start']}",
        }

    finetuning = [part.finetune.model_dump(), context.recipe.seed, asdict(view_policy(context))]
    parts = [
        VERSION,
        decoded.key,
        spec.fingerprint,
        wanted,
        context.class_names,
        context.prompts,
        finetuning if "finetune" in wanted else None,
        metric,
        part.levels if dense else None,
    ]
    return run_stage(context, "adapt", parts, work)


def adapted(context: RunContext, done: StageResult, spec: TeacherSpec) -> AdaptedSpec:
    """The adapted teacher of an ADAPT directory; where a plan asks before it is made, the place of none."""
    return AdaptedSpec(done.stage.sub(done.manifest.get("directory", "unmade")), _preprocess(context, spec))


def _preprocess(context: RunContext, spec: TeacherSpec) -> Preprocess:
    """The teacher's own; for segmentation whole images are squashed, so that no pixel is left without a class."""
    if context.recipe.task.kind == "segmentation":
        return replace(spec.preprocess, resize_mode="squash", crop_pct=1.0)
    return spec.preprocess


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
        raise KtrayError(
            "This transfer.strategy asks the teacher for an image's class, and segmentation has none",
            "Set transfer.strategy=query_balanced, diverse or best_first.",
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


@dataclass(frozen=True)
class _Split:
    embedding: torch.Tensor
    label: torch.Tensor


def _fit_heads(
    stage: Stage,
    decoded: Stage,
    spec: TeacherSpec,
    classes: list[str],
    names: list[str],
    prompts: list[str],
    wanted: list[str],
    metric: str,
    threads: int,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    teacher = spec.load()
    data: dict[str, _Split] = {}
    images = 0
    for split in ("train", "val"):
        shards = [
            read_rows(decoded, n, ["uri", "pixels", "label"]) for n in decoded.names(".parquet") if n.startswith(split)
        ]
        pixels, label = np.concatenate([s["pixels"] for s in shards]), np.concatenate([s["label"] for s in shards])
        uri = np.concatenate([s["uri"] for s in shards]).astype(str)
        embedding = embed_numpy(teacher, pixels, 256)
        unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        write_rows(
            stage, f"embedding-{split}.parquet", {"uri": uri, "label": label, "embedding": unit.astype(np.float16)}
        )
        data[split] = _Split(torch.from_numpy(embedding), torch.from_numpy(label.astype(np.int64)))
        images += len(label)
    flops = tower_flops(teacher) * images
    heads: dict[str, LinearHead] = {}
    train, val = data["train"], data["val"]

    def fit() -> None:
        if teacher.has_text and ("text" in wanted or "probe" in wanted or "finetune" in wanted):
            heads["text"] = text_head(teacher, names, prompts)
        if "probe" in wanted or "finetune" in wanted:
            heads["probe"] = probe_head(
                train.embedding, train.label, len(classes), val=(val.embedding, val.label), start=heads.get("text")
            )

    flops += count_flops(fit)
    scores = {}
    for name, head in heads.items():
        raw = head(val.embedding).detach()
        temperature = fit_temperature(raw, val.label)
        scores[name] = {**_score(raw / temperature, val.label), "temperature": temperature}
        save_candidate(stage, name, AdaptedTeacher(teacher, head, classes, temperature))
    start = max(scores, key=lambda n: (scores[n][metric], -scores[n]["loss"]))
    return {"scores": scores, "start": start, "images": images, "flops": flops}


def _finetune(
    context: RunContext, stage: Stage, decoded: StageResult, start: str, reporter: Reporter, max_failures: int
) -> dict[str, float]:
    from ktray.distributed.mailbox import open_mailbox
    from ktray.training.ray_train import train

    part = context.recipe.teacher.finetune
    settings = TrainerSettings.of(part, warmup=0.1, clip=1.0, seed=context.recipe.seed, evals=5, keep="best")
    base = stage.sub(f"candidate-{start}")
    job = AdaptSpec(
        settings, base, labels_stage.labels_of(context, decoded), view_policy(context), part, context.metric
    )
    result: dict[str, float] = {}

    def finish(weights: Path) -> None:
        from safetensors.torch import load_file

        with base.local() as folder:
            teacher = load_adapted(folder)
        teacher.load_state_dict(load_file(str(weights)))
        teacher.finetuned = True
        pixels, label = labels_stage.labels_of(context, decoded).load("val", "pixels")
        with torch.inference_mode():
            raw = torch.cat([teacher.logits(pixels[i : i + 256]) for i in range(0, len(pixels), 256)])
        raw = raw * teacher.temperature
        fit, judge = (fit_map_temperature, score_maps) if label.ndim == 3 else (fit_temperature, _score)
        teacher.temperature = fit(raw, label)
        result.update(judge(raw / teacher.temperature, label), temperature=teacher.temperature)
        save_candidate(stage, "finetune", teacher)

    with open_mailbox(reporter.post) as board:
        train(
            job,
            stage,
            context.plan,
            board,
            max_failures=max_failures,
            on_weights=finish,
            resize_seconds=context.recipe.cluster.resize_seconds,
        )
    return result


def _score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    classes = logits.shape[1]
    right = torch.bincount(labels[logits.argmax(1) == labels], minlength=classes).double()
    found = class_scores(right, torch.bincount(labels, minlength=classes).double())
    return {**found, "loss": float(F.cross_entropy(logits, labels))}
