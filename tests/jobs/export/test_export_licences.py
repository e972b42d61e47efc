"""Licences are told where a library tells them, and are unknown everywhere else."""

import pytest

from ktray import recipe as recipes
from ktray.jobs.export import licences


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"teacher.name": "miniverse"}, "apache-2.0 (ships with ktray"),
        ({"teacher.name": "timm:vit_large_patch14_dinov2.lvd142m"}, "apache-2.0 (according to timm"),
        ({"teacher.name": "timm:vit_base_patch16_dinov3.lvd1689m"}, "dinov3-license"),
        (
            {"teacher.name": "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"},
            "unknown: check (the model card of laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K)",
        ),
        ({"teacher.name": "open_clip:ViT-B-16"}, "unknown: check"),
        ({"teacher.name": "timm:no_such_model"}, "unknown: check"),
        ({"teacher.name": "timm:resnet50", "teacher.checkpoint": "mine.safetensors"}, "unknown: check (weights of"),
        ({}, "unknown: check"),
    ],
)
def test_teachers(keys: dict[str, str], expected: str) -> None:
    assert licences.of_teacher(recipes.override(recipes.Recipe(), keys)).startswith(expected)


def test_students_start() -> None:
    def of(**keys: object) -> str | None:
        named = {f"student.{key}": value for key, value in keys.items()}
        return licences.of_student(recipes.override(recipes.Recipe(), named))

    assert of(name="resnet18") is None
    assert str(of(name="fastvit_s12", pretrained=True)).startswith("fastvit-license")
    assert str(of(name="resnet18", checkpoint="mine.safetensors")).startswith("unknown: check")
