"""A student as an ONNX file with a free batch size, which contains the class names and the preprocessing."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from timm.utils.model import reparameterize_model

from ktray.errors import KtrayError
from ktray.jobs.export.predict import METADATA
from ktray.models.messages import cause
from ktray.models.student.classifier import Student

OPSET = 18  # the lowest that torch's exporter writes; onnxruntime has read it since 1.14 (February 2023)
IR_VERSION = 8  # the lowest that allows this opset; torch's exporter writes 10, which onnxruntime reads since 1.18
INPUT, OUTPUT = "image", "logits"


def write(student: Student, path: Path) -> None:
    """Write a model that maps normalised float images (N, 3, height, width) to logits (N, C), with any N.

    Networks with additional branches during training (FastViT, RepVGG) are written with merged branches, by timm's
    function for it.

    Raises:
        KtrayError: torch cannot export the model, or onnx's checker rejects the file.
    """
    model = reparameterize_model(student.model)  # a copy
    example = torch.zeros(2, 3, *student.preprocess.size)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        # The weights are in the same file: protobuf allows 2 GB, and students are far smaller.
        program.save(str(path))
        graph = onnx.load(str(path))
    except Exception as error:  # torch's exporter has many exception types of its own
        raise KtrayError(
            f"Student '{student.name}' cannot be exported to ONNX: {cause(error)}",
            "Its folder can be loaded in timm; choose another student.name for ONNX.",
        ) from error
    annotate(graph, student)
    check(graph, path)
    onnx.save(graph, str(path))


def annotate(model: onnx.ModelProto, student: Student) -> None:
    """Write class names and preprocessing into the file's metadata, from which `predict` reads them, in the lowest
    version of the file format that holds the model."""
    make_portable(model)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(student.served_facts(), ensure_ascii=False)})


def make_portable(model: onnx.ModelProto) -> None:
    """Lower the version of the file format to `IR_VERSION`, without what only newer versions have: notes of the
    exporter on nodes and values, which no runtime reads."""
    model.ir_version = min(model.ir_version, IR_VERSION)
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]


def set_temperature(path: Path, temperature: float) -> None:
    """Write the temperature, which `predict` divides logits by, into the metadata of a file that has the other facts.
    The graph and its logits stay as they are."""
    model = onnx.load(str(path))
    (entry,) = [prop for prop in model.metadata_props if prop.key == METADATA]
    entry.value = json.dumps({**json.loads(entry.value), "temperature": temperature}, ensure_ascii=False)
    onnx.save(model, str(path))


def check(model: onnx.ModelProto, path: Path) -> None:
    """Raise `KtrayError` if the graph is not valid ONNX, or if its batch size is fixed."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise KtrayError(f"'{path.name}' is not valid ONNX: {cause(error)}", "Report the student's name.") from error
    for value in (model.graph.input[0], model.graph.output[0]):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise KtrayError(
                f"'{path.name}' has a fixed batch size in '{value.name}'", "Choose another student.name for ONNX."
            )


def signature(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the opset, and name and shape of input and output; a free size is None."""

    def value(info: onnx.ValueInfoProto) -> dict[str, Any]:
        shape = [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
        return {"name": info.name, "dtype": "float32", "shape": shape}

    opsets = {info.domain: info.version for info in model.opset_import}
    return {
        "opset": opsets.get("", opsets.get("ai.onnx")),
        "input": value(model.graph.input[0]),
        "output": value(model.graph.output[0]),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context, hide warnings of torch's exporter about its own internals, also those through logging."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
