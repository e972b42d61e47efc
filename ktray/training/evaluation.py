"""Validation during training: exact counts over all ranks, and the score that chooses among weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ktray.reporting.heartbeat import beat
from ktray.tasks.base import TaskKind
from ktray.training.worker import WorkerContext

Evaluate = Callable[[nn.Module], tuple[float, dict[str, float]]]


def score(scores: dict[str, float], metric: str, loss: float) -> float:
    """The score that ranks models: the value of the metric; among equal values, a lower loss is better."""
    return scores[metric] - 1e-5 * min(loss, 50.0)


def fall(images: int) -> float:
    """The difference of a score (0..1) from which it has fallen, and not by chance: two standard errors of an accuracy
    of one half on that many images, and at least a point."""
    return max(0.01, 1 / max(1, images) ** 0.5)


def gathered(rows: torch.Tensor, total: int, env: WorkerContext) -> torch.Tensor:
    """The ``total`` rows of a split in their order, on every rank. Rank r has the rows r, r + world, r + 2 world, ...

    Args:
        rows: (n, ...), the rows of this rank; a rank without rows has one, which is left out.
    """
    if env.world == 1:
        return rows
    padded = rows.new_zeros(-(-total // env.world), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(env.world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def evaluator(
    kind: TaskKind,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    predict: Any,
    env: WorkerContext,
    metric: str,
    batch: int = 256,
) -> Evaluate:
    """A function model -> (score, {"val_loss", "val_<metric>"...}) over all rows, which are divided among the ranks.

    The counts of all ranks are summed before the scores are computed, or the outputs of all ranks are gathered (for a
    kind that is ``ranked``), so accuracy does not depend on the number of ranks.

    Args:
        kind: the task kind, which defines counts and scores.
        pixels: (N, 3, H, W) uint8, the whole validation split on every rank.
        labels: (N, ...), the targets.
        predict: (model, pixels on the device) -> the model's output (n, ...).
        metric: name of the score among the kind's scores.
        batch: number of images that are predicted together.
    """
    total, idle = len(labels), env.rank >= len(labels)
    # A rank without rows predicts the first row without counting it, so that the counts of all ranks have one shape.
    mine = slice(1) if idle else slice(env.rank, None, env.world)
    pixels, labels = pixels[mine], labels[mine]

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> tuple[float, dict[str, float]]:
        model.eval()
        sums: Any = 0.0
        outputs: list[torch.Tensor] = []
        for at in range(0, len(labels), batch):
            x, y = pixels[at : at + batch].to(env.device), labels[at : at + batch].to(env.device)
            if kind.ranked:
                outputs.append(predict(model, x).float())
            else:
                sums = sums + kind.tally(predict(model, x).float(), y) * (not idle)
            beat()
        if kind.ranked:
            whole = (gathered(rows, total, env) for rows in (torch.cat(outputs), labels.to(env.device)))
            sums = kind.tally(*whole)
        elif env.world > 1:
            dist.all_reduce(sums)
        scores = kind.scores(sums[:-2].cpu().numpy())
        loss = float(sums[-2] / sums[-1])
        return score(scores, metric, loss), {**{f"val_{k}": v for k, v in scores.items()}, "val_loss": loss}

    return evaluate


def uncompiled(evaluate: Evaluate) -> Evaluate:
    """The same evaluation, without the compiled form of the model: its batches have other sizes than those of training,
    and it would be compiled once more for each."""

    def eager(model: nn.Module) -> tuple[float, dict[str, float]]:
        with torch.compiler.set_stance("force_eager"):
            return evaluate(model)

    return eager
