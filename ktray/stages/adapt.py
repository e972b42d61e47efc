"""ADAPT: teach the target task to the teacher from the few labels.

Candidates: ``text`` (a head from class-name prompts), ``probe`` (the tower stays frozen, a head is trained on its
embeddings, started from the text head where there is one), ``finetune`` (tower and head). ``auto`` takes the
one that is best on validation. The temperature is fitted on validation too: a CLIP-like softmax is too flat to
teach with otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ktray.errors import KtrayError
from ktray.models.adapted import AdaptedTeacher
from ktray.models.flops import count_flops
from ktray.models.heads import LinearHead, fit_temperature, probe_head, text_head
from ktray.objectives import build_objective
from ktray.stages import labels as labels_stage
from ktray.stages.base import Context, Done, Reporter, run_stage
from ktray.stages.teach import view_policy
from ktray.stages.teachers import AdaptedSpec, TeacherSpec, embed_numpy, tower_flops
from ktray.store import Stage
from ktray.streaming import read_rows, write_rows
from ktray.training.jobs import AdaptJob, Labels
from ktray.training.loop import Settings

VERSION = 1


def candidates(context: Context, spec: TeacherSpec) -> list[str]:
    """What is tried, in order. An objective that needs no predictions needs no adapted teacher: the probe costs nothing
    beyond the embeddings that retrieval needs, and leaves the tower as it is."""
    part = context.recipe.teacher
    if "logits" not in build_objective(context.recipe.objective).targets_needed:
        return ["probe"]
    wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
    if wanted == ["text"] and not spec.has_text:
        raise KtrayError(f"Teacher '{spec.source.name}' has no text tower", "Set teacher.adapt=probe.")
    return [name for name in wanted if name != "text" or spec.has_text]


def run(context: Context, spec: TeacherSpec, max_failures: int) -> Done:
    """The adapted teacher (``adapted/``) and the frozen tower's embeddings of the labelled images."""
    wanted = candidates(context, spec)
    decoded = labels_stage.run(context, spec.preprocess)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        import ray

        plan = context.plan
        reporter.expect(len(context.task.train) + len(context.task.val))
        names = context.class_names if len(context.class_names) == len(context.task.classes) else context.task.classes
        heads = ray.remote(num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus)(_fit_heads)
        found: dict[str, Any] = ray.get(
            heads.remote(
                stage, decoded.stage, spec, context.task.classes, names, context.prompts, wanted, plan.actor_threads
            )
        )
        reporter.shards([{"read": 0, "images": found["images"], "flops": found["flops"]}])
        if reporter.progress:
            reporter.progress.update(found["images"])
        scores: dict[str, dict[str, float]] = found["scores"]
        if "finetune" in wanted:
            scores["finetune"] = _finetune(context, stage, decoded, found["start"], reporter, max_failures)
        chosen = max((n for n in wanted), key=lambda n: (round(scores[n]["top1"], 9), -scores[n]["loss"]))
        for name in stage.children():
            if name.startswith("candidate-") and name != f"candidate-{chosen}":
                stage.delete(name)
        listed = ", ".join(f"{n} {scores[n]['top1']:.1%}" for n in wanted)
        context.say(
            f"adapt     on validation: {listed}; takes {chosen}, temperature {scores[chosen]['temperature']:.3g}"
        )
        return {
            "chosen": chosen,
            "scores": scores,
            "val": scores[chosen]["top1"],
            "embed_dim": spec.embed_dim,
            "directory": f"candidate-{chosen}",
        }

    part = context.recipe.teacher
    finetuning = [part.finetune.model_dump(), context.recipe.seed, context.recipe.teach.model_dump()]
    parts = [
        VERSION,
        decoded.key,
        spec.fingerprint,
        wanted,
        context.class_names,
        context.prompts,
        finetuning if "finetune" in wanted else None,
    ]
    return run_stage(context, "adapt", parts, work)


def adapted(done: Done, spec: TeacherSpec) -> AdaptedSpec:
    """The adapted teacher of an ADAPT directory; where a plan asks before it is made, the place of none."""
    return AdaptedSpec(done.stage.sub(done.manifest.get("directory", "unmade")), spec.preprocess)


def train_embeddings(done: Done) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Unit embeddings (N, D) float32 by the frozen tower, uris and labels of the labelled images: the queries."""
    rows = read_rows(done.stage, "embedding-train.parquet")
    return rows["embedding"].astype(np.float32), [str(u) for u in rows["uri"]], rows["label"]


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
        _save(stage, f"candidate-{name}", AdaptedTeacher(teacher, head, classes, temperature))
    start = max(scores, key=lambda n: (scores[n]["top1"], -scores[n]["loss"]))
    return {"scores": scores, "start": start, "images": images, "flops": flops}


def _finetune(
    context: Context, stage: Stage, decoded: Done, start: str, reporter: Reporter, max_failures: int
) -> dict[str, float]:
    from ktray.board import watch
    from ktray.training.shell import train

    part = context.recipe.teacher.finetune
    settings = Settings(
        steps=part.steps,
        lr=part.lr,
        weight_decay=part.weight_decay,
        warmup=0.1,
        ema=part.ema,
        clip=1.0,
        seed=context.recipe.seed,
        evals=5,
        keep="best",
    )
    base = stage.sub(f"candidate-{start}")
    job = AdaptJob(settings, base, Labels(decoded.stage), view_policy(context), part)
    result: dict[str, float] = {}

    def finish(weights: Path) -> None:
        from safetensors.torch import load_file

        with base.local() as folder:
            teacher = AdaptedTeacher.load(folder)
        teacher.load_state_dict(load_file(str(weights)))
        teacher.finetuned = True
        pixels, label = Labels(decoded.stage).load("val", "pixels")
        with torch.inference_mode():
            raw = torch.cat([teacher.logits(pixels[i : i + 256]) for i in range(0, len(pixels), 256)])
        raw = raw * teacher.temperature
        teacher.temperature = fit_temperature(raw, label)
        result.update(_score(raw / teacher.temperature, label), temperature=teacher.temperature)
        _save(stage, "candidate-finetune", teacher)

    with watch(reporter.post) as board:
        train(job, stage, context.plan, board, max_failures=max_failures, on_weights=finish)
    return result


def _score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return {
        "top1": float((logits.argmax(1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }


def _save(stage: Stage, name: str, teacher: AdaptedTeacher) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
        teacher.save(folder)
        stage.put(Path(folder), name)
