"""Several adapted teachers as one: the weighted mean of their calibrated class probabilities.

The weights maximise the likelihood of the validation labels. One temperature is fitted to the mean, because the mean of
calibrated predictions is less confident than it is right (Rahaman and Thiery, Uncertainty Quantification and Deep
Ensembles, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.spec import AdaptedSpec
from ktray.storage.store import Dir

FILE = "ensemble.json"
_ROUNDS, _CONVERGED = 500, 1e-7


def mixture_weights(probabilities: torch.Tensor) -> torch.Tensor:
    """The weights (M,) float64 of M teachers whose mixture has the largest likelihood, by expectation maximisation.

    Their sum is 1. One pseudo-count for each teacher keeps few labels from excluding a teacher.

    The update is w_m = (sum_n w_m p_mn / (sum_k w_k p_kn) + 1) / (N + M).

    Args:
        probabilities: (M, N) probability of the true class of each of N images by each teacher.
    """
    p = probabilities.double().clamp_min(1e-12)
    weights = torch.full((len(p),), 1 / len(p), dtype=torch.float64)
    for _ in range(_ROUNDS):
        shares = weights[:, None] * p
        updated = ((shares / shares.sum(0)).sum(1) + 1) / (p.shape[1] + len(p))
        moved = float((updated - weights).abs().max())
        weights = updated
        if moved < _CONVERGED:
            break
    return weights


def mix(logits: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Logarithm of the weighted mean of class probabilities, (N, C) float32.

    Args:
        logits: for each teacher, calibrated logits (N, C).
        weights: their weights, above 0, with the sum 1.
    """
    parts = torch.stack([part.float().log_softmax(1) for part in logits])
    return (parts + parts.new_tensor(weights).log()[:, None, None]).logsumexp(0)


class Ensemble(AdaptedTeacher):
    """Several adapted teachers for the same classes. Embeddings are those of the first.

    Args:
        members: the teachers, each of which resizes images to its own input.
        weights: their weights.
        temperature: divides the logarithm of the mean probabilities.
    """

    def __init__(self, members: Sequence[AdaptedTeacher], weights: Sequence[float], temperature: float = 1.0) -> None:
        nn.Module.__init__(self)
        first = members[0]
        self.parts = nn.ModuleList(members)
        self.weights, self.temperature = list(weights), temperature
        self.image_tower, self.classes, self.finetuned = first.image_tower, first.classes, first.finetuned
        self.embed_dim, self.patch_dim, self.source = first.embed_dim, first.patch_dim, first.source
        self.preprocess = largest([member.preprocess for member in members])

    @property
    def members(self) -> Sequence[AdaptedTeacher]:
        return list(self.parts)  # type: ignore[arg-type]

    def embed(self, batch: torch.Tensor) -> torch.Tensor:
        return self.members[0].embed(batch)

    def logits(self, batch: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        first = self.members[0].logits(batch, embedding)
        others = [member.logits(batch) for member in self.members[1:]]
        return mix([first, *others], self.weights) / self.temperature


def largest(geometries: Sequence[Preprocess]) -> Preprocess:
    """The preprocessing with the most pixels, the first of equal ones: in its views, every teacher sees enough."""
    return max(geometries, key=lambda preprocess: preprocess.size[0] * preprocess.size[1])


@dataclass(frozen=True)
class EnsembleSpec:
    """Description of several adapted teachers in the store; ``directory`` has their weights and the temperature."""

    directory: Dir
    members: tuple[AdaptedSpec, ...]

    @property
    def preprocess(self) -> Preprocess:
        return largest([member.preprocess for member in self.members])

    def load(self) -> Ensemble:
        facts = self.directory.read_json(FILE)
        return Ensemble([member.load() for member in self.members], facts["weights"], facts["temperature"])
