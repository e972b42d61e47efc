"""The base class of targets that are converted from the PyTorch graph of the student."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export import latency, served_graph
from ktray.jobs.export.agreement import Scorer
from ktray.jobs.export.graph_scorer import AnswerScorer, LogitScorer, Session
from ktray.jobs.export.quiet import quiet
from ktray.jobs.export.runnable import Runnable
from ktray.jobs.export.served_graph import PROBABILITIES, Form, ServedGraph
from ktray.jobs.export.targets.base import ExportTarget, ExportWork
from ktray.models.messages import cause
from ktray.recipe.export import ExportConfig


class GraphTarget(ExportTarget):
    """One file format that a library converts from a `ServedGraph`, and a runtime for it."""

    order = 50
    format: str = ""
    """Name of the format in messages."""
    single: bool = False
    """Whether the file takes one image at a time; otherwise it takes any number."""
    pixels: torch.dtype = torch.uint8
    """dtype of the input of a graph with probabilities."""

    @abstractmethod
    def convert(self, graph: ServedGraph, path: Path) -> None:
        """Write the file and its companions. Exceptions of any type become a `KtrayError`."""

    @abstractmethod
    def session(self, path: Path, threads: int | None) -> Session:
        """Open the file: a function from (N, 3, height, width) to the outputs in order. N is 1 if `single`."""

    def prepare(self) -> None:
        """Import the libraries that `session` needs, so that their memory is not counted as the model's."""

    def form(self, part: ExportConfig) -> Form:
        """Return what the file computes."""
        return part.graph

    def options(self, part: ExportConfig) -> list[Any]:
        return [self.form(part), part.abstain]

    def confident(self, part: ExportConfig) -> bool:
        # A file of logits has the temperature in its description.
        return True

    def calibrate(self, path: Path, temperature: float) -> bool:
        return True

    def write(self, work: ExportWork) -> dict[str, Any]:
        form, path = self.form(work.source.recipe.export), work.folder / self.file
        graph = served_graph.build(work.student, form, work.confidence, self.single, self.pixels)
        try:
            with quiet():
                self.convert(graph, path)
        except KtrayError:
            raise
        except Exception as error:  # converters raise exceptions of many types
            raise KtrayError(
                f"Student '{work.student.name}' cannot be exported to {self.format}: {cause(error)}",
                f"Remove {self.name} from export.targets, or choose another student.name.",
            ) from error
        graph.write_facts(path)
        return graph.signature()

    def load(self, path: Path) -> Scorer | None:
        if self.unchecked():
            return None
        facts = served_graph.read_facts(path)
        session = self._opened(path, None)
        kind = AnswerScorer if facts["graph"] == PROBABILITIES else LogitScorer
        return kind(self._batched(session), facts, path.name)

    def latency(self, path: Path, batch: int) -> dict[str, Any] | None:
        return latency.measure(path, batch, name=self.name)

    def loader(self) -> Callable[[Path, int], Runnable]:
        """Return the function that opens a file to be timed."""
        self.prepare()

        def load(path: Path, threads: int) -> Runnable:
            facts = served_graph.read_facts(path)
            height, width = facts["preprocess"]["size"]
            session = self._batched(self._opened(path, threads))
            return Runnable((height, width), session, facts["input"]["dtype"])

        return load

    def _opened(self, path: Path, threads: int | None) -> Session:
        try:
            for name in (path.name, *self.companions):
                if not path.with_name(name).stat().st_size:
                    raise ValueError(f"{name} is empty")
            with quiet():
                return self.session(path, threads)
        except KtrayError:
            raise
        except Exception as error:
            raise KtrayError(
                f"'{path.name}' cannot be opened as {self.format}: {cause(error)}", "Write the export again."
            ) from error

    def _batched(self, session: Session) -> Session:
        """A session for any number of images."""
        if not self.single:
            return session

        def run(x: np.ndarray) -> list[np.ndarray]:
            rows = [session(x[at : at + 1]) for at in range(len(x))]
            return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

        return run
