"""The log of a run, and the threads that send it: one for each tracker, which continues where it stopped."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from ktray.redact import scrub
from ktray.tracking.base import Destination, EventTracker, Sink

logger = logging.getLogger("ktray")

_BATCH = 500


class EventLog:
    """``log.jsonl``, with a line for each event. Callers of `append` hold ``lock``."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not text.endswith("\n"):  # a job was killed while it wrote the last line
            with path.open("a", encoding="utf-8") as handle:
                handle.write("\n")
        self.earlier = text.splitlines()
        self.lines = len(self.earlier)

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, default=str)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        self.lines += 1

    def note(self, text: str) -> None:
        """Add a line for people, which is not sent to any tracker."""
        with self.lock:
            self.append({"time": round(time.time(), 3), "event": "note", "text": scrub(text)})

    def unsent(self, sent: int) -> list[dict[str, Any]]:
        """Events of earlier jobs after line ``sent``, without those of students, whose weights no longer exist."""
        out = []
        for number, line in enumerate(self.earlier, start=1):
            if number <= sent:
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("event") not in (None, "note", "student"):
                out.append({**record, "line": number})
        return out


class Delivery:
    """Sends the events of a run to one tracker.

    Args:
        tracker: the tracker.
        destination: see `EventTracker.open`.
        log: the log of the run.
        state: local JSON file that stores the ids of the tracker's runs and the number of lines that are sent.

    Attributes:
        wake: a condition that is notified when ``queue`` or ``problem`` changes.
        queue: events that are not sent yet.
        problem: why the last attempt failed, with the remedy if there is one; None: it succeeded.
        refused: number of events that the tracker refused and that are not sent again.
        first_refusal: why it refused the first of them.
    """

    def __init__(self, tracker: EventTracker, destination: Destination, log: EventLog, state: Path) -> None:
        self._tracker, self._destination, self._log, self._state_file = tracker, destination, log, state
        self.wake = threading.Condition()
        self.queue: deque[dict[str, Any]] = deque()
        self.problem: str | None = None
        self.refused, self.first_refusal = 0, ""
        self._closing = threading.Event()
        self._students: dict[int, tuple[Any, Any]] = {}
        state.parent.mkdir(parents=True, exist_ok=True)
        self.state = self._read_state()
        self.queue.extend(log.unsent(self.state["sent"]))
        self._write_state()
        self._thread = threading.Thread(target=self._work, name=f"ktray-{tracker.label.lower()}", daemon=True)
        self._thread.start()

    @property
    def label(self) -> str:
        """Name of the tracker in messages."""
        return self._tracker.label

    @property
    def alive(self) -> bool:
        """Whether the thread still sends events."""
        return self._thread.is_alive()

    def put(self, record: dict[str, Any]) -> None:
        """Queue an event that is already in the log."""
        with self.wake:
            self.queue.append(record)
            self.wake.notify_all()

    def student(self, line: int, student: tuple[Any, Any]) -> None:
        """Provide the weights of a ``student`` event."""
        with self.wake:
            self._students[line] = student
            self.wake.notify_all()

    def begin_close(self) -> None:
        """Let the thread end when the queue is empty, or after one more attempt if sending fails."""
        with self.wake:
            self._closing.set()
            self.wake.notify_all()

    def join(self, timeout: float) -> int:
        """Wait for the thread; returns the number of pending events."""
        self._thread.join(timeout)
        with self.wake:
            return len(self.queue)

    def _read_state(self) -> dict[str, Any]:
        fresh = {
            "uri": scrub(self._tracker.address(self._destination)),
            "experiment": self._destination.experiment,
            "run_id": None,
            "stages": {},
            "sent": 0,
        }
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return fresh
        # Another server has no events of this run, so it receives the whole log.
        same = all(state.get(name) == fresh[name] for name in ("uri", "experiment"))
        return {**fresh, **state} if same else fresh

    def _write_state(self) -> None:
        temporary = self._state_file.with_name(self._state_file.name + ".tmp")
        temporary.write_text(json.dumps(self.state, indent=1))
        os.replace(temporary, self._state_file)

    def _head(self) -> list[dict[str, Any]]:
        """The next events to send together: metrics of one run, or a single other event; [] when closing without
        events."""
        with self.wake:
            while not self.queue:
                if self._closing.is_set():
                    return []
                self.wake.wait()
            first = self.queue[0]
            if first["event"] == "student":  # the weights arrive immediately after the event
                self.wake.wait_for(lambda: first["line"] in self._students, timeout=60)
                return [{**first, "student": self._students.get(first["line"])}]
            if first["event"] != "metrics":
                return [first]
            batch: list[dict[str, Any]] = []
            for record in self.queue:
                if record["event"] != "metrics" or record["stage"] != first["stage"] or len(batch) == _BATCH:
                    break
                batch.append(record)
            return batch

    def _work(self) -> None:
        sink: Sink | None = None
        pause, name = 1.0, self._tracker.label
        while records := self._head():
            try:
                if sink is None:
                    sink = self._tracker.open(self._destination, self.state)
                sink.deliver(records)
            except Exception as error:
                text = " ".join(str(scrub(f"{type(error).__name__}: {error}")).split())[:500]
                if remedy := str(scrub(self._tracker.remedy(error, self._destination))):
                    text = f"{text.rstrip('.')}. {remedy}"
                if self._tracker.is_transient(error):
                    if self.problem is None:
                        self._log.note(f"{name} is not reachable; events wait in this log: {text}")
                        logger.warning(
                            f"mlflow    WARNING: {self.state['uri']} does not take events ({type(error).__name__}). "
                            "The job goes on and keeps them; the reason is in log.jsonl of the run."
                        )
                    with self.wake:
                        self.problem = text
                        self.wake.notify_all()
                    if self._closing.is_set():
                        return
                    self._closing.wait(pause)
                    pause = min(60.0, 2 * pause)
                    continue
                self._log.note(f"{name} refused '{records[0]['event']}': {text}")
                self.first_refusal = self.first_refusal or f"'{records[0]['event']}': {text}"
                self.refused += len(records)
            else:
                pause = 1.0
                self.problem = None
            self.state["sent"] = records[-1]["line"]
            with self.wake:
                for record in records:
                    self.queue.popleft()
                    self._students.pop(record["line"], None)
                self.wake.notify_all()
            try:
                self._write_state()
            except OSError as error:  # for example a full disk; the events were sent, and at worst they are sent again
                self.problem = f"{self._state_file}: {error}"
