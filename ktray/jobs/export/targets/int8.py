"""The ONNX file with 8-bit weights and activations, quantised with the best settings on validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ktray.data.labelled.read import LabelledSet
from ktray.jobs.export import agreement, onnx_file, quantise
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.targets import onnx
from ktray.jobs.export.targets.base import ExportTarget, ExportWork
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS

_TRIED = len(quantise.FIRST) + len(quantise.then(quantise.FIRST[0]))


class Int8Target(ExportTarget):
    """``student.int8.onnx``; see `ktray.jobs.export.quantise`."""

    file, order, exact = "student.int8.onnx", 10, False
    asked_by, serves = "export.int8=true", "int8"

    def wanted(self, part: ExportConfig) -> bool:
        return part.int8

    def options(self, part: ExportConfig) -> list[Any]:
        return [part.calibration]

    def passes(self, part: ExportConfig, task: LabelledSet) -> int:
        return _TRIED * (len(task.val) + part.calibration) + len(task.test)

    def plan(self, part: ExportConfig) -> str:
        return f", {part.calibration} training images for calibration, at most {_TRIED} settings"

    def write(self, work: ExportWork) -> dict[str, Any]:
        part, task, metric = work.source.recipe.export, work.task, work.source.metric
        # The examples are ordered by class, so these are spread evenly over the classes. Test images are never used.
        spread = np.linspace(0, len(task.train) - 1, min(part.calibration, len(task.train))).round().astype(int)
        chosen = [task.train[i] for i in spread.tolist()]
        calibration = work.split("train", chosen).held(work.scratch / "train.npy").pixels
        kind, labels = work.source.kind, work.on_val.labels

        def accuracy(model: Classifier) -> float:
            outputs = agreement.outputs(kind, model, work.validation.batches())
            return float(kind.exported_metrics(work.student, outputs, labels)[metric])

        full = kind.exported_metrics(work.student, work.on_val.outputs["onnx"], labels)
        source, target = work.folder / onnx.FILE, work.folder / self.file
        return quantise.choose(work.student, source, target, calibration, accuracy, float(full[metric]))

    def calibrate(self, path: Path, temperature: float) -> bool:
        onnx_file.set_temperature(path, temperature)
        return True

    def notes(self, name: str, content: dict[str, Any], split: str, what: str) -> list[str]:
        values = content["metric"][split] or {}
        if name not in values:
            return []
        eight, full = (values[model]["metric"] for model in (name, "onnx"))
        if full - eight <= quantise.NOTABLE:
            return []
        return [
            f"The 8-bit file loses {100 * (full - eight):.1f} points on {what} ({eight:.1%} instead of {full:.1%}), "
            f"which is more than one: {onnx.FILE} is the better choice unless size or speed matter more."
        ]


EXPORTS.register("int8")(Int8Target())
