"""The small teacher that ships with ktray: ``miniverse``, an open_clip model whose files are in the package."""

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
    """The family of one teacher. Its checkpoint and config may be replaced with other files."""

    syntax = "miniverse"

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        if model_of(source.name):
            raise not_a_name(source.name)
        checkpoint = source.checkpoint or str(FOLDER / "model.safetensors")
        config = source.config or str(FOLDER / "miniverse.json")
        resolved = super().resolve(replace(source, name="open_clip:miniverse", checkpoint=checkpoint, config=config))
        return replace(resolved, source=source)

    def licence(self, model: str) -> str:
        return "apache-2.0 (ships with ktray, trained only on drawn images)"

    def untrained(self, model: str) -> nn.Module | None:
        return None


TEACHERS.register("miniverse")(MiniverseFamily())
