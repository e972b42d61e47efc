"""Heads on a teacher's embedding: fitted to labels or computed from class names, and calibrated.

A head is linear on the L2-normalised embedding, because CLIP-like models are trained on cosine similarities, and
because the same grid of regularisation strengths can be used for all teachers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ktray.errors import KtrayError
from ktray.models.lean_calls import LBFGS
from ktray.models.teacher.teacher import Teacher
from ktray.reporting.heartbeat import beat

L2_GRID: tuple[float, ...] = tuple(10.0**e for e in np.arange(-7, -0.9, 0.5))
DEFAULT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo that shows the {}.",
    "a close view of a {}.",
    "a small picture of a {}.",
    "a cropped image of the {}.",
    "an image of one {}.",
    "a drawing of a {}.",
)
_TEMPERATURES = (0.01, 100.0)
# Logits that are in memory at once, for thousands of rows with thousands of classes: 8 MB on a CPU, which its cache
# nearly holds; a GPU needs large pieces.
_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


class LinearHead(nn.Module):
    """``logits = weight @ (embedding / |embedding|) + bias``.

    Args:
        weight: (C, D).
        bias: (C,), zeros if None.

    Attributes:
        l2: chosen strength of the regularisation; None if the head was not fitted.
        scores: for each strength the negative log-likelihood on held-out embeddings, after fitting a temperature.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.bias = nn.Parameter(bias.detach().float().clone())
        self.l2: float | None = None
        self.scores: dict[float, float] = {}

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, D) of any length to logits (N, C)."""
        return F.linear(F.normalize(embedding, dim=-1), self.weight, self.bias)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Fitted = tuple[torch.Tensor, torch.Tensor]  # weight and bias of a head


@dataclass(frozen=True)
class Link:
    """How logits become probabilities of the labels.

    Attributes:
        loss: the negative log-likelihood of labels under logits (N, C), averaged over the rows.
        temperature: fits a temperature to logits and labels.
    """

    loss: Loss
    temperature: Callable[[torch.Tensor, torch.Tensor], float]


def probe_head(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    l2: Sequence[float] = L2_GRID,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
    start: LinearHead | None = None,
    seed: int = 0,
    link: Link | None = None,
) -> LinearHead:
    """Logistic regression on frozen embeddings, by full-batch L-BFGS in float64 (in float32 to compare strengths).

    It minimises ``mean loss + l2 / 2 * |W - W0|^2``, where the loss is the cross-entropy (multinomial regression) or
    that of `link`. The bias is not regularised. ``W0`` is zero, or the
    weights of `start`, so that few labels correct a text head instead of replacing it. Without `start`, ``C = 1 / (l2 *
    N)`` in scikit-learn's notation. Of several strengths, the one with the smallest held-out negative log-likelihood
    (each with its own temperature) is chosen: on `val`, or else by stratified cross-validation on the labels.

    Args:
        embeddings: (N, D), of any length.
        labels: (N,) int64, 0..C-1, or what the link takes.
        num_classes: C.
        l2: strengths to compare; a single strength is used without comparison.
        val: embeddings and labels on which the strengths are compared.
        start: head whose weights are the initial weights and ``W0``.
        seed: seed of the folds.
        link: how logits become probabilities; None: by a softmax.

    Raises:
        KtrayError: there are no embeddings, or they are not finite.
    """
    link = link or Link(F.cross_entropy, fit_temperature)
    if not len(embeddings):
        raise KtrayError("The probe has no labelled embeddings", "Check task.data and task.labels_per_class.")
    if not torch.isfinite(embeddings).all():
        raise KtrayError("The teacher's embeddings are not finite", "Check teacher.checkpoint.")
    x, y = _unit(embeddings), labels.to(_compute_device(embeddings))
    scores: dict[float, float] = {}
    per_fold: list[dict[float, tuple[float, Fitted]]] = []
    if len(l2) > 1:
        folds = [(x, y, _unit(val[0]), val[1].to(y.device))] if val is not None else _folds(x, y, seed)
        per_fold = [_path_scores(*fold, num_classes, l2, start, link) for fold in folds]
        scores = {s: float(np.mean([fold[s][0] for fold in per_fold])) for s in l2} if per_fold else {}
    # With one label per class, no labels can be held out; the middle of the grid is a safe choice.
    chosen = min(scores, key=lambda s: (scores[s], -s)) if scores else sorted(l2)[len(l2) // 2]
    near = per_fold[0][chosen][1] if scores else None
    weight, bias = _fit(x, y, num_classes, chosen, start, near, link.loss)
    head = LinearHead(weight.to(embeddings.device), bias.to(embeddings.device))
    head.l2, head.scores = chosen, scores
    return head


def text_head(teacher: Teacher, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> LinearHead:
    """Compute a head from prompts (CLIP, arXiv 2103.00020, section 3.1.4).

    The weight of a class is the mean of the unit text embeddings of its prompts, normalised to unit length, times the
    logit scale of the model. Underscores in class names are replaced with spaces.

    Args:
        teacher: a teacher with a text tower.
        class_names: C names.
        templates: prompts with ``{}`` for the name.

    Raises:
        KtrayError: there is no text tower, or a template has no ``{}``.
    """
    if wrong := [t for t in templates if "{}" not in t]:
        raise KtrayError(f"Prompt template '{wrong[0]}' has no {{}}", "Write {} in place of the class name.")
    prompts = [t.replace("{}", name.replace("_", " ")) for name in class_names for t in templates]
    with torch.inference_mode():
        parts = []
        for i in range(0, len(prompts), 256):
            parts.append(teacher.encode_text(prompts[i : i + 256]))
            beat(f"{i + len(parts[-1]):,} of {len(prompts):,} prompts")
        mean = torch.cat(parts).view(len(class_names), len(templates), -1).mean(1)
        weight = teacher.logit_scale * F.normalize(mean, dim=-1)
    return LinearHead(weight.clone())


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T that minimises the negative log-likelihood of ``softmax(logits / T)`` (arXiv 1706.04599, section 4.2).

    The loss is convex in 1/T, so a bounded scalar search in log T (0.01..100) finds the minimum. If all predictions are
    correct, the likelihood increases without bound as T decreases; in this case the labels are smoothed as if one image
    of N + 2 were wrong (Platt's targets, 1999, section 2.2).

    Args:
        logits: (N, C), of images that were not used to fit the head.
        labels: (N,) int64.
    """
    z, y = logits.detach().cpu(), labels.cpu()
    classes = z.shape[1]
    if not len(z) or classes < 2:
        return 1.0
    separable = bool((z.argmax(1) == y).all())
    smoothing = classes / (classes - 1) / (len(z) + 2) if separable else 0.0

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=min(smoothing, 1.0))

    return minimal_temperature(lambda t: _mean_loss(loss, z, y, t))


