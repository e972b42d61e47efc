"""Heartbeats reach who listens, and not more often than needed."""

import threading

from ktray.reporting import heartbeat
from ktray.reporting.heartbeat import Heartbeat, beat, heard_by


def test_beats_are_passed_on_within_the_context_and_not_too_often(monkeypatch):
    now, heard = [100.0], []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    beat("nobody listens")
    with heard_by(heard.append):
        for tenth in range(50):
            now[0] = 100.0 + tenth / 10
            beat(f"{tenth} images")
    beat("nobody listens any more")
    assert heard == [Heartbeat("0 images"), Heartbeat("20 images"), Heartbeat("40 images")]


def test_other_threads_have_listeners_of_their_own():
    here, there = [], []

    def work():
        beat("unheard")
        with heard_by(there.append):
            beat("there")

    with heard_by(here.append):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        beat("here")
    assert (here, there) == ([Heartbeat("here")], [Heartbeat("there")])
