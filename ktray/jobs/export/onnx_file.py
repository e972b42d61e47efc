"""A student as an ONNX file: any number of images at once, class names and preprocessing inside."""

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
INPUT, OUTPUT = "image", "logits"


def write(student: Student, path: Path) -> None:
    """Write normalised float images (N, 3, height, width) to logits (N, C), with N free.

    Networks that are trained with more branches than they need later (FastViT, RepVGG) are written with the branches
    merged, as timm does.

    Raises:
        KtrayError: torch cannot export the model, or onnx's checker refuses what it wrote.
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
        # All in one file: protobuf ends at 2 GB, and no student is near it.
        program.save(str(path))
        graph = onnx.load(str(path))
    except Exception as error:  # torch's exporter has a dozen kinds of its own
        raise KtrayError(
            f"Student '{student.name}' cannot be exported to ONNX: {cause(error)}",
            "Its folder loads in timm as it is; choose another student.name for ONNX.",
        ) from error
    annotate(graph, student)
    check(graph, path)
    onnx.save(graph, str(path))


def annotate(model: onnx.ModelProto, student: Student) -> None:
    """Write class names and preprocessing into the file's metadata, where `predict` looks for them."""
    facts = {"classes": student.classes, "preprocess": student.preprocess.to_dict()}
    onnx.helper.set_model_props(model, {METADATA: json.dumps(facts, ensure_ascii=False)})


def check(model: onnx.ModelProto, path: Path) -> None:
    """Raises KtrayError: the graph is not valid ONNX, or its batch is not free."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise KtrayError(f"'{path.name}' is not valid ONNX: {cause(error)}", "Report the student's name.") from error
    for value in (model.graph.input[0], model.graph.output[0]):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise KtrayError(f"'{path.name}' has a fixed batch in '{value.name}'", "Choose another student.name.")


def signature(model: onnx.ModelProto) -> dict[str, Any]:
    """Opset, and name and shape of input and output; free sizes are null."""

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
    """torch's exporter warns of its own internals, also through logging."""
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
