"""The linear head on a teacher's patch embeddings: fitted to label maps, and calibrated on them.

A patch embedding of several levels (DINOv2, arXiv 2304.07193, section 7.4, uses 1 or 4) is a concatenation of parts.
Each part is normalised to unit length, so that all parts have equal weight and the same grid of regularisation
strengths can be used for all teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ktray.data.labelled.masks import IGNORE
from ktray.errors import KtrayError
from ktray.models.lean_calls import LBFGS
from ktray.models.maps import map_loss, resize_map
from ktray.models.teacher.heads import LinearHead, fit_temperature
from ktray.reporting.heartbeat import beat

L2_GRID: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)
# The loss is computed on label maps whose sides are at most this factor larger than those of the features. On the
# miniverse a factor of 2 is as good as 4 (mIoU 0.289 and 0.287) and takes a third of the time.
_FINER = 2
# Limits for memory: logits (pixels x classes) at a time, and number of pixels for fitting a temperature.
_CHUNK, _PIXELS = 2**24, 50_000
_ITERATIONS = 100


class MapHead(LinearHead):
    """``logits = weight @ normalised + bias`` at each position; see the docstring of the module.

    Args:
        weight: (C, D).
        dims: widths of the levels of a patch embedding; their sum is D.
        bias: (C,), zeros if None.

    Attributes:
        scores: for each strength the negative log-likelihood on held-out pixels, after fitting a temperature.
    """

    def __init__(self, weight: torch.Tensor, dims: Sequence[int], bias: torch.Tensor | None = None) -> None:
        super().__init__(weight, bias)
        if sum(dims) != weight.shape[1]:
            raise ValueError(f"the widths of the levels {list(dims)} do not sum to {weight.shape[1]}")
        self.dims = list(dims)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D, h, w) patch embeddings to (N, C, h, w)."""
        x = unit_levels(features, self.dims).to(self.weight.dtype)
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


