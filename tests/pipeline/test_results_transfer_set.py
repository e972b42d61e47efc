"""jobs/curate.py: the transfer set alone, by each strategy, looked at and reused."""

import json
import re
import sqlite3

import pyarrow.parquet as pq
import pytest
from heard import heard
from results import check_result
from small_task import CLASSES, SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.pipeline.run import curate_only, run


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("curation")
    write_task(root / "task")
    write_gallery(root / "gallery")
    return root


def keys(world, *more):
    data = [f"store={world / 'store'}", f"task.data={world / 'task'}", f"gallery.data={world / 'gallery'}"]
    return recipes.load(None, [*SMALL, *data, *more])


@pytest.fixture(scope="module")
def balanced(world):
    lines: list[str] = []
    return heard(lines, curate_only, keys(world)), lines


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def listed(world, result):
    return pq.read_table(world / "store" / "runs" / result["run_id"] / "transfer.parquet").to_pylist()


def test_the_set_is_listed_counted_and_shown(world, balanced):
    result, lines = balanced
    folder = world / "store" / "runs" / result["run_id"]
    rows = listed(world, result)
    assert len(rows) == result["transfer_set"]["kept"] == 60
    covered = result["transfer_set"]["coverage"]
    assert covered["queries"]["count"] == 15
    assert covered["queries"]["least"] == covered["queries"]["most"] == 4
    assert {name: one["images"] for name, one in covered["classes"].items()} == dict.fromkeys(CLASSES, 20)
    assert any("15 queries contributed 4 to 4 images each" in line for line in lines)
    page = (folder / "transfer.html").read_text()
    assert all(row["uri"].rpartition("/")[2] in page for row in rows)
    assert (folder / "contact_sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert check_result("curate", folder / "result.json") == json.loads(json.dumps(result))
    assert not (folder / "running.json").exists()


def test_it_is_logged(world, balanced):
    result, _ = balanced
    with sqlite3.connect(world / "store" / "mlflow.db") as db:
        found = dict(db.execute("select key, value from latest_metrics where run_uuid=?", [result["mlflow"]["run_id"]]))
    assert found["transfer.kept"] == 60
    assert found["coverage.least"] == 4
    assert found["cost.total_flops"] == pytest.approx(result["cost"]["flops"]["total"])


@pytest.mark.parametrize("strategy", ["best_first", "class_balanced", "diverse", "informative"])
def test_other_strategies_choose_other_images_with_the_same_index(world, balanced, strategy):
    result = curate_only(keys(world, f"transfer.strategy={strategy}"))
    cached = {stage["name"]: stage["cached"] for stage in result["stages"]}
    assert cached["adapt"]
    assert cached["index"]
    assert not cached["curate"]
    chosen, before = ({row["uri"] for row in listed(world, one)} for one in (result, balanced[0]))
    assert len(chosen) == 60
    assert chosen != before
    taken = [row["strategies"].split(",") for row in listed(world, result)]
    assert all(strategy in names for names in taken)
    assert not all("query_balanced" in names for names in taken)
    shown = data_of((world / "store" / "runs" / result["run_id"] / "transfer.html").read_text())
    assert {tuple(image["strategies"]) for image in shown["images"]} == {tuple(names) for names in taken}


def test_a_run_reuses_it(world, balanced):
    result = run(keys(world, "train.steps=3", "baselines.scratch=false"))
    cached = {stage["name"]: stage["cached"] for stage in result["stages"]}
    assert cached["curate"]
    assert not cached["transfer"]


def test_random_draws_and_the_tasks_own_images_have_a_page_too(world):
    for source in ("generic", "target"):
        result = curate_only(keys(world, f"transfer.source={source}"))
        assert result["transfer_set"]["coverage"] is None
        check_result("curate", world / "store" / "runs" / result["run_id"] / "result.json")
        shown = data_of((world / "store" / "runs" / result["run_id"] / "transfer.html").read_text())
        assert shown["queries"] == [{"uri": "", "class": None, "thumb": None}]
        assert len(shown["images"]) == result["transfer_set"]["kept"]


def test_scratch_has_none(world):
    with pytest.raises(KtrayError, match="no transfer set"):
        curate_only(keys(world, "objective.name=scratch"))


def test_a_floor_shortens_the_set_and_every_image_reaches_it(world, balanced):
    plain = balanced[0]["transfer_set"]["on_task"]
    assert not plain["applied"]
    assert plain["sets"][-1]["name"] == "random"
    assert plain["sets"][-1]["images"] == plain["sets"][0]["images"] == 60
    similarities = sorted(row["similarity"] for row in listed(world, balanced[0]))
    assert plain["below"] == sum(value < plain["floor"][0] for value in similarities)
    floor = (similarities[-10] + similarities[-11]) / 2
    result = curate_only(keys(world, f"transfer.min_similarity={floor}"))
    chosen = result["transfer_set"]
    assert chosen["on_task"]["applied"]
    assert 10 <= chosen["kept"] < 60
    assert min(row["similarity"] for row in listed(world, result)) >= floor - 1e-6
    folder = world / "store" / "runs" / result["run_id"]
    check_result("curate", folder / "result.json")
    assert "below the floor and were left out" in (folder / "transfer.html").read_text()
    with pytest.raises(KtrayError, match="No gallery image reaches the floor"):
        curate_only(keys(world, "transfer.min_similarity=1.0"))


@pytest.mark.long
def test_weights_train_another_student_on_the_same_targets(world):
    short = ["train.steps=3", "baselines.scratch=false", "teach.mode=cached"]
    plain, weighted = (run(keys(world, *short, f"transfer.weight={name}")) for name in ("none", "confidence"))
    stages = [{stage["name"]: stage for stage in one["stages"]} for one in (plain, weighted)]
    assert stages[0]["teach"]["key"] == stages[1]["teach"]["key"]
    assert stages[0]["transfer"]["key"] != stages[1]["transfer"]["key"]
    assert "the most similar first" in (world / "store" / "runs" / weighted["run_id"] / "report.html").read_text()
