"""The student as an ONNX file in float32, which is part of every export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx

from ktray.jobs.export import onnx_file
from ktray.jobs.export.targets.base import ExportTarget, ExportWork
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS

logger = logging.getLogger("ktray")

FILE = "student.onnx"


class OnnxTarget(ExportTarget):
    """``student.onnx``; see `ktray.jobs.export.onnx_file`."""

    file, order, serves = FILE, 0, "float"
    libraries = ("onnx", "onnxruntime", "onnxscript")

    def wanted(self, part: ExportConfig) -> bool:
        return True

    def write(self, work: ExportWork) -> dict[str, Any]:
        logger.info(f"export    {work.student.name} of {work.source.run_id} to ONNX, opset {onnx_file.OPSET}")
        path = work.folder / FILE
        onnx_file.write(work.student, path)
        return onnx_file.signature(onnx.load(str(path)))

    def calibrate(self, path: Path, temperature: float) -> bool:
        onnx_file.set_temperature(path, temperature)
        return True


EXPORTS.register("onnx")(OnnxTarget())
