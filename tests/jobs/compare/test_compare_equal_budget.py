"""Equal budgets: what each way gets costs what the first one does, and one step more would not."""

import pytest
from heard import heard
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.accounting.device import describe_device
from ktray.accounting.prices import price_table
from ktray.accounting.roofline import gpu_seconds
from ktray.accounting.speeds import shipped_start
from ktray.data.labelled.memory import read_once
from ktray.distributed.allocation import allocate
from ktray.errors import KtrayError
from ktray.jobs.compare import calibration
from ktray.jobs.compare.calibration import MeasuredSpeed
from ktray.jobs.compare.equal_budget import GPUS, budgets, show
from ktray.jobs.compare.methods import Method, list_methods, recipe_of
from ktray.pipeline.plan_stages import lines, traffic_of
from ktray.pipeline.resolve import resolve
from ktray.storage.store import Store
from ktray.tasks.base import task_kind

WAYS = "compare.ways={mse: {objective.name: agnostic, objective.match: mse}, scratch: {objective.name: scratch}}"
HERE = allocate(2, 0, 1, 1, False)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("budget")
    task, gallery = write_task(root / "task"), write_gallery(root / "gallery", 40)
    data = [f"store={root / 'store'}", f"task.data={task}", f"gallery.data={gallery}"]
    return [*SMALL, *data, "transfer.size=20", "train.steps=40", WAYS]


def cost(base, method, steps):
    found = resolve(recipe_of(base, method.keys, train__steps=steps), HERE)
    return sum(line.flops for line in lines(found))


def test_equal_flops_gives_every_way_the_first_ones_cost(given):
    base = recipes.load(None, [*given, "compare.equal=flops", "compare.budgets=[0.25]"])
    methods = list_methods(base)
    found = budgets(base, methods, HERE)
    assert found["mse"].steps == 40
    assert found["mse, 1/4 steps"].steps == 10
    assert found["scratch"].steps > 40
    for name in ("mse, 1/4 steps", "scratch"):
        assert found[name].flops == pytest.approx(cost(base, methods[name], found[name].steps))
    assert found["scratch"].flops <= found["mse"].flops < cost(base, methods["scratch"], found["scratch"].steps + 1)


def test_a_budget_that_a_way_cannot_meet_names_it(given):
    base = recipes.load(None, [*given, "train.steps=1", "compare.equal=flops"])
    methods = {"scratch": Method({"objective.name": "scratch"}, "scratch"), "costly": Method({}, "costly")}
    with pytest.raises(KtrayError, match="'costly'"):
        budgets(base, methods, HERE)


def test_equal_device_seconds_follows_the_measured_speeds(given):
    base = recipes.load(None, [*given, "compare.equal=device_seconds", "compare.random=false"])
    methods = list_methods(base)
    speeds = {"mse": MeasuredSpeed(100.0, 0.5), "scratch": MeasuredSpeed(20.0, 0.25)}
    found = budgets(base, methods, HERE, lambda methods, most: speeds)
    assert {name: b.steps for name, b in found.items()} == {"mse": 40, "scratch": 400}  # 120 s for both
    speeds["scratch"] = MeasuredSpeed(119.9, 0.25)
    with pytest.raises(KtrayError, match="'scratch' costs 120 device-seconds"):
        budgets(base, methods, HERE, lambda methods, most: speeds)


def test_a_plan_reads_the_labelled_images_once_and_the_next_one_reads_them_anew(given, monkeypatch):
    base, kind, calls = recipes.load(None, given), task_kind("classification"), []
    plain = type(kind).read
    monkeypatch.setattr(type(kind), "read", lambda self, *given: calls.append(given) or plain(self, *given))
    for times in (1, 2):
        budgets(base, list_methods(base), HERE)
        assert len(calls) == times
    with read_once():
        read = [resolve(recipe_of(base, {"train.steps": steps}), HERE).task for steps in (10, 20)]
        resolve(recipe_of(base, {"task.labels_per_class": 1}), HERE)
    assert len(calls) == 4  # another label budget is another set
    assert read[0] == read[1]
    read[0].notes.append("a reader's own")
    assert read[0] != read[1]


