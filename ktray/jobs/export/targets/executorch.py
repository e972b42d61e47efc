"""The student for phones and embedded devices with ExecuTorch, for the processor (XNNPACK), float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ktray.jobs.export.graph_scorer import Session
from ktray.jobs.export.served_graph import ServedGraph
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.recipe.registries import EXPORTS


class ExecuTorchTarget(GraphTarget):
    """``student.pte``; one image at a time, since ExecuTorch plans the memory of the largest batch in advance."""

    file, single = "student.pte", True
    format, libraries, extra = "ExecuTorch", ("executorch",), "executorch"
    use = (
        "ExecuTorch: `executorch.runtime.Runtime.get().load_program('student.pte')`, or its libraries for Android and "
        "iOS."
    )

    def convert(self, graph: ServedGraph, path: Path) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(graph.program(), partitioner=[XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)

    def prepare(self) -> None:
        import executorch.runtime  # noqa: F401

    def session(self, path: Path, threads: int | None) -> Session:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime, Verification

        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        # The check of the file's structure is necessary: the runtime reads a damaged file outside of its memory.
        program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
        method = program.load_method("forward")
        assert method is not None

        def run(x: np.ndarray) -> list[np.ndarray]:
            # Copies: the next inference reuses the memory.
            return [np.array(value.numpy()) for value in method.execute([torch.from_numpy(x)])]

        run.program = program  # type: ignore[attr-defined]  # the method reads from the program's memory
        return run


EXPORTS.register("executorch")(ExecuTorchTarget())
