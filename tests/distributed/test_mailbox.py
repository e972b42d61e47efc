"""The mailbox under bad conditions; its normal use is tested with trainings."""

import time
from types import SimpleNamespace

import cloudpickle
import pytest
import ray

from ktray.distributed import mailbox as module
from ktray.distributed.mailbox import Posts, open_mailbox


def slow_ray(answers, ended):
    """Stands in for the module ``ray``: each `get` has the next answer, or raises it."""

    def get(reference, timeout):
        asked.append(reference)
        answer = answers.pop(0) if answers else []
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked, numbers = [], iter(range(99))
    actor = SimpleNamespace(drain=SimpleNamespace(remote=lambda: next(numbers)))
    return actor, asked, SimpleNamespace(get=get, kill=ended.append, exceptions=ray.exceptions)


def test_messages_that_come_late_are_not_lost(monkeypatch):
    late, posts, ended = ray.exceptions.GetTimeoutError("late"), [], []
    actor, asked, instead = slow_ray([late, late, ["a", "b"]], ended)
    monkeypatch.setattr(module, "ray", instead)
    monkeypatch.setattr(module, "ProgressActor", SimpleNamespace(remote=lambda: actor))
    with open_mailbox(posts.append, interval=0.01):
        while len(asked) < 2:
            pass
    assert asked[:3] == [0, 0, 0], "the same messages are awaited"
    assert posts == ["a", "b"]
    assert ended == [actor]


def test_the_mailbox_ends_also_if_its_last_message_is_refused(monkeypatch):
    ended = []
    actor, _, instead = slow_ray([["a"]], ended)
    monkeypatch.setattr(module, "ray", instead)
    monkeypatch.setattr(module, "ProgressActor", SimpleNamespace(remote=lambda: actor))

    def refuse(post):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), open_mailbox(refuse, interval=99):
        pass
    assert ended == [actor]


@ray.remote(num_cpus=0)
class Slow:
    def __init__(self):
        self.messages = []

    def post(self, message):
        time.sleep(0.4)
        self.messages.append(message)


def test_all_posts_are_in_the_mailbox_once_they_are_delivered(cluster):
    box = Slow.remote()
    posts = Posts(box)
    assert cloudpickle.loads(cloudpickle.dumps(posts)).mailbox == box
    for message in range(3):
        posts(message)
    posts.deliver()
    assert ray.wait([posts._last], timeout=0)[0], "it did not wait"
    ray.kill(box)
    posts(3)
    posts.deliver()  # a dead mailbox is no error
    nowhere = Posts(None)
    nowhere("message")
    nowhere.deliver()