def result(store, name, key, steps, seconds, total):
    """A result with one training stage, whose manifest lies in the store."""
    store.stage(name, key).write_json("manifest.json", {"steps": steps, "seconds": seconds})
    booked = {"scratch": "finetune"}.get(name, name)
    return {
        "stages": [{"name": "evaluate", "key": "e"}, {"name": booked, "key": key}],
        "cost": {"without_cache": {"device_seconds": total}},
    }


def test_speed_is_the_difference_of_two_runs(tmp_path):
    store = Store(str(tmp_path))
    # Three seconds of start-up in each loop; 50 s in other stages; half a second a step; two devices.
    short = result(store, "transfer", "a", 20, 13.0, 76.0)
    long = result(store, "transfer", "b", 80, 43.0, 136.0)
    found = calibration.speed(store, short, long, devices=2)
    assert found == MeasuredSpeed(fixed=56.0, step=1.0)
    assert found.total(20) == 76.0
    assert found.total(80) == 136.0
    assert found.within(136.0) == 80
    assert found.within(10.0) == 0
    # Training from scratch that stopped early tells by the steps that it took.
    early = [result(store, "scratch", "c", 8, 2.0, 9.0), result(store, "scratch", "d", 12, 2.4, 9.4)]
    assert calibration.speed(store, *early, devices=1).step == pytest.approx(0.1)


def test_what_was_measured_is_kept(given, tmp_path):
    base = recipes.load(None, given)
    store, ran = Store(str(tmp_path)), []

    def run(jobs):
        ran.extend(jobs)
        return [result(store, "transfer", f"k{r.train.steps}", r.train.steps, r.train.steps / 4, 30.0) for _, r in jobs]

    methods = {"mse": list_methods(base)["mse"]}
    first = calibration.measure(base, methods, store, HERE, run)
    assert [r.train.steps for _, r in ran] == [calibration.SHORT, calibration.LONG]
    assert first["mse"] == MeasuredSpeed(30.0 - calibration.SHORT / 4, 0.25)
    assert calibration.measure(base, methods, store, HERE, run) == first
    assert len(ran) == 2


def test_a_plan_counts_seeds_and_trials(given, monkeypatch):
    parts = ["compare.seeds=[0, 1]", "compare.lr_search=[0.5, 1, 2]", "compare.budgets=[0.5]", "compare.random=false"]
    base = recipes.load(None, [*given, *parts])
    found, said = budgets(base, list_methods(base), HERE), []
    kind, calls = task_kind("classification"), []
    plain = type(kind).read
    with monkeypatch.context() as patch:
        patch.setattr(type(kind), "read", lambda self, *given: calls.append(given) or plain(self, *given))
        heard(said, show, base)
    assert len(calls) == 1
    heads = found["mse"].flops + found["scratch"].flops
    title = "all, 2 seeds and 3 learning rates"
    flops, hours, _, *gpus = next(line for line in said if line.startswith(title)).removeprefix(title).split()
    total = 2 * (heads + found["mse, 1/2 steps"].flops) + 3 * heads
    assert float(flops) == pytest.approx(total, rel=0.005)
    times = {"mse": 5, "mse, 1/2 steps": 2, "scratch": 5}
    plans = {
        name: resolve(recipe_of(base, method.keys, train__steps=found[name].steps), HERE)
        for name, method in list_methods(base).items()
    }
    # No run has measured a speed in this store: 30 GFLOP/s for each core here and the start-up of the table; of each
    # GPU, the roofline.
    starts = sum(
        times[name] * shipped_start(line.stage)
        for name, resolved in plans.items()
        for line in lines(resolved)
        if line.images or line.flops
    )
    assert float(hours) == pytest.approx((total / (30e9 * describe_device()["cores"]) + starts) / 3600, rel=0.005)
    for gpu, (hours, usd) in zip(GPUS, zip(gpus[::2], gpus[1::2], strict=True), strict=True):
        seconds = 0.0
        for name, resolved in plans.items():
            values = traffic_of(resolved)
            own = [gpu_seconds(line.flops, values[line.stage], gpu) for line in lines(resolved)]
            seconds += times[name] * sum(own)
        assert float(hours) == pytest.approx(seconds / 3600, rel=0.005)
        assert float(usd) == pytest.approx(seconds / 3600 * price_table()["accelerators"][gpu], rel=0.01)
    text = "\n".join(said)
    assert "the gallery has" not in text
    assert "on L4: roofline" in text
    assert f"on {describe_device()['cpu']}" in text
    assert "cores: assumed 30 GFLOP/s" in text
