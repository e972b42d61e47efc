import threading
from functools import partial

import pytest

from ktray.storage.concurrent import in_order
from ktray.storage.retry import _retry_seconds, retry_for


def test_results_keep_the_order_though_calls_run_together():
    meet = threading.Barrier(4, timeout=30)  # broken, so an error, unless four are under way at the same time

    def call(number):
        meet.wait()
        return number

    assert list(in_order([partial(call, number) for number in range(8)], 4)) == list(range(8))


def test_few_are_begun_before_the_first_is_taken():
    begun = []
    results = in_order((partial(begun.append, number) for number in range(100)), 3)
    next(results)
    results.close()
    assert len(begun) <= 6


def test_one_at_once_stays_in_its_thread_and_waits_for_its_turn():
    where = []
    results = in_order([lambda: where.append(threading.current_thread())] * 3, 1)
    next(results)
    assert where == [threading.current_thread()]


@pytest.mark.parametrize("at_once", [1, 4])
def test_an_error_comes_at_its_turn(at_once):
    results = in_order([lambda: 1, lambda: 1 // 0, lambda: 3], at_once)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_calls_have_the_settings_of_who_asks():
    with retry_for(7.5):
        assert list(in_order([_retry_seconds.get] * 3, 2)) == [7.5] * 3
