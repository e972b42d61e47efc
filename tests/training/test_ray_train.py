"""A lone worker: goes on from its last checkpoint after its process died, and ends as if nothing had happened."""

import time
from dataclasses import replace

import pytest
import ray
import torch
from safetensors.torch import load_file
from toy_job import FAILS, STEPS, Shared, Toy

from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.watchdog import Watchdog, watch
from ktray.errors import KtrayError
from ktray.storage.store import Stage
from ktray.training.messages import ControllerState, Started
from ktray.training.ray_train import FOLDER, train


@pytest.fixture
def run(cluster, tmp_path):
    plan = replace(cluster, workers=1, worker_gpus=0.0)

    def run(failure, max_failures=1, name="stage"):
        stage, kept = Stage(str(tmp_path / name)), {}
        outcome = train(
            Toy(tmp_path / f"marker-{name}", failure),
            stage,
            plan,
            None,
            max_failures=max_failures,
            on_weights=lambda path: kept.update(load_file(str(path))),
        )
        assert not stage.exists(FOLDER)
        return outcome, kept

    return run


@pytest.mark.parametrize("failure", ["death", "OSError", "memory"])
def test_after_a_death_or_a_lost_disk_it_goes_on_and_ends_the_same(run, tmp_path, failure):
    whole, expected = run("", name="whole")
    outcome, weights = run(failure)
    assert (tmp_path / "marker-stage").read_text() == "0"
    assert outcome.state.step == whole.state.step == STEPS
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert outcome.report.flops_per_step == 10


def test_other_errors_are_not_tried_again_and_the_checkpoint_stays(run, tmp_path):
    with pytest.raises(ValueError, match="planted"):
        run("ValueError", max_failures=3)
    assert list((tmp_path / "stage" / FOLDER).glob("step-*/state.pt"))
    outcome, _ = run("ValueError")  # the next attempt, as the same command would be
    assert outcome.state.step == STEPS


def test_it_gives_up_when_it_has_died_often_enough(run):
    import ray

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        run("death", max_failures=0)


def test_a_worker_that_runs_out_of_memory_is_not_tried_without_end(run):
    with pytest.raises(KtrayError, match=r"out of memory in 1 attempt \(4.95GB used / 5.00GB on its machine") as told:
        run("memory", max_failures=0)
    assert "train.batch_size" in str(told.value)


def test_three_of_one_to_three_workers_train_as_one_does_and_survive_a_death(cluster, tmp_path):
    """Three workers have three, three and two of eight lanes; the last dies once."""

    def run(name, plan):
        kept, posts = {}, []
        with open_mailbox(posts.append) as board:
            outcome = train(
                Shared(tmp_path / "marker", tmp_path / name),
                Stage(str(tmp_path / name)),
                plan,
                board,
                max_failures=1,
                on_weights=lambda path: kept.update(load_file(str(path))),
            )
        return outcome, kept, posts

    one, expected, _ = run("one", replace(cluster, least=1, workers=1, worker_gpus=0.0))
    assert not (tmp_path / "marker").exists()
    # On this one node three fit.
    outcome, weights, posts = run("three", replace(cluster, least=1, workers=3, worker_cpus=0.25, worker_gpus=0.0))
    assert (tmp_path / "marker").read_text() == "3"
    assert outcome.state.step == one.state.step == STEPS
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)
    starts = [post for post in posts if isinstance(post, Started)]
    assert [post.workers for post in starts] == [3, 3]
    assert 0 < starts[1].step <= FAILS, "it did not go on from a checkpoint"
    states = [post.state for post in posts if isinstance(post, ControllerState)]
    assert states.count("restarting") == 1
    assert states[-1] == "finished"


def test_workers_that_nobody_has_room_for_end_with_what_was_asked_and_what_is_free(cluster, tmp_path):
    from ray._private.state import actors

    def controllers():
        return [a for a in actors().values() if a["ActorClassName"] == "TrainController" and a["State"] == "ALIVE"]

    plan = replace(cluster, least=2, workers=2, worker_cpus=50.0, worker_gpus=0.0)
    with (
        open_mailbox(lambda post: None) as board,
        watch(Watchdog("transfer", 6 / 60)),
        pytest.raises(KtrayError) as caught,
    ):
        train(Toy(tmp_path / "m", ""), Stage(str(tmp_path / "s")), plan, board, max_failures=1, on_weights=print)
    assert "waiting for its training workers (requested: 2 workers with 50 CPUs each, " in caught.value.what
    assert f"of {cluster.total_cpus:g} CPUs" in caught.value.remedy
    limit = time.monotonic() + 20
    while controllers() and time.monotonic() < limit:
        time.sleep(0.2)
    assert not controllers(), "it goes on trying"
    time.sleep(5)  # a controller that came late would have its group by now
    groups = ray.util.placement_group_table().values()
    assert not [g for g in groups if g["state"] != "REMOVED"], "an autoscaler would go on adding machines"
