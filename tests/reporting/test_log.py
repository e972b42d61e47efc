"""Lines of several runs at once: titles, and runs that are not shown."""

from __future__ import annotations

import logging
import threading

from heard import hearing

from ktray.reporting.log import logger, muted, titled


def test_each_line_has_the_title_of_its_run() -> None:
    lines: list[str] = []
    with hearing(lines):
        with titled("trial 3"):
            logger.info("first\nsecond")
            logger.info("%d of %d", 1, 2)
        with titled(None):
            logger.info("plain")
        logger.info("after")
    assert lines == ["[trial 3] first\n[trial 3] second", "[trial 3] 1 of 2", "plain", "after"]


def test_a_muted_run_shows_warnings_only() -> None:
    lines: list[str] = []
    with hearing(lines):
        with muted():
            logger.info("hidden")
            logger.warning("seen")
        logger.info("after")
    assert lines == ["seen", "after"]


def test_another_threads_lines_are_its_own() -> None:
    lines: list[str] = []

    def other() -> None:
        logger.info("of the other thread")

    with hearing(lines), titled("mine", muted=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        logger.info("hidden")
    assert lines == ["of the other thread"]


def test_the_library_configures_nothing() -> None:
    assert logging.getLogger("ktray").handlers == []
    assert logging.getLogger("ktray").propagate
