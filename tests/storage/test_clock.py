"""Names with a time are in order of time, wherever they were made."""

import time

import pytest

from ktray.storage.clock import day, stamp


@pytest.fixture
def zone(monkeypatch):
    def use(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield use
    monkeypatch.undo()
    time.tzset()


def test_names_of_two_zones_are_in_order_of_time(zone, monkeypatch):
    made = []
    # The second is a minute after the first, which local times would put ten hours before it.
    for name, seconds in (("Asia/Tokyo", 1_800_000_000), ("America/New_York", 1_800_000_060)):
        zone(name)
        with monkeypatch.context() as patch:
            now = time.gmtime(seconds)
            patch.setattr(time, "gmtime", lambda now=now: now)
            made.append((stamp(), day()))
    assert made == [("20270115-080000", "2027-01-15"), ("20270115-080100", "2027-01-15")]
