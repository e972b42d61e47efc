"""Checkpoints are as far apart as their seconds say, and further if they are expensive."""

import pytest

from ktray.training.checkpoint_interval import CHEAP, SHARE, CheckpointInterval


def measured(seconds: float, step_seconds: float, steps: int = 1000) -> CheckpointInterval:
    interval = CheckpointInterval(seconds, steps, agree=lambda value: value)
    now = 100.0
    for done in range(1, 21):
        # The first step takes long, because it allocates.
        now += 30.0 if done == 1 else step_seconds
        interval.stepped(done, now)
    return interval


def test_the_interval_follows_the_speed_without_the_first_step():
    interval = measured(15.0, 0.5)
    assert interval.every == 30
    assert [step for step in range(1, 100) if interval.due(step)] == [30, 60, 90]


def test_nothing_is_due_before_the_speed_is_known():
    interval = CheckpointInterval(15.0, 1000, agree=lambda value: value)
    interval.stepped(1, 10.0)
    assert not any(interval.due(step) for step in range(1, 100))
    interval.saved(5.0)
    assert interval.every is None


def test_an_expensive_checkpoint_takes_at_most_its_share():
    interval = measured(15.0, 0.5)
    interval.saved(CHEAP)
    assert interval.every == 30  # as requested, although 0.5 s of 15 s is more than the share
    interval.saved(6.0)  # 6 GB of a large teacher
    assert interval.every is not None
    assert 6.0 / (interval.every * 0.5) == pytest.approx(SHARE, rel=0.01)
    interval.saved(0.1)
    assert interval.every == pytest.approx(400, abs=1)  # it never becomes shorter again


def test_every_rank_has_the_interval_of_the_first():
    asked = []

    def agree(value: int) -> int:
        asked.append(value)
        return 7

    interval = CheckpointInterval(15.0, 1000, agree)
    for done, now in ((1, 1.0), (2, 2.0)):
        interval.stepped(done, now)
    assert interval.every == 7
    interval.saved(0.0)
    assert len(asked) == 2  # also if this rank would change nothing
