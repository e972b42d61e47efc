"""The student as one ONNX graph from uint8 pixels to probabilities and decisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from ktray.jobs.export import onnx_file
from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import PROBABILITIES, Form, ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS


class OnnxPixelsTarget(GraphTarget):
    """``student.pixels.onnx``; any number of images. ``student.onnx`` has the logits, which other tools expect."""

    file, format = "student.pixels.onnx", "ONNX"
    libraries = ("onnx", "onnxruntime", "onnxscript")
    use = (
        "`student.pixels.onnx` needs no other code: uint8 pixels (N, 3, height, width) in, probabilities and class out."
    )

    def form(self, part: ExportConfig) -> Form:
        return PROBABILITIES

    def convert(self, graph: ServedGraph, path: Path) -> None:
        program = torch.onnx.export(
            graph.net,
            (graph.example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[graph.input],
            output_names=list(graph.outputs),
            opset_version=onnx_file.OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
        model = onnx.load(str(path))
        onnx_file.make_portable(model)
        # Under another name than that of `student.onnx`: predict.py would take the probabilities for logits.
        onnx.helper.set_model_props(model, {"classes": json.dumps(graph.facts["classes"], ensure_ascii=False)})
        onnx_file.check(model, path)
        onnx.save(model, str(path))

    def session(self, path: Path, threads: int | None) -> Session:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        model = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = model.get_inputs()

        def run(x: np.ndarray) -> list[np.ndarray]:
            found: list[np.ndarray] = model.run(None, {entry.name: x})
            return found

        return run

    def options(self, part: ExportConfig) -> list[Any]:
        return [part.abstain]


EXPORTS.register("onnx_pixels")(OnnxPixelsTarget())
