"""The choice among trained students, on manifests that are written by hand."""

import pytest

from ktray.pipeline.select import FINETUNED, SCRATCH, START, TRANSFERRED, baseline, best, distilled, models_to_test
from ktray.stages.base import StageResult


def trained(best_step, *values, metric="val_top1"):
    """A stage whose validation was ``values`` after 0, 10, 20, ... steps."""
    curve = [{"step": 10 * i, "loss": 1.0, **({metric: v} if v is not None else {})} for i, v in enumerate(values)]
    return StageResult(None, {"best_step": best_step, "curve": curve, "key": str(values)}, False)


def names(candidates):
    return [(c.name, c.val) for c in candidates]


def test_finetuning_that_helps_comes_first():
    transfer, finetune = trained(20, 0.1, 0.5, 0.6), trained(10, 0.6, 0.7, 0.65)
    found = distilled(transfer, finetune, "top1")
    assert names(found) == [(FINETUNED, 0.7), (TRANSFERRED, 0.6)]
    assert best(found).trained is finetune


def test_finetuning_that_harms_is_not_delivered():
    transfer, finetune = trained(20, 0.1, 0.5, 0.6), trained(0, 0.6, 0.4, 0.55)
    found = distilled(transfer, finetune, "top1")
    assert names(found) == [(TRANSFERRED, 0.6), (FINETUNED, 0.55)]
    assert best(found).trained is transfer


def test_finetuning_that_ties_with_a_lower_loss_is_delivered_and_with_a_higher_loss_is_not():
    transfer = trained(10, 0.1, 0.6)
    assert best(distilled(transfer, trained(10, 0.6, 0.6), "top1")).name == FINETUNED
    assert best(distilled(transfer, trained(0, 0.6, 0.6), "top1")).name == TRANSFERRED


def test_without_validation_in_transfer_finetuning_is_the_only_one():
    found = distilled(trained(0, None, None), trained(0, 0.3, 0.2), "top1")
    assert names(found) == [(FINETUNED, 0.3)]


def test_without_finetuning_the_transferred_student_is_the_only_one():
    assert names(distilled(trained(10, 0.2, 0.4, 0.3), None, "top1")) == [(TRANSFERRED, 0.4)]


@pytest.mark.parametrize("name", [START, SCRATCH])
def test_a_better_baseline_is_delivered_and_the_distilled_student_is_tested_beside_it(name):
    found = [*distilled(trained(10, 0.1, 0.5), None, "top1"), baseline(name, trained(10, 0.2, 0.8), "top1")]
    chosen = best(found)
    assert chosen.name == name
    assert models_to_test(found, chosen) == {"student": chosen.trained, "distilled": found[0].trained}


def test_the_distilled_student_wins_a_tie_and_the_baselines_are_tested_beside_it():
    found = [
        *distilled(trained(10, 0.1, 0.5), None, "top1"),
        baseline(START, trained(10, 0.2, 0.5), "top1"),
        baseline(SCRATCH, trained(10, 0.2, 0.4), "top1"),
    ]
    chosen = best(found)
    assert chosen.name == TRANSFERRED
    assert models_to_test(found, chosen) == {
        "student": chosen.trained,
        START: found[1].trained,
        SCRATCH: found[2].trained,
    }
