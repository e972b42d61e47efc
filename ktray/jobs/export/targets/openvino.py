"""The student for Intel processors, GPUs and NPUs: OpenVINO's intermediate representation, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.registries import EXPORTS


class OpenVinoTarget(GraphTarget):
    """``student.openvino.xml`` (the graph) and ``student.openvino.bin`` (the weights); any number of images.

    OpenVINO rounds to bfloat16 on processors that have it unless ``INFERENCE_PRECISION_HINT`` is ``f32``. The file is
    checked and measured with ``f32``.
    """

    file, companions = "student.openvino.xml", ("student.openvino.bin",)
    format, libraries, extra = "OpenVINO", ("openvino",), "openvino"
    use = (
        "OpenVINO: `openvino.Core().compile_model('student.openvino.xml', 'CPU')`. On processors with bfloat16, it "
        "computes in bfloat16 unless `{'INFERENCE_PRECISION_HINT': 'f32'}` is passed."
    )

    def convert(self, graph: ServedGraph, path: Path) -> None:
        import openvino

        model = openvino.convert_model(graph.program())
        model.reshape([-1, *graph.example.shape[1:]])
        for port, name in zip((*model.inputs, *model.outputs), (graph.input, *graph.outputs), strict=True):
            port.get_tensor().set_names({name})
        model.set_rt_info(graph.facts["classes"], ["model_info", "labels"])
        openvino.save_model(model, str(path), compress_to_fp16=False)

    def prepare(self) -> None:
        import openvino  # noqa: F401

    def session(self, path: Path, threads: int | None) -> Session:
        import openvino

        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        outputs = [compiled.output(i) for i in range(len(compiled.outputs))]

        def run(x: np.ndarray) -> list[np.ndarray]:
            found = compiled(x)
            return [np.array(found[output]) for output in outputs]  # copies: the next inference reuses the memory

        return run


EXPORTS.register("openvino")(OpenVinoTarget())
