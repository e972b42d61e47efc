"""Heads for sets of classes: a logistic regression for each class, or class names, and their calibration.

The probability of a class is the sigmoid of its logit, and does not depend on the other classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ktray.models.lean_calls import LBFGS
from ktray.models.teacher.heads import L2_GRID, LinearHead, Link, minimal_temperature, probe_head


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The binary cross-entropy of logits (N, C) and labels (N, C) in 0..1: summed over the classes, averaged over the
    rows, so that each class has the loss of a logistic regression of its own."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)) * logits.shape[1]


def fit_label_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T that minimises the binary cross-entropy of ``sigmoid(logits / T)``, one for all classes.

    If all logits have the right sign, the likelihood increases without bound as T decreases. In this case the labels
    are replaced by Platt's targets (Probabilistic Outputs for Support Vector Machines, 1999, section 2.2):
    ``(n1 + 1) / (n1 + 2)`` for the n1 labels that are 1, ``1 / (n0 + 2)`` for the n0 others.

    Args:
        logits: (N, C), of images that were not used to fit the head.
        labels: (N, C), 0 or 1.
    """
    z, y = logits.detach().double().cpu(), labels.double().cpu()
    if not z.numel():
        return 1.0
    if bool(((z > 0) == (y > 0.5)).all()):
        ones = float(y.sum())
        high, low = (ones + 1) / (ones + 2), 1 / (y.numel() - ones + 2)
        y = y * high + (1 - y) * low
    return minimal_temperature(lambda t: float(F.binary_cross_entropy_with_logits(z / t, y)))


CLASSES = Link(class_loss, fit_label_temperature)


def label_probe(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    l2: Sequence[float] = L2_GRID,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
    start: LinearHead | None = None,
) -> LinearHead:
    """A logistic regression for each class, all with the same strength of regularisation; see `probe_head`.

    Without ``start``, each class has ``C = 1 / (l2 * N)`` in scikit-learn's notation.

    Args:
        embeddings: (N, D), of any length.
        labels: (N, C), 0 or 1.
        val: embeddings and labels on which the strengths are compared.
    """
    return probe_head(embeddings, labels, labels.shape[1], l2, val=val, start=start, link=CLASSES)


def scaled_text_head(head: LinearHead, embeddings: torch.Tensor, labels: torch.Tensor) -> LinearHead:
    """A head from class names, with a scale and an offset that make sigmoids of its logits probabilities.

    The softmax of CLIP compares a class with the others; alone, its similarities are all positive. The scale and the
    offset are fitted to the labels and are the same for all classes (Platt, 1999, section 2), so that the order of the
    images by a class remains that of the class name.

    Args:
        head: the result of `ktray.models.teacher.heads.text_head`.
        embeddings: (N, D), of any length.
        labels: (N, C), 0 or 1.
    """
    with torch.no_grad():
        z = head(embeddings.detach()).double()
    centre, spread = z.mean(), z.std().clamp_min(1e-12)
    scale = torch.ones((), dtype=torch.float64, device=z.device, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, device=z.device, requires_grad=True)
    optimizer = LBFGS([scale, offset], max_iter=200, line_search_fn="strong_wolfe")
    y = labels.to(z)

    def closure() -> float:
        optimizer.zero_grad()
        # The small penalty keeps the scale finite where the classes are separable.
        logits = scale * (z - centre) / spread + offset
        loss = F.binary_cross_entropy_with_logits(logits, y) + 1e-6 * scale.square()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    factor = (scale / spread).detach()
    bias = (offset - factor * centre).detach().to(head.bias) + factor.to(head.bias) * head.bias
    return LinearHead(head.weight * factor.to(head.weight), bias.expand_as(head.bias))
