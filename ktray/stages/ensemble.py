"""ENSEMBLE: weights for several adapted teachers, by their predictions for the validation images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch

from ktray.distributed import watchdog
from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.retried_task import run_with_retries
from ktray.models.teacher.ensemble import FILE, EnsembleSpec, largest, mix, mixture_weights
from ktray.models.teacher.spec import AdaptedSpec, tower_flops
from ktray.stages import labels as labels_stage
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.manifests import EnsembleManifest, EnsembleMember
from ktray.stages.shard_summary import ShardSummary
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind
from ktray.training.adapt_program import predict_split

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class EnsembleInputs(StageInputs):
    """The inputs of ENSEMBLE.

    Attributes:
        adapts: the ADAPT stages of the teachers, in order.
        labels: the labelled images in the geometry of the teacher with the largest input.
        names: the names of the teachers, for the log.
        images: number of validation images, for the progress line.
    """

    stage = "ensemble"
    devices = "one"
    version = 1

    adapts: tuple[StageResult, ...]
    labels: StageResult
    kind: str
    metric: str
    members: Annotated[tuple[AdaptedSpec, ...], NotInKey("they are the results of the stages in `adapts`")]
    names: Annotated[tuple[str, ...], NotInKey("they are only shown")]
    images: Annotated[int, NotInKey("for the progress line")]


def run(
    context: RunContext, adapts: Sequence[StageResult], members: Sequence[AdaptedSpec], names: Sequence[str]
) -> tuple[StageResult, EnsembleSpec]:
    """Store ``ensemble.json`` with ``weights`` (in the order of the members) and ``temperature``.

    Args:
        adapts, members, names: the ADAPT stages, the adapted teachers and the names of the teachers, the first of which
            is the one that retrieves.
    """
    inputs = EnsembleInputs(
        adapts=tuple(adapts),
        labels=labels_stage.run(context, largest([member.preprocess for member in members])),
        kind=context.recipe.task.kind,
        metric=context.metric,
        members=tuple(members),
        names=tuple(names),
        images=len(context.task.val),
    )
    done = run_stage(context.runtime, inputs, work, ledger_name="adapt")
    return done, EnsembleSpec(done.stage, tuple(members))


def work(inputs: EnsembleInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> EnsembleManifest:
    plan, cluster = runtime.plan, runtime.cluster
    reporter.expect(inputs.images)
    watchdog.waiting_for("the teachers' predictions", f"{plan.actor_cpus:g} CPUs and {plan.actor_gpus:g} GPUs")
    with open_mailbox(reporter.post) as mailbox, reporter.task() as at:
        fitted = run_with_retries(
            partial(fit, inputs.labels, inputs.members, inputs.kind, plan.worker_threads),
            "the task that weights the teachers",
            "Use fewer teachers, or machines with more memory.",
            cluster.max_failures,
            cpus=plan.actor_cpus,
            gpus=plan.actor_gpus,
            at=at,
            mailbox=mailbox,
        )
    reporter.shards([ShardSummary("ensemble", images=fitted["images"], flops=fitted["flops"])])
    stage.write_json(FILE, {"weights": fitted["weights"], "temperature": fitted["temperature"]})
    first = inputs.adapts[0].manifest
    members: list[EnsembleMember] = [
        {"teacher": name, "adapt": done.manifest["chosen"], "val": scores[inputs.metric], "weight": weight}
        for name, done, scores, weight in zip(
            inputs.names, inputs.adapts, fitted["member_scores"], fitted["weights"], strict=True
        )
    ]
    shown = ", ".join(f"{m['teacher']} {m['val']:.1%} with weight {m['weight']:.2f}" for m in members)
    val = fitted["scores"][inputs.metric]
    logger.info(f"ensemble  on validation: {shown}; together {val:.1%}, temperature {fitted['temperature']:.3g}")
    return {
        "members": members,
        "val": val,
        "scores": fitted["scores"],
        "embed_dim": first["embed_dim"],
        "patch_dim": first["patch_dim"],
    }


def fit(labels: StageResult, members: Sequence[AdaptedSpec], kind_name: str, threads: int) -> dict[str, Any]:
    """Weights and temperature of the teachers, from their predictions for the validation images.

    Args:
        labels: the LABELS stage in the geometry of the teacher with the largest input.
        threads: number of threads of torch.
    """
    torch.set_num_threads(threads)
    kind = task_kind(kind_name)
    images = labels_stage.labels_of(labels, kind_name)
    outputs, scores, flops = [], [], 0.0
    for member in members:
        teacher = member.load()
        out, truth = predict_split(teacher, images, "val")
        outputs.append(out)
        scores.append(kind.scores(kind.tally(out, truth)[:-2].numpy()))
        flops += tower_flops(teacher) * len(truth)
    true = torch.stack([out.softmax(1)[torch.arange(len(truth)), truth] for out in outputs])
    weights = mixture_weights(true).tolist()
    temperature, judged = kind.calibrate(mix(outputs, weights), truth)
    return {
        "weights": weights,
        "temperature": temperature,
        "scores": judged,
        "member_scores": scores,
        "images": len(truth),
        "flops": flops,
    }
