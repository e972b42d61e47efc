"""A whole run in each mode of ``teach.mode``: the same student, and a ledger that knows who paid the teacher."""

import json
import re

import pytest
from heard import heard
from image_zoo import write_zoo
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.models.flops import forward_flops
from ktray.models.teacher.load import load_teacher
from ktray.pipeline.run import run

STEPS, BATCH = 30, 32


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("modes")
    write_task(root / "task")
    write_gallery(root / "gallery")
    write_zoo(root / "gallery" / "zoo")
    data = [f"task.data={root / 'task'}", f"gallery.data={root / 'gallery'}", "data.max_bad_fraction=0.2"]

    def one(mode):
        lines = []
        keys = [f"store={root / 'store'}", *SMALL, *data, f"train.steps={STEPS}", "baselines.scratch=false"]
        result = heard(lines, run, recipes.load(None, [*keys, f"teach.mode={mode}"]))
        return result, "\n".join(lines)

    return {mode: one(mode) for mode in ("cached", "streamed", "live")}


def tower():
    teacher = load_teacher("miniverse")
    return forward_flops(teacher.image_tower, (3, *teacher.preprocess.size))


@pytest.mark.parametrize("mode", ["streamed", "live"])
def test_the_student_is_the_same_within_rounding(runs, mode):
    stored, made = runs["cached"][0], runs[mode][0]
    assert made["metric"]["test"] == pytest.approx(stored["metric"]["test"], abs=0.1)
    assert made["data"]["quarantined"] == stored["data"]["quarantined"]


def test_the_ledger_knows_who_paid_the_teacher(runs):
    flops = {name: result["cost"]["flops"] for name, (result, _) in runs.items()}
    views = 60 * 2
    # The head on the embedding counts as well.
    assert flops["cached"]["teach"] == pytest.approx((views + 4 * 2) * tower(), rel=1e-4)
    assert flops["live"].get("teach", 0) == flops["streamed"].get("teach", 0) == 0
    drawn = STEPS * BATCH
    assert flops["live"]["transfer"] - flops["cached"]["transfer"] == pytest.approx(drawn * tower(), rel=1e-4)
    # So small a set stays in memory after the teachers have seen it once.
    assert flops["streamed"]["transfer"] - flops["cached"]["transfer"] == pytest.approx(views * tower(), rel=1e-4)
    # Rows of the replay in finetuning (as many as labelled images) are made the same way.
    more = flops["live"]["finetune"] - flops["cached"]["finetune"]
    assert more == pytest.approx(10 * 16 * tower(), rel=1e-4)


def test_only_a_cache_is_compared_with_the_live_teacher(runs):
    assert re.search(
        r"stored targets of 8 views with the live teacher's outputs: lowest cosine similarity (1\.0|0\.999)",
        runs["cached"][1],
    )
    assert "compared" not in runs["live"][1] + runs["streamed"][1]


def test_auto_says_why(cluster, tmp_path):
    from ktray.pipeline.resolve import resolve

    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    data = [f"task.data={tmp_path / 'task'}", f"gallery.data={tmp_path / 'gallery'}", f"store={tmp_path / 'store'}"]
    for steps, mode in ((30, "cached"), (3, "live")):
        found = resolve(recipes.load(None, [*data, *SMALL, f"train.steps={steps}"]), cluster)
        assert found.recipe.teach.mode == mode
        (why,) = [reason for reason in found.reasons if reason.startswith("teach.mode=")]
        assert f"training uses {steps * 32:,} views, and the transfer set has 120" in why
    assert json.loads(found.recipe.model_dump_json())["teach"]["mode"] == "live"
