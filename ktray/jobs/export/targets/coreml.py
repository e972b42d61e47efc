"""The student for Apple's devices: a Core ML program, float32. It is converted anywhere, and runs on macOS and iOS."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import PIXELS, ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.registries import EXPORTS

SUFFIX = ".mlpackage"


class CoreMlTarget(GraphTarget):
    """``student.mlpackage.zip``, since a Core ML package is a folder; one image at a time.

    A graph with probabilities takes an image (RGB, 8 bits) instead of an array.
    """

    file, single, pixels = "student.mlpackage.zip", True, torch.float32
    format, libraries, extra = "Core ML", ("coremltools",), "coreml"
    use = "Core ML: unzip `student.mlpackage.zip` and add `student.mlpackage` to an Xcode project."

    def unchecked(self) -> str:
        return (
            "" if sys.platform == "darwin" else "Core ML models run only on Apple's systems; export on macOS to check."
        )

    def convert(self, graph: ServedGraph, path: Path) -> None:
        import coremltools as ct

        shape = tuple(graph.example.shape)
        if graph.input == PIXELS:
            inputs: list[Any] = [ct.ImageType(graph.input, shape=shape, color_layout=ct.colorlayout.RGB)]
        else:
            inputs = [ct.TensorType(graph.input, shape=shape, dtype=np.float32)]
        model = ct.convert(
            graph.program().run_decompositions({}),
            convert_to="mlprogram",
            inputs=inputs,
            outputs=[ct.TensorType(name) for name in graph.outputs],
            compute_precision=ct.precision.FLOAT32,
        )
        model.short_description = "A student that ktray exported"
        model.user_defined_metadata["classes"] = "\n".join(graph.facts["classes"])
        with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
            package = Path(scratch) / "package" / f"student{SUFFIX}"
            model.save(str(package))
            archive = shutil.make_archive(str(Path(scratch) / "archive"), "zip", package.parent, package.name)
            shutil.move(archive, path)

    def session(self, path: Path, threads: int | None) -> Session:
        import coremltools as ct
        from PIL import Image

        if threads is not None:
            raise KtrayError("The number of threads of Core ML cannot be set", "Measure it on the device.")
        with tempfile.TemporaryDirectory(prefix="ktray-") as scratch, zipfile.ZipFile(path) as archive:
            archive.extractall(scratch)
            model = ct.models.MLModel(f"{scratch}/student{SUFFIX}", compute_units=ct.ComputeUnit.CPU_ONLY)
        description = model.get_spec().description
        (entry,) = description.input
        names = [output.name for output in description.output]

        def run(x: np.ndarray) -> list[np.ndarray]:
            value = Image.fromarray(x[0].astype(np.uint8).transpose(1, 2, 0)) if entry.name == PIXELS else x
            found = model.predict({entry.name: value})
            return [np.asarray(found[name]) for name in names]

        return run

    def latency(self, path: Path, batch: int) -> dict[str, Any] | None:
        return None


EXPORTS.register("coreml")(CoreMlTarget())
