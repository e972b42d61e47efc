"""Matching of a student's predictions with a teacher's: the targets and the loss.

Each task kind names the matching for its predictions (`ktray.tasks.base.TaskKind.matching`); an objective that learns
from the teacher's predictions uses it. For a teacher's prediction ``t`` and a student's ``s`` of the same view,

    ClassMatching: loss = T^2 * KL(softmax(t / T) || softmax(s / T)),

averaged over the views (Hinton et al., arXiv 1503.02531, section 2). `MapMatching` applies the same loss at each
position: for a student's map ``s`` (N, C, h', w') and a teacher's ``t`` (N, C, h, w),

    loss = T^2 / (N h w) * sum over images n and positions p of KL(softmax(t_np / T) || softmax(s'_np / T)),

where ``s'`` is ``s`` resized bilinearly (half-pixel centres) to (h, w). The teacher's map is not resized: it is
stored in this size, and its probabilities may have been mixed (mixup). The resolution of TEACH sets that of the match.
`SetMatching` is for sets of classes: each class is a prediction of its own, and the loss of N images and C classes is

    loss = T^2 / (N C) * sum over images n and classes c of KL(Bernoulli(p_nc) || Bernoulli(q_nc)),
    KL(Bernoulli(p) || Bernoulli(q)) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),

with ``p = sigmoid(t / T)`` and ``q = sigmoid(s / T)``. It is the divergence of Hinton et al. for two outcomes, whose
logits differ by ``t`` and ``s``. The mean over classes makes it comparable with the binary cross-entropy of labels.
`ValueMatching` is for predicted numbers: the mean squared error, for any T.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class Matching(Protocol):
    """The matching of predictions. Instances must be picklable.

    Attributes:
        exclusive: whether a prediction is one of the classes, whose logits become probabilities by a softmax, so that
            only the differences between its logits matter.
    """

    exclusive: bool

    def targets(self, predictions: torch.Tensor, temperature: float) -> torch.Tensor:
        """The targets of the student, from a teacher's predictions as TEACH stores them, float32. Pairs of targets may
        be mixed linearly before they are matched."""
        ...

    def loss(self, student_out: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        """``loss``, a scalar, and detached scalars for the log. ``targets`` are the output of `targets`."""
        ...


class ClassMatching:
    """Matches class logits (N, C) by the divergence of their probabilities. ``agreement`` is the share of rows with the
    same most probable class."""

    exclusive = True

    def targets(self, predictions: torch.Tensor, temperature: float) -> torch.Tensor:
        return F.softmax(predictions / temperature, dim=1)

    def loss(self, student_out: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        log_q = F.log_softmax(student_out.float() / temperature, dim=1)
        kl = F.kl_div(log_q, targets, reduction="batchmean")
        agree = (student_out.detach().argmax(1) == targets.argmax(1)).float().mean()
        return {"loss": kl * temperature**2, "agreement": agree}


class MapMatching(ClassMatching):
    """Matches maps of logits, position by position."""

    def loss(self, student_out: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        return super().loss(*by_position(student_out, targets), temperature)


class SetMatching:
    """Matches the logits (N, C) of classes that do not exclude each other, class by class. ``agreement`` is the share
    of classes, over all rows, that both predictions give more than one half or both give less."""

    exclusive = False

    def targets(self, predictions: torch.Tensor, temperature: float) -> torch.Tensor:
        return torch.sigmoid(predictions / temperature)

    def loss(self, student_out: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        logits = student_out.float() / temperature
        entropy = torch.special.entr(targets) + torch.special.entr(1 - targets)
        kl = F.binary_cross_entropy_with_logits(logits, targets) - entropy.mean()
        agree = ((student_out.detach() > 0) == (targets > 0.5)).float().mean()
        return {"loss": kl * temperature**2, "agreement": agree}


class ValueMatching:
    """Matches predicted numbers (N, D) by their mean squared error."""

    exclusive = False

    def targets(self, predictions: torch.Tensor, temperature: float) -> torch.Tensor:
        return predictions

    def loss(self, student_out: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
        return {"loss": F.mse_loss(student_out.float(), targets)}


def by_position(student_out: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's map and its targets as rows, which are compared one by one.

    Args:
        student_out: (N, C, h', w').
        targets: (N, C, h, w), logits or probabilities.

    Returns:
        Two tensors (N h w, C): the student's map, resized to the size of the targets, and the targets.
    """
    from ktray.models.maps import resize_map  # slow to import, and every recipe loads this file

    resized = resize_map(student_out.float(), (targets.shape[2], targets.shape[3]))
    return _rows(resized), _rows(targets)


def _rows(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
