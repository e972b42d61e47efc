"""The student as an exported PyTorch program, which runs without ktray and timm, and which AOTInductor can compile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.registries import EXPORTS

FACTS = "ktray.json"  # name of the extra file with class names and preprocessing inside of the program's file


class TorchExportTarget(GraphTarget):
    """``student.pt2``; 1 to `ktray.jobs.export.served_graph.MAX_BATCH` images."""

    file, format, libraries = "student.pt2", "torch.export", ("torch",)
    use = "PyTorch without timm: `torch.export.load('student.pt2').module()`."

    def convert(self, graph: ServedGraph, path: Path) -> None:
        torch.export.save(graph.program(), path, extra_files={FACTS: json.dumps(graph.facts, ensure_ascii=False)})

    def session(self, path: Path, threads: int | None) -> Session:
        if threads is not None:
            torch.set_num_threads(threads)
        module = torch.export.load(path).module()

        def run(x: np.ndarray) -> list[np.ndarray]:
            with torch.no_grad():
                return [value.numpy() for value in module(torch.from_numpy(x))]

        return run


EXPORTS.register("torch_export")(TorchExportTarget())
