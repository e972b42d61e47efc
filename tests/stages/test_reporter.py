"""What an attempt at a stage makes of its workers' posts."""

import contextlib
from types import SimpleNamespace

import pytest
from heard import hearing

from ktray.accounting.attempts import Entry
from ktray.accounting.held import Held
from ktray.accounting.ledger import Meter
from ktray.data.quarantine import BadLimit, Quarantine
from ktray.distributed.watchdog import Watchdog
from ktray.errors import KtrayError
from ktray.reporting.heartbeat import Heartbeat
from ktray.stages.bad_images import BadImageWatch
from ktray.stages.base import Reporter
from ktray.training.messages import BadImages, ControllerState, CurvePoint, Started, StepProgress, TeacherFlops

FLOPS, IMAGES = 100, 8


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def made():
    """(reporter, clock, what was said) of an attempt on GPUs; an earlier one was killed after 30 steps were counted."""

    with contextlib.ExitStack() as until:

        def make(earlier=30):
            said, rows, clock = [], [], Clock()
            until.enter_context(hearing(said))
            context = SimpleNamespace(
                run_id="run",
                bad_limit=BadLimit(0.1),
                tracker=SimpleNamespace(stage=lambda name: SimpleNamespace(metrics=lambda *row: rows.append(row))),
                ledger=SimpleNamespace(
                    spent=list,
                    entries=[
                        Entry("transfer", "k", 1, flops=earlier * FLOPS, images=earlier * IMAGES),
                        Entry("transfer", "another", 1, flops=10**9, images=10**9),
                    ],
                ),
                plan=SimpleNamespace(worker_gpus=1.0),
                machines=SimpleNamespace(workers=lambda nodes: Held(len(nodes), 36.0 * len(nodes))),
            )
            log = SimpleNamespace(append=lambda line: None)
            meter = Meter(log, Entry("transfer", "k", 2), Held(7, 700.0), clock=clock)
            reporter = Reporter(context, "transfer", meter, Watchdog("transfer", 1, clock=clock))
            reporter.rows = rows
            return reporter, clock, said

        yield make


def start(step, workers):
    return Started(step, step * IMAGES, step * FLOPS, workers, nodes=("n",) * workers)


def step(number):
    return StepProgress(number, number * IMAGES, number * FLOPS)


def test_steps_done_again_count_again_and_are_told_apart(made):
    reporter, _, said = made()
    for post in (start(30, 1), step(45), start(40, 2), step(60), start(50, 1), step(70)):
        reporter.post(post)
    entry = reporter.meter.now()
    assert entry.flops == (15 + 20 + 20) * FLOPS
    assert entry.images == (15 + 20 + 20) * IMAGES
    assert (entry.restarts, entry.lost_flops) == (2, (5 + 10) * FLOPS)
    assert [" ".join(line.split()) for line in said] == [
        "transfer resumed at step 40 with 2 workers",
        "transfer resumed at step 50 with 1 worker",
    ]


@pytest.mark.parametrize(("earlier", "untold"), [(30, 0), (22, 8), (35, 0)])
def test_steps_that_a_killed_attempt_did_not_get_to_tell_are_counted_by_the_next(made, earlier, untold):
    reporter, _, _ = made(earlier)
    reporter.post(start(30, 1))
    reporter.post(step(31))
    assert reporter.meter.now().flops == (1 + untold) * FLOPS


def test_device_time_is_that_of_as_many_as_there_were(made):
    reporter, clock, _ = made()
    with reporter.meter:
        for at, workers in ((5, 1), (15, 3), (25, 2)):
            clock.now = at
            reporter.post(start(30, workers))
        clock.now = 45
        now = reporter.meter.now()
        assert now.device_seconds == 15 * 1 + 10 * 3 + 20 * 2
        assert now.usd == pytest.approx(now.device_seconds / 100)


def test_a_heartbeat_of_long_work_is_a_sign_of_life(made):
    reporter, clock, _ = made()
    for _ in range(5):
        clock.now += 50
        reporter.post(Heartbeat("2,560 labelled images"))
        reporter.watchdog.check()
    clock.now += 61
    with pytest.raises(KtrayError, match=r"last: 2,560 labelled images"):
        reporter.watchdog.check()


def test_states_of_the_controller_are_no_sign_of_life(made):
    reporter, clock, said = made()
    reporter.post(step(31))
    reporter.post(ControllerState("restarting", "worker 1: died"))
    for state in ("scheduling", "rescheduling") * 3:
        clock.now += 30
        reporter.post(ControllerState(state, "timed out" if state == "rescheduling" else ""))
    with pytest.raises(Exception, match=r"last: step 31\).*Ray Train is rescheduling"):
        reporter.watchdog.check()
    assert said == ["transfer  lost its workers: worker 1: died", "transfer  could not start its workers: timed out"]


def test_bad_images_teacher_flops_and_the_curve_each_go_where_they_belong(made):
    reporter, _, _ = made(earlier=0)
    reporter.post(start(0, 1))
    reporter.post(BadImages((("a.png", "truncated"), ("b.png", "empty"))))
    for flops in (3, 4):  # increments, beside the totals of the steps
        reporter.post(TeacherFlops(flops))
    reporter.post(CurvePoint(5, {"loss": 0.5}))
    reporter.post(step(5))
    assert [(bad.uri, bad.reason, bad.stage) for bad in reporter.quarantine] == [
        ("a.png", "truncated", "transfer"),
        ("b.png", "empty", "transfer"),
    ]
    assert reporter.meter.now().flops == 3 + 4 + 5 * FLOPS
    assert reporter.rows == [(5, {"loss": 0.5})]


def test_a_message_that_is_lost_loses_no_count(made):
    reporter, _, _ = made(earlier=0)
    for post in (start(0, 1), step(5), step(9)):  # step(7) was dropped
        reporter.post(post)
    assert (reporter.meter.now().images, reporter.meter.now().flops) == (9 * IMAGES, 9 * FLOPS)


def test_what_is_no_message_is_refused(made):
    reporter, _, _ = made()
    with pytest.raises(TypeError, match="step"):
        reporter.post({"step": 1})


def test_too_many_bad_images_are_told_early_and_end_the_stage_as_soon_as_it_is_certain() -> None:
    watch, quarantine, said = BadImageWatch("index", BadLimit(0.1)), Quarantine(), []
    watch.total = 1000
    with hearing(said):
        for i in range(100):
            quarantine.add(f"{i}.jpg", "truncated", "index")
            watch.look(quarantine, 2 * (i + 1))
    (warning,) = said  # after 200 images, half of which are bad
    assert "If this share remains" in warning
    assert "data.max_bad_fraction=0.6" in warning
    quarantine.add("one more.jpg", "truncated", "index")
    with pytest.raises(KtrayError, match="101 of 202 images cannot be used"):
        watch.look(quarantine, 202)