def _mean_loss(loss: Loss, logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    """The mean loss of ``logits / temperature`` in float64, in pieces."""
    total = 0.0
    for part in _pieces(len(logits), logits.shape[1], logits.device):
        total += len(labels[part]) * float(loss(logits[part].double() / temperature, labels[part]))
    return total / len(logits)


def _pieces(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows with about `_LOGITS` values each."""
    step = max(1, _LOGITS[device.type] // width)
    return (slice(first, first + step) for first in range(0, rows, step))


def minimal_temperature(loss_at: Callable[[float], float]) -> float:
    """The T in 0.01..100 with the smallest loss, which must be convex in 1/T."""

    def loss(log_t: float) -> float:
        return loss_at(math.exp(log_t))

    low, high = (math.log(t) for t in _TEMPERATURES)
    from scipy.optimize import minimize_scalar  # slow to import, and workers do not fit temperatures

    minimum = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(minimum.x))


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeddings.detach().to(_compute_device(embeddings), torch.float64), dim=-1)


def _compute_device(tensor: torch.Tensor) -> torch.device:
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")


def _fit(
    x: torch.Tensor,
    y: torch.Tensor,
    num_classes: int,
    l2: float,
    start: LinearHead | None,
    warm: Fitted | None,
    mean_loss: Loss,
    rough: bool = False,
) -> Fitted:
    """The head with the smallest loss. ``warm``: where to begin; ``rough``: precise enough to compare strengths."""
    if start is None:
        anchor = x.new_zeros(num_classes, x.shape[1])
        first = (anchor, x.new_zeros(num_classes))
    else:
        anchor = start.weight.detach().to(x)
        first = (anchor, start.bias.detach().to(x))
    weight, bias = (t.to(x, copy=True).requires_grad_() for t in (warm or first))
    iterations, change = (100, 1e-9) if rough else (500, 1e-11)
    optimizer = LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=1000,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=change,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = l2 / 2 * (weight - anchor).square().sum()
        loss.backward()
        total = loss.detach()
        for part in _pieces(len(x), num_classes, x.device):
            loss = mean_loss(F.linear(x[part], weight, bias), y[part]) * (len(y[part]) / len(x))
            loss.backward()
            total += loss.detach()
        value = float(total)
        beat(f"fitting a head, loss {value:.4g}")
        return value

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _path_scores(
    x: torch.Tensor,
    y: torch.Tensor,
    held_x: torch.Tensor,
    held_y: torch.Tensor,
    num_classes: int,
    l2: Sequence[float],
    start: LinearHead | None,
    link: Link,
) -> dict[float, tuple[float, Fitted]]:
    """For each strength, from strong to weak, the held-out loss and the head; each fit begins at the one before.

    These fits are rough and in float32, because they only choose a strength: in float64, thousands of images of a
    thousand classes take minutes.
    """
    x, held_x = x.float(), held_x.float()
    found, warm = {}, None
    for strength in sorted(l2, reverse=True):
        warm = _fit(x, y, num_classes, strength, start, warm, link.loss, rough=True)
        logits = F.linear(held_x, *warm)
        found[strength] = _mean_loss(link.loss, logits, held_y, link.temperature(logits, held_y)), warm
    return found


def _folds(
    x: torch.Tensor, y: torch.Tensor, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    labels = y.cpu().numpy()
    if labels.ndim > 1:
        from sklearn.model_selection import KFold

        parts = KFold(min(5, len(labels)), shuffle=True, random_state=seed).split(labels) if len(labels) > 1 else []
        return [(x[a], y[a], x[b], y[b]) for a, b in parts]
    rarest = int(np.bincount(labels)[np.unique(labels)].min())
    if rarest < 2:
        return []
    from sklearn.model_selection import StratifiedKFold  # slow to import

    split = StratifiedKFold(min(5, rarest), shuffle=True, random_state=seed).split(labels, labels)
    return [(x[a], y[a], x[b], y[b]) for a, b in split]
