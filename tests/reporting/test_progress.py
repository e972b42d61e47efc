"""The progress line, with a clock and a stream of the test's own."""

import io
import threading

import pytest

from ktray.reporting.progress import Progress, humanise


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (125, "2m05s"), (3600, "1h00m"), (11220, "3h07m"), (187200, "2d04h")],
)
def test_time_as_people_say_it(seconds: float, text: str) -> None:
    assert humanise(seconds) == text


def test_the_line_tells_amount_rate_time_left_and_waiting() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("transfer", 10_000, stream=stream, clock=clock)
    clock.now = 10
    progress.update(2_500, data_wait=0.034, extra={"loss": 0.123456, "lr": 1})
    # 2,500 in 10 s: 250 a second; 7,500 left: 30 s.
    assert (
        progress.line()
        == "transfer: 2,500/10,000 img 25% | 250 img/s | ETA 30s | 10s | data_wait 3% | loss=0.1235 lr=1"
    )


def test_a_log_gets_a_line_every_few_seconds_and_a_last_one() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("teach", 100, stream=stream, every=5, clock=clock) as progress:
        for second in range(1, 13):
            clock.now = float(second)
            progress.update(second)
    lines = stream.getvalue().splitlines()
    assert [line.split(" img")[0] for line in lines] == [
        "teach: 0/100",
        "teach: 5/100",
        "teach: 10/100",
        "teach: done | 12/100",
    ]
    assert lines[-1] == "teach: done | 12/100 img, 1.0 img/s | in 12s"
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_line_rewritten_and_never_wider_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    clock, stream = Clock(), Terminal()
    progress = Progress("index", 1000, stream=stream, clock=clock)
    for done in range(1, 6):
        clock.now += 1
        progress.update(done, extra="x" * 50)
    before = stream.getvalue()
    assert before.count("\n") == 0
    shown = before.split("\r\x1b[2K")[1:]
    assert len(shown) == 6
    assert max(map(len, shown)) == 29
    progress.close()
    assert stream.getvalue().endswith("\n")


def test_a_stage_without_news_says_what_it_waits_for() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress("adapt", 10, stream=stream, clock=clock)
    clock.now = 4.0
    progress.update(10)
    for second in range(5, 70):
        clock.now = float(second)
        progress.idle("the teacher's heads")
    assert stream.getvalue().splitlines()[1:] == [
        "adapt: 10/10 img 100% | 2.5 img/s | ETA 0s | 34s | waiting for the teacher's heads",
        "adapt: 10/10 img 100% | 2.5 img/s | ETA 0s | 1m04s | waiting for the teacher's heads",
    ]
    progress.close()
    progress.idle("nothing")
    assert stream.getvalue().splitlines()[-1].startswith("adapt: done")


def test_a_terminal_shows_the_passing_time_while_a_stage_waits() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress("transfer", 10, "step", stream=stream, clock=clock)
    for second in range(1, 8):
        clock.now = float(second)
        progress.idle("the steps of its training workers")
    shown = stream.getvalue().split("\r\x1b[2K")[2:]
    assert [line[:59] for line in shown] == [
        f"transfer: 0/10 step 0% | {second}s | waiting for the steps of its " for second in (5, 6, 7)
    ]


def test_work_done_before_counts_in_the_amount_but_not_in_the_rate() -> None:
    clock = Clock()
    progress = Progress("transfer", 2000, done=1000, stream=io.StringIO(), clock=clock)
    clock.now = 10
    progress.update(1100)
    assert progress.line() == "transfer: 1,100/2,000 img 55% | 10 img/s | ETA 1m30s | 10s"


def test_the_rate_is_that_of_the_last_moments() -> None:
    clock = Clock()
    progress = Progress("teach", None, unit="view", stream=io.StringIO(), clock=clock)
    for second in range(1, 101):  # one a second for 50 s, then 20 a second
        clock.now = float(second)
        progress.update(second if second <= 50 else 50 + 20 * (second - 50))
    assert progress.line() == "teach: 1,050 view | 20 view/s | 1m40s"
    progress.update(1050, total=2050)
    assert "1,050/2,050 view 51%" in progress.line()
    assert "ETA 50s" in progress.line()


def test_an_unknown_total_shows_no_time_left() -> None:
    clock = Clock()
    progress = Progress("curate", 0, stream=io.StringIO(), clock=clock)
    clock.now = 1
    progress.update(5)
    assert progress.line() == "curate: 5 img | 5.0 img/s | 1s"


def test_a_stage_that_breaks_says_stopped_and_later_updates_are_ignored() -> None:
    stream = io.StringIO()
    progress = Progress("adapt", 10, stream=stream, clock=Clock())
    with pytest.raises(KeyError), progress:
        raise KeyError
    written = stream.getvalue()
    assert written.splitlines()[-1].startswith("adapt: stopped")
    progress.update(5)
    progress.close()
    assert stream.getvalue() == written


def test_many_threads_and_a_closed_stream_do_no_harm() -> None:
    stream = io.StringIO()
    progress = Progress("teach", 400, stream=stream, every=0)
    threads = [
        threading.Thread(target=lambda n=n: [progress.update(n * 100 + i) for i in range(100)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 401
    assert all(line.startswith("teach: ") and line.count("teach") == 1 for line in lines)
    stream.close()
    progress.update(400)
    progress.close()
