"""The student for LiteRT (TensorFlow Lite), float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.registries import EXPORTS


class LiteRtTarget(GraphTarget):
    """``student.tflite``; one image at a time: the converter needs fixed sizes."""

    file, single = "student.tflite", True
    format, libraries, extra = "LiteRT", ("litert-torch", "ai-edge-litert"), "litert"
    use = (
        "LiteRT: `ai_edge_litert.interpreter.Interpreter('student.tflite')`, or its libraries for Android and iOS. The "
        "input has the order (1, 3, height, width)."
    )

    def convert(self, graph: ServedGraph, path: Path) -> None:
        import litert_torch

        litert_torch.convert(graph.net, (graph.example,)).export(str(path))

    def prepare(self) -> None:
        import ai_edge_litert.interpreter  # noqa: F401

    def session(self, path: Path, threads: int | None) -> Session:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
        (input_index,) = [one["index"] for one in interpreter.get_input_details()]
        # Names, such as "output_1", end with the position in the tuple; the order of the list is not that of the tuple.
        outputs = sorted(interpreter.get_signature_runner().get_output_details().items())
        indices = [one["index"] for _, one in outputs]

        def run(x: np.ndarray) -> list[np.ndarray]:
            interpreter.set_tensor(input_index, x)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in indices]

        return run


EXPORTS.register("litert")(LiteRtTarget())