def unit_levels(features: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(N, D, h, w) with the part of each level normalised over the channels, and the whole scaled to unit length."""
    parts = [F.normalize(part.float(), dim=1) for part in features.split(list(dims), dim=1)]
    return torch.cat(parts, 1) / math.sqrt(len(parts))


def fit_map_probe(
    features: torch.Tensor,
    masks: torch.Tensor,
    num_classes: int,
    dims: Sequence[int] | None = None,
    l2: Sequence[float] = L2_GRID,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> MapHead:
    """Multinomial logistic regression of pixels on frozen patch embeddings, by L-BFGS in float32.

    It minimises ``mean cross-entropy over labelled pixels + l2 / 2 * |W|^2``. The logits are resized to the label maps,
    which are first reduced to at most twice the resolution of the features. Images are processed in chunks to limit
    memory. Of several strengths, the one with the smallest held-out negative log-likelihood (each with its own
    temperature) is chosen, from strong to weak until the loss increases: on `val`, or else on every fifth image.

    Args:
        features: (N, D, h, w) floating point. If they are on a CUDA device, the fit runs there, otherwise on the CPU.
        masks: (N, H, W) uint8, 255 = ignore.
        num_classes: C.
        dims: widths of the levels; None: one level.
        l2: strengths to compare; a single strength is used without comparison.
        val: features and masks on which the strengths are compared.

    Raises:
        KtrayError: there are no labelled pixels, or the features are not finite.
    """
    if not len(features) or bool((masks == IGNORE).all()):
        raise KtrayError("The probe has no labelled pixels", "Check task.data and its masks.")
    if not torch.isfinite(features).all():
        raise KtrayError("The teacher's patch embeddings are not finite", "Check teacher.checkpoint.")
    dims = list(dims or [features.shape[1]])
    device = features.device if features.device.type == "cuda" else torch.device("cpu")

    def ready(maps: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unit = torch.cat([unit_levels(m.to(device), dims).to(m.dtype) for m in maps.split(64)])
        return unit, labels.to(device)

    x, y = ready(features, masks)
    scores: dict[float, float] = {}
    if len(l2) > 1:
        if val is not None:
            fit_pair, held_pair = (x, y), ready(*val)
        else:
            held_out = torch.arange(len(x), device=device) % 5 == 4
            fit_pair, held_pair = (x[~held_out], y[~held_out]), (x[held_out], y[held_out])
        scores = _path_scores(fit_pair, held_pair, num_classes, l2) if len(held_pair[0]) else {}
    # With very few images, none can be held out; the middle of the grid is a safe choice.
    chosen = min(scores, key=lambda s: (scores[s], -s)) if scores else sorted(l2)[len(l2) // 2]
    weight, bias = _fit(x, y, num_classes, chosen, None)
    head = MapHead(weight, dims, bias).to(features.device)
    head.l2, head.scores = chosen, scores
    return head


def fit_map_temperature(maps: torch.Tensor, masks: torch.Tensor, seed: int = 0) -> float:
    """Like `ktray.models.teacher.heads.fit_temperature`, for pixels.

    Args:
        maps: (N, C, h, w) logits of images that were not used to fit the head; they are resized to the masks.
        masks: (N, H, W) uint8, 255 = ignore.
        seed: seed of the draw of pixels, if there are many.
    """
    return fit_temperature(*_draw_pixels(maps, masks, seed))


def _path_scores(
    fit: tuple[torch.Tensor, torch.Tensor],
    held: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
    l2: Sequence[float],
) -> dict[float, float]:
    """Held-out loss for each strength, from strong to weak; each fit starts from the result of the previous fit."""
    scores: dict[float, float] = {}
    warm = None
    for strength in sorted(l2, reverse=True):
        warm = _fit(*fit, num_classes, strength, warm)
        maps = torch.cat([_logits(part, *warm) for part in held[0].split(64)])
        logits, labels = _draw_pixels(maps, held[1], 0)
        if not len(labels):
            return {}
        score = float(F.cross_entropy(logits / fit_temperature(logits, labels), labels))
        if scores and score > min(scores.values()):
            scores[strength] = score
            break
        scores[strength] = score
    return scores


def _fit(
    x: torch.Tensor,
    y: torch.Tensor,
    num_classes: int,
    l2: float,
    warm: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros(num_classes, x.shape[1], device=x.device)
    weight, bias = (t.clone().requires_grad_() for t in (warm or (zero, zero[:, 0])))
    labels = _coarser(y, (x.shape[2], x.shape[3]))
    counted = (labels != IGNORE).sum().clamp(min=1)
    each = max(1, _CHUNK // (num_classes * labels.shape[1] * labels.shape[2]))
    optimizer = LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = l2 / 2 * weight.square().sum()
        loss.backward()
        total = loss.detach()
        for part, truth in zip(x.split(each), labels.split(each), strict=True):
            # The mean over the labelled pixels of this chunk, times the share of the chunk in all labelled pixels.
            share = (truth != IGNORE).sum() / counted
            loss = map_loss(_logits(part, weight, bias), truth) * share
            loss.backward()
            total = total + loss.detach()
            beat("fitting a head on patches")
        return float(total)

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.float(), weight[:, :, None, None], bias)


def _coarser(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    size = [min(masks.shape[1 + i], _FINER * grid[i]) for i in range(2)]
    if size == list(masks.shape[1:]):
        return masks
    return F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].to(masks.dtype)


def _draw_pixels(maps: torch.Tensor, masks: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, C) and labels (P,) int64 of labelled pixels, with equally many draws from every image."""
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, _PIXELS // max(1, len(maps)))
    logits, labels = [], []
    for logit_map, mask in zip(maps, masks, strict=True):
        flat = resize_map(logit_map[None].float(), (mask.shape[0], mask.shape[1]))[0].flatten(1)
        positions = (mask.flatten() != IGNORE).nonzero()[:, 0]
        if len(positions) > per_image:
            positions = positions[torch.randperm(len(positions), generator=generator)[:per_image].to(positions.device)]
        logits.append(flat[:, positions].T)
        labels.append(mask.flatten()[positions].long())
    return torch.cat(logits), torch.cat(labels)
