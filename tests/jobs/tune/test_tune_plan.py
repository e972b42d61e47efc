"""The plan of a search: its time follows from the speeds of the stages, and it says where they are from."""

import pytest
from heard import heard
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.accounting.device import describe_device, device_name
from ktray.accounting.speeds import Measured, shipped_start
from ktray.jobs.tune.plan import report
from ktray.jobs.tune.run import baseline
from ktray.pipeline.plan import this_machine
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.run import look_at_stages
from ktray.reporting.units import seconds
from ktray.stages.speed import measured_speeds
from ktray.storage.store import Store


@pytest.fixture
def search(tmp_path):
    task, gallery = write_task(tmp_path / "task"), write_gallery(tmp_path / "gallery", 40)
    data = [f"store={tmp_path / 'store'}", f"task.data={task}", f"gallery.data={gallery}"]
    budget = ["budget.device_hours=2", "tune.seeds=2", "tune.rungs=[0.5, 1]"]
    return recipes.load(None, [*SMALL, *data, *budget, "transfer.source=retrieved", "train.steps=40"])


def test_time_follows_from_the_cores_until_a_run_has_measured(search):
    local = this_machine(search)
    resolved = baseline(search, local)
    flops = {line.stage: line.flops for line in lines(resolved)}
    said: list[str] = []
    heard(said, report, search)
    text = "\n".join(said)
    rate = 30e9 * describe_device()["cores"]
    own = (flops["transfer"] + flops["finetune"]) / rate + shipped_start("transfer") + shipped_start("finetune")
    assert f"the baseline's student takes {seconds(own)} of device time" in text
    assert "cores: assumed 30 GFLOP/s" in text
    assert "WARNING: the gallery has 40 images, fewer than transfer.size=60" in text

    # 2 s a step of 32 images, and 1 s a step of FINETUNE, whose 10 steps have 16 labelled images and as many replayed.
    store = Store(search.store)
    facts = look_at_stages(store, resolved, local).facts
    device = device_name(describe_device(), bool(local.worker_gpus))
    for stage, measured in (("transfer", Measured(32, 2.0)), ("finetune", Measured(32, 1.0))):
        measured_speeds(store).record({**facts[stage], "device": device}, measured, "20260101-000000")
    said.clear()
    heard(said, report, search)
    text = "\n".join(said)
    assert f"the baseline's student takes {seconds(40 * 2 + 10 * 1)} of device time" in text
    assert "store: measured by runs with this store" in text
    # 2 h; the baseline and two seeds of the winner take 90 s each, and a first rung a half of it.
    others = sum(
        line.flops / rate + (shipped_start(line.stage) if line.images or line.flops else 0.0)
        for line in lines(resolved)
        if line.stage not in ("transfer", "finetune", "scratch", "start")
    )
    rungs = int((7_200 - 3 * 90 - others) / 45)
    assert f"the rest allows at most {rungs:,} first rungs" in text
