"""The small teacher that ships with ktray: ``miniverse``. An open_clip model whose files lie in the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

import ktray
from ktray.models.teacher.families.base import ResolvedTeacher, TeacherSource, model_of, not_a_name
from ktray.models.teacher.families.open_clip import OpenClipFamily
from ktray.recipe.registries import TEACHERS

FOLDER = Path(ktray.__file__).parent / "miniverse" / "teacher"


class MiniverseFamily(OpenClipFamily):
    """One teacher. Files of a checkpoint and a config may be named for it all the same."""

    syntax = "miniverse"

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        if model_of(source.name):
            raise not_a_name(source.name)
        checkpoint = source.checkpoint or str(FOLDER / "model.safetensors")
        config = source.config or str(FOLDER / "miniverse.json")
        found = super().resolve(replace(source, name="open_clip:miniverse", checkpoint=checkpoint, config=config))
        return replace(found, source=source)

    def licence(self, model: str) -> str:
        return "apache-2.0 (ships with ktray, trained on drawn pictures alone)"

    def untrained(self, model: str) -> nn.Module | None:
        return None


TEACHERS.register("miniverse")(MiniverseFamily())
