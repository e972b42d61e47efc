"""The choice of the delivered student: the candidate that is best on validation.

Candidates are the distilled student (after TRANSFER or after FINETUNE) and the baselines of the run: the student that
is finetuned on the labels from its published weights, and the one that is trained from scratch. The test split plays no
part in the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from ktray.stages.base import StageResult
from ktray.stages.evaluate.stage import STUDENT
from ktray.stages.manifests import TrainedManifest

TRANSFERRED, FINETUNED, START, SCRATCH = "transferred", "finetuned", "start", "scratch"
BASELINES = (START, SCRATCH)
DISTILLED = "distilled"  # name of the better distilled student in EVALUATE, if it is not delivered
MODELS = {
    TRANSFERRED: "the distilled student",
    FINETUNED: "the distilled student, finetuned on the labels",
    START: "the student that is finetuned on the labels from its published weights, without distillation",
    SCRATCH: "the student that is trained on the labels from random weights, without distillation",
}


@dataclass(frozen=True)
class Candidate:
    """A trained student that a run can deliver.

    Attributes:
        name: a key of `MODELS`.
        trained: the stage with its weights.
        val: the task's metric on validation, a fraction; in a plan, NaN for a stage that is not computed yet.
    """

    name: str
    trained: StageResult
    val: float


def best_validation(manifest: TrainedManifest, metric: str) -> float:
    """The validation metric, a fraction, of the weights that a training stage kept; NaN if it is not computed yet."""
    if "curve" not in manifest:
        return math.nan
    name = f"val_{metric}"
    curve = [row for row in manifest["curve"] if name in row]
    kept = [row for row in curve if row["step"] == manifest["best_step"]] or curve[-1:]
    return float(kept[-1][name])


def distilled(transferred: StageResult, finetuned: StageResult | None, metric: str) -> list[Candidate]:
    """The distilled student after TRANSFER, if its predictions were validated there, and after FINETUNE, if the run has
    one. The better one is first."""
    found = []
    if not all("curve" in stage.manifest for stage in (transferred, finetuned) if stage):  # in a plan
        last = finetuned or transferred
        return [_candidate(FINETUNED if finetuned else TRANSFERRED, last, metric)]
    if any(f"val_{metric}" in row for row in transferred.manifest["curve"]):
        found.append(_candidate(TRANSFERRED, transferred, metric))
    if finetuned is not None:
        # FINETUNE keeps the weights that it started from if no later ones are better. Equal weights have a lower loss.
        if finetuned.manifest["best_step"] == 0 and found:
            name, rows = f"val_{metric}", finetuned.manifest["curve"]
            later = [float(row[name]) for row in rows if name in row and row["step"] > 0]
            if later:
                found.append(Candidate(FINETUNED, finetuned, max(later)))
        else:
            found.insert(0, _candidate(FINETUNED, finetuned, metric))
    return found


def baseline(name: str, trained: StageResult, metric: str) -> Candidate:
    """A baseline of the run as a candidate."""
    return _candidate(name, trained, metric)


def best(candidates: list[Candidate]) -> Candidate:
    """The best candidate on validation; of equally good ones, and of ones that are not computed yet, the first."""
    if any(math.isnan(c.val) for c in candidates):
        return candidates[0]
    return max(candidates, key=lambda c: c.val)


def models_to_test(candidates: list[Candidate], chosen: Candidate) -> dict[str, StageResult]:
    """The models for EVALUATE: the delivered student, the other baselines, and the distilled student if a baseline is
    delivered."""
    models = {STUDENT: chosen.trained}
    for candidate in candidates:
        if candidate.name in BASELINES and candidate is not chosen:
            models[candidate.name] = candidate.trained
    if chosen.name in BASELINES and candidates[0] is not chosen:
        models[DISTILLED] = candidates[0].trained
    return models


def _candidate(name: str, trained: StageResult, metric: str) -> Candidate:
    return Candidate(name, trained, best_validation(cast(TrainedManifest, trained.manifest), metric))
