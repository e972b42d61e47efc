"""Class probabilities of each labelled image by a linear probe that has not seen its label.

The probe is a ridge regression from the unit embedding to the one-hot label. Its predictions without one image follow
from one decomposition for all images and all strengths of the regularisation (PRESS; Allen, The Relationship between
Variable Selection and Data Augmentation and a Method for Prediction, Technometrics 1974), so that the search costs less
than one logistic regression. With H the hat matrix and F the fitted values, the prediction without image i is
(F_i - H_ii Y_i) / (1 - H_ii).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ktray.models.teacher.heads import fit_temperature

# Strengths of the regularisation as multiples of the largest eigenvalue of the embeddings' scatter matrix.
STRENGTHS: tuple[float, ...] = tuple(10.0**e for e in np.arange(-3.5, 0.6, 0.75))
_RANK = 1e-9  # eigenvalues below this share of the largest one are rounding noise
_LARGEST = 1.0 - 1e-9  # leverage of an image that alone determines its prediction


def leave_one_out(
    embedding: np.ndarray, labels: np.ndarray, num_classes: int, strengths: tuple[float, ...] = STRENGTHS
) -> np.ndarray:
    """Class probabilities (N, C) float64 of each image by a probe on all other images.

    The strength is the one with the smallest negative log-likelihood, each with the temperature that is best for it.

    Args:
        embedding: (N, D) embeddings of unit length.
        labels: (N,) int, 0..C-1.
        num_classes: C.
        strengths: strengths to compare.

    Returns:
        The probabilities; NaN for the only image of a class, which no other image can confirm.
    """
    n = len(labels)
    truth = torch.from_numpy(np.array(labels, dtype=np.int64))
    out = np.full((n, num_classes), np.nan)
    judged = np.bincount(labels, minlength=num_classes)[labels] > 1
    if not judged.any():
        return out
    onehot = np.eye(num_classes)[labels]
    mean = onehot.mean(0)
    left, squared = _decomposition(np.asarray(embedding, np.float64))
    projected = left.T @ (onehot - mean)
    best, where = np.inf, torch.from_numpy(judged)
    for strength in strengths:
        kept = squared / (squared + strength * squared.max(initial=1e-12))
        leverage = np.minimum((left * left) @ kept + 1 / n, _LARGEST)[:, None]
        fitted = left @ (kept[:, None] * projected) + mean
        scores = torch.from_numpy((fitted - leverage * onehot) / (1 - leverage))
        logits = scores / fit_temperature(scores[where], truth[where])
        loss = float(F.cross_entropy(logits[where], truth[where]))
        if loss < best:
            best = loss
            out[judged] = logits[where].softmax(1).numpy()
    return out


def _decomposition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (N, R) of the centred rows, and their squared singular values (R,), from the smaller of the
    two Gram matrices."""
    centred = x - x.mean(0)
    wide = x.shape[0] < x.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = values > _RANK * max(values.max(initial=0.0), 1e-300)
    values, vectors = values[kept], vectors[:, kept]
    return vectors if wide else centred @ (vectors / np.sqrt(values)), values
