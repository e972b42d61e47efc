"""A single Ray task is tried again within bounds, and says why it gave up."""

import os
import time
from functools import partial

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.reporting.heartbeat import Heartbeat, beat


def fails(folder, times, how):
    """Leaves a file for each call; the first ``times`` fail."""
    number = len(os.listdir(folder)) + 1
    (folder / str(number)).touch()
    if number > times:
        return number
    if how == "death":
        os._exit(7)
    if how == "memory":
        raise OutOfMemoryError("Memory on the node (IP: 10.0.0.1) was 4.95GB used / 5.00GB limit (0.99)")
    raise {"OSError": OSError, "ValueError": ValueError}[how]("planted")


@pytest.mark.parametrize("how", ["death", "memory", "OSError"])
def test_it_is_called_again_as_often_as_it_may_fail(cluster, tmp_path, how):
    assert run_with_retries(partial(fails, tmp_path, 2, how), "the task", "Add some.", 2, cpus=1, also=(OSError,)) == 3


@pytest.mark.parametrize(
    ("how", "error"), [("death", WorkerCrashedError), ("OSError", OSError), ("ValueError", ValueError)]
)
def test_other_errors_and_one_failure_too_many_are_raised(cluster, tmp_path, how, error):
    with pytest.raises(error):
        run_with_retries(partial(fails, tmp_path, 9, how), "the task", "Add some.", 1, cpus=1)
    assert len(os.listdir(tmp_path)) == (2 if how == "death" else 1)


def test_running_out_of_memory_is_told_with_what_was_used(cluster, tmp_path):
    with pytest.raises(KtrayError, match=r"The task ran out of memory in 2 attempts \(4.95GB.*Add some"):
        run_with_retries(partial(fails, tmp_path, 9, "memory"), "the task", "Add some.", 1, cpus=1)
    assert len(os.listdir(tmp_path)) == 2


def beats():
    for part in range(3):
        beat(f"part {part}")
    return 5


def test_the_heartbeats_of_its_work_are_heard(cluster):
    heard = []
    with open_mailbox(heard.append, interval=0.05) as mailbox:
        assert run_with_retries(beats, "the task", "Add some.", 0, cpus=1, mailbox=mailbox) == 5
        late = time.monotonic() + 30
        while not heard and time.monotonic() < late:  # posts may arrive after the result
            time.sleep(0.05)
    assert heard == [Heartbeat("part 0")]  # the others came too soon after it
    assert run_with_retries(beats, "the task", "Add some.", 0, cpus=1) == 5
