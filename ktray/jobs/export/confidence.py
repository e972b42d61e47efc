"""The temperature of an exported student, and thresholds of its confidence for abstention, both from validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ktray.jobs.export.agreement import PYTORCH, AgreementScores
from ktray.models.teacher.heads import fit_temperature
from ktray.tasks.calibration import answered, at_coverage, calibration, probabilities


@dataclass(frozen=True)
class Confidence:
    """What a file with probabilities needs.

    Attributes:
        temperature: divides the logits.
        threshold: images whose largest probability is below it get no class; 0: every image gets one.
    """

    temperature: float = 1.0
    threshold: float = 0.0


def fitted(on_val: AgreementScores, abstain: float) -> Confidence:
    """The confidence of a student whose images have one class each.

    Args:
        on_val: outputs of the student, which are logits, and labels.
        abstain: share of the validation images that get no class, those with the lowest confidence.
    """
    logits = on_val.outputs[PYTORCH]
    temperature = fit_temperature(torch.from_numpy(logits), torch.from_numpy(on_val.labels))
    if not abstain:
        return Confidence(temperature)
    p = probabilities(logits, temperature)
    right = np.asarray(p.argmax(1) == on_val.labels)
    return Confidence(temperature, at_coverage(p.max(1), right, 1 - abstain)["threshold"])


def calibrated(on_val: AgreementScores, on_test: AgreementScores | None) -> dict[str, Any]:
    """The entry ``calibration`` of ``export.json``.

    The temperature minimises the negative log-likelihood of the validation labels (Guo et al., arXiv 1706.04599,
    section 4.2). Each threshold is that of a share of the validation images; what it gives on test is measured.

    Args:
        on_val, on_test: logits of the student and labels.
    """
    logits, labels = on_val.outputs[PYTORCH], on_val.labels
    temperature = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    return {
        "temperature": temperature,
        "val": _split(on_val, temperature),
        "test": _split(on_test, temperature) if on_test else None,
        "abstention": [
            {
                "share": row["share"],
                "threshold": row["threshold"],
                "val_accuracy": row["accuracy"],
                **_on_test(on_test, temperature, row["threshold"] if row["share"] < 1 else 0.0),
            }
            for row in calibration(logits, labels, temperature)["coverage"]
        ],
    }


def _split(scores: AgreementScores, temperature: float) -> dict[str, float]:
    before, after = (calibration(scores.outputs[PYTORCH], scores.labels, t) for t in (1.0, temperature))
    return {"ece_before": before["ece"], "nll_before": before["nll"], "ece": after["ece"], "nll": after["nll"]}


def _on_test(scores: AgreementScores | None, temperature: float, threshold: float) -> dict[str, float | None]:
    if scores is None:
        return {"test_share": None, "test_accuracy": None}
    p = probabilities(scores.outputs[PYTORCH], temperature)
    share, accuracy = answered(p.max(1), np.asarray(p.argmax(1) == scores.labels), threshold)
    return {"test_share": share, "test_accuracy": accuracy}
