import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ktray.distributed.mailbox import open_mailbox
from ktray.errors import KtrayError
from ktray.training.messages import ControllerState
from ktray.training.ray_train_callback import ControllerWatcher, reason, should_restart


@pytest.mark.parametrize(
    ("error", "failures", "limit", "expected"),
    [
        (RuntimeError("connectFullMesh failed"), 1, 2, True),
        (RuntimeError("connectFullMesh failed"), 2, 2, False),
        (RuntimeError("connectFullMesh failed"), 99, -1, True),
        (RuntimeError("connectFullMesh failed"), 0, 0, False),
        (InsufficientClusterResourcesError("never"), 0, -1, False),
        (KtrayError("Bad", "Mend."), 0, -1, False),
    ],
)
def test_workers_that_cannot_meet_are_set_up_again_within_bounds(error, failures, limit, expected):
    assert should_restart(error, failures, limit) is expected


def state(name, error=None):
    made = type(f"{name}State", (SimpleNamespace,), {})
    return made(training_failed_error=error) if error else made()


@pytest.mark.parametrize(("limit", "survived"), [(0, 0), (2, 2), (-1, 9)])
def test_failed_set_ups_are_bounded_and_the_end_says_why(limit, survived):
    told, error = ControllerWatcher(None, limit), ControllerError(WorkerGroupStartupFailedError("a node died"))
    for _ in range(survived):
        told.after_controller_state_update(state("Scheduling"), state("Rescheduling", error))
        told.after_controller_state_update(state("Rescheduling"), state("Scheduling"))
    if limit != -1:
        with pytest.raises(KtrayError, match=f"set up {limit + 1} times: WorkerGroupStartupFailedError: a node died"):
            told.after_controller_state_update(state("Scheduling"), state("Rescheduling", error))


def test_waiting_for_machines_is_no_failure():
    told, error = ControllerWatcher(None, 0), ControllerError(WorkerGroupStartupTimeoutError(2))
    for _ in range(9):
        told.after_controller_state_update(state("Scheduling"), state("Rescheduling", error))
        told.after_controller_state_update(state("Rescheduling"), state("Scheduling"))
    assert told.failures == 0


def test_each_state_is_posted_once_with_its_reason_and_the_controller_is_held(monkeypatch):
    posts, held = [], []

    def hold(handle):
        held.append(handle)
        return SimpleNamespace(future=Future)

    board = SimpleNamespace(post=SimpleNamespace(remote=posts.append), set_controller=SimpleNamespace(remote=hold))
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor="controller"))
    told = ControllerWatcher(board, 1)
    died = WorkerGroupError("long", {1: ValueError("bad\n rows"), 3: ValueError("worse")})
    for name in ("Scheduling", "Running", "Running"):
        told.after_controller_state_update(None, state(name))
    told.after_controller_state_update(None, state("Restarting", died))
    assert held == ["controller"]
    assert posts == [
        ControllerState("scheduling"),
        ControllerState("running"),
        ControllerState("restarting", "worker 1: ValueError: bad rows"),
    ]
    assert reason(ControllerError(TimeoutError("late"))) == "TimeoutError: late"


@ray.remote(max_concurrency=2)
class Controller:
    """A controller that reports its states after `start`."""

    def __init__(self, mailbox):
        self.go = threading.Event()
        self.told = ControllerWatcher(mailbox, 1)

    def start(self):
        self.go.set()

    def run(self):
        self.go.wait()
        self.told.after_controller_state_update(None, state("Initializing"))
        while not self.told.introduced.done():
            time.sleep(0.05)
        try:
            self.told.after_controller_state_update(None, state("Scheduling"))
        except ray.exceptions.ActorDiedError:
            return "ends"
        return "trains"


def test_a_training_that_its_driver_ended_before_it_began_does_not_begin(cluster):
    for ended in (False, True):
        with open_mailbox(lambda post: None) as mailbox:
            controller = Controller.remote(mailbox)
            run = controller.run.remote()
            if not ended:
                ray.get(controller.start.remote())
                assert ray.get(run) == "trains"
                assert len(ray.get(mailbox.controller.remote())) == 1
        if ended:
            ray.get(controller.start.remote())
            assert ray.get(run) == "ends"
        ray.kill(controller)
