"""What the speeds of stages depend on that ``jobs/bench.py`` measures too: the same facts as in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ktray.models.teacher.spec import TeacherSpec
from ktray.recipe.schema import TrainConfig
from ktray.training.inputs import StudentSpec


def index_facts(encoder: TeacherSpec | None, crops: Any) -> dict[str, Any]:
    """Facts of INDEX.

    Args:
        encoder: None: only fingerprints are computed.
        crops: kind and number of crops; None: whole images.
    """
    return {
        "model": encoder.source.name if encoder else None,
        "size": encoder.preprocess.size[0] if encoder else 0,
        "crops": crops,
    }


def teach_facts(teacher: str | None, size: int, targets: Sequence[str], jpeg: bool) -> dict[str, Any]:
    """Facts of TEACH.

    Args:
        teacher: names of the teachers; None without one.
        size: side of the views, pixels.
        jpeg: whether views are stored as JPEG.
    """
    return {"model": teacher, "size": size, "targets": list(targets), "jpeg": jpeg}


def transfer_facts(student: StudentSpec, objective: str, train: TrainConfig, mode: str) -> dict[str, Any]:
    """Facts of TRANSFER.

    Args:
        objective: name of the objective.
        mode: ``teach.mode``.
    """
    return {
        "model": student.name,
        "size": student.image_size,
        "kwargs": student.kwargs,
        "objective": objective,
        "batch": train.batch_size,
        "precision": train.precision,
        "mode": mode,
    }
