"""Teacher families: found by their folder, asked by the word before the colon."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from ktray.errors import KtrayError
from ktray.models.teacher.families.base import (
    ResolvedTeacher,
    TeacherFamily,
    TeacherParts,
    TeacherSource,
    family_of,
    model_of,
)
from ktray.models.teacher.load import load_teacher
from ktray.recipe.registries import TEACHERS


def test_the_families_that_ship_are_found() -> None:
    assert {"miniverse", "open_clip", "timm"} <= set(TEACHERS.names())
    assert all(isinstance(family, TeacherFamily) and family.syntax for _, family in TEACHERS)


def test_has_text_is_known_without_loading(tiny_clip: SimpleNamespace, tiny_vit: SimpleNamespace) -> None:
    clip = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    for teacher in (clip, load_teacher("timm:test_vit", tiny_vit.checkpoint), load_teacher("miniverse")):
        assert family_of(teacher.name).has_text == teacher.has_text


@pytest.mark.parametrize("name", ["miniverse:small", "timm", "timm:", "nothing:model", ""])
def test_a_name_of_no_family_lists_all_of_them(name: str) -> None:
    with pytest.raises(KtrayError, match="is not the name of a teacher") as caught:
        load_teacher(name)
    for part in ("miniverse", "open_clip:<model>/<pretrained>", "timm:<model>", "ktray.teachers"):
        assert part in caught.value.remedy


def test_the_model_is_what_stands_behind_the_first_colon() -> None:
    assert model_of("toy:a:b") == "a:b"
    assert model_of("miniverse") == ""


def test_a_family_needs_two_methods_only() -> None:
    class Least(TeacherFamily):
        syntax = "least:<model>"

        def resolve(self, source: TeacherSource) -> ResolvedTeacher:
            return ResolvedTeacher(source, "least", model_of(source.name))

        def build(self, found: ResolvedTeacher, *rest: object) -> TeacherParts:
            raise NotImplementedError

    family, tower = Least(), nn.Linear(2, 3)
    assert family.architecture(family.resolve(TeacherSource("least:one"))) == "one"
    assert (family.has_text, family.map_widths(tower), family.layer_order(tower)) == (False, [], None)
    assert family.licence("one").startswith("unknown")
    assert family.untrained("one") is None


def test_an_assumed_activation_is_told() -> None:
    family = family_of("open_clip:ViT-B-32")
    told = family.caution(TeacherSource("open_clip:ViT-B-32", "/x.safetensors"))
    assert "QuickGELU" in told
    assert "teacher.name=open_clip:ViT-B-32/openai" in told
    assert family.caution(TeacherSource("open_clip:ViT-B-32/openai", "/x.safetensors")) == ""
    assert family.caution(TeacherSource("open_clip:ViT-B-32")) == ""
    assert family.caution(TeacherSource("open_clip:ViT-B-16-SigLIP", "/x.safetensors")) == ""
    assert family_of("timm:vit_base").caution(TeacherSource("timm:vit_base", "/x")) == ""
