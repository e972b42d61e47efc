"""Decisions about how a student is computed, which a store keeps: they are measured, and another measurement could
decide otherwise.

The first decision in a store for a kind of device is used for every rank, restart and seed, so that runs differ only by
their recipes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ktray.accounting.device import cpu_model
from ktray.models.compilation import Compilation, Mode, choose_compilation
from ktray.models.precision import Precision, choose_precision
from ktray.recipe.schema import TrainConfig
from ktray.recipe.section import digest
from ktray.storage.store import Dir
from ktray.training.inputs import StudentSpec
from ktray.training.worker import WorkerContext


def settle_precision(
    directory: Dir, spec: StudentSpec, model: nn.Module, env: WorkerContext, rows: int, requested: Any
) -> Precision:
    """Choose the number format and memory layout of the student's training, and apply the layout to the model.

    Args:
        directory: the directory of the store where decisions are kept.
        rows: number of rows of a virtual rank in a step.
        requested: the precision in the recipe.
    """
    size, (batch, world) = spec.image_size, _batch(env, rows)
    facts = [spec.name, spec.kwargs, size, batch, world, *_machine(env), requested]

    def measure() -> dict[str, Any]:
        return choose_precision(model, env.device, size, batch, train=True, precision=requested).to_dict()

    chosen = Precision.from_dict(_settled(directory, facts, env, measure))
    chosen.apply(model)
    return chosen


def settle_compilation(
    directory: Dir,
    spec: StudentSpec,
    model: nn.Module,
    precision: Precision,
    env: WorkerContext,
    rows: int,
    steps: int,
    part: TrainConfig,
    more: Sequence[Any] = (),
) -> Compilation:
    """Choose whether the student is compiled; `Compilation.apply` does it.

    Args:
        directory, rows: as for `settle_precision`.
        precision: the decision of `settle_precision`.
        steps: optimizer steps of the training.
        part: the recipe's section ``train``.
        more: what else the compiled kernels depend on, such as the name of the objective.
    """
    if part.compile != "auto":
        mode: Mode | None = "reduce-overhead" if part.compile == "graphs" else "default" if part.compile else None
        return Compilation(mode, f"train.compile={str(part.compile).lower()}")
    if env.device.type != "cuda":
        return Compilation(None, "not on a GPU")
    size, (batch, world) = spec.image_size, _batch(env, rows)
    own = [spec.name, spec.kwargs, size, batch, world, *_machine(env), steps, part.accumulate, *more]
    facts = ["compile", torch.__version__, precision.to_dict(), *own]

    def measure() -> dict[str, Any]:
        passes = batch // part.accumulate, steps * part.accumulate
        return choose_compilation(model, precision, env.device, size, *passes).to_dict()

    return Compilation.from_dict(_settled(directory, facts, env, measure))


def _batch(env: WorkerContext, rows: int) -> tuple[int, int]:
    """The batch of a worker when there are the most workers, so that a decision does not depend on their number, and
    this number."""
    world = env.span[1] if env.span else env.world
    return rows * -(-env.rank_count // world), world


def _machine(env: WorkerContext) -> tuple[str, str]:
    kind = env.device.type
    return kind, torch.cuda.get_device_name(env.device) if kind == "cuda" else cpu_model()


def _settled(
    directory: Dir, facts: list[Any], env: WorkerContext, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The stored decision for the facts. Rank 0 makes it if there is none; a failed one is not stored."""
    name = f"{digest(facts)}.json"
    decision: list[Any] = [None]
    if env.rank == 0:
        measured = {} if directory.exists(name) else measure()
        if measured and not measured.get("failed"):
            directory.create(name, json.dumps(measured).encode())  # has no effect if another job was first
        decision = [measured if measured.get("failed") else directory.read_json(name)]
    if env.world > 1:
        dist.broadcast_object_list(decision, 0)
    found: dict[str, Any] = decision[0]
    return found
