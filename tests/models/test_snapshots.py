"""Teachers and students from repositories of a hub on the loopback, and from folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from fake_hub import FakeHub, fake_hub
from safetensors.torch import save_file

from ktray.errors import KtrayError
from ktray.models.snapshots import is_snapshot, open_snapshot
from ktray.models.student.classifier import Student, build_student
from ktray.models.student.classifier_io import save_student
from ktray.models.teacher.load import load_teacher, teacher_fingerprint

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with fake_hub(monkeypatch) as found:
        yield found


def put(hub: FakeHub, name: str, folder: Path) -> None:
    hub.files[f"models/{name}"] = {path.name: path.read_bytes() for path in folder.iterdir()}


def timm_folder(folder: Path) -> Student:
    torch.manual_seed(0)
    student = build_student("test_resnet", {"output_stride": 8}, 3, 32).eval()
    save_student(student, folder, ["a", "b", "c"])
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "config.json").write_text(json.dumps(config))
    return student


def clip_folder(folder: Path) -> Any:
    folder.mkdir()
    file = folder / "tiny-for-tests.json"
    file.write_text(json.dumps(CLIP))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-for-tests", load_weights=False).eval()
    file.unlink()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}))
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return model


@pytest.fixture(params=["hf-hub", "local-dir"])
def place(request: pytest.FixtureRequest, hub: FakeHub, tmp_path: Path) -> Any:
    """Takes a folder and returns the name of its model: on the hub, or in the folder itself."""

    def name(folder: Path) -> str:
        if request.param == "local-dir":
            return f"local-dir:{folder}"
        put(hub, "me/model", folder)
        return "hf-hub:me/model"

    return name


def test_a_teacher_of_timm(place: Any, tmp_path: Path) -> None:
    student = timm_folder(tmp_path / "m")
    teacher = load_teacher(place(tmp_path / "m"))
    assert teacher.preprocess.mean == (0.1, 0.2, 0.3)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(teacher.image_tower(x), student.features(x))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert teacher.embed(pixels).shape == (2, teacher.embed_dim)
    assert not teacher.has_text


def test_a_teacher_of_open_clip_has_both_towers(place: Any, tmp_path: Path) -> None:
    model = clip_folder(tmp_path / "m")
    teacher = load_teacher(place(tmp_path / "m"))
    assert teacher.has_text
    assert teacher.preprocess.std == (0.4, 0.5, 0.6)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.encode_image(x)
        out = teacher.image_tower(x)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, expected)


def test_a_teacher_of_transformers(place: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    reference = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    reference.save_pretrained(tmp_path / "m")
    facts = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 3, "size": {"shortest_edge": 64}}
    (tmp_path / "m" / "preprocessor_config.json").write_text(
        json.dumps(facts | {"crop_size": {"height": 56, "width": 56}})
    )
    teacher = load_teacher(place(tmp_path / "m"))
    assert (teacher.preprocess.size, teacher.preprocess.interpolation) == ((56, 56), "bicubic")
    assert teacher.preprocess.crop_pct == 56 / 64
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(teacher.image_tower(x), reference(x).pooler_output, atol=2e-5, rtol=1e-4)


def test_a_commit_is_another_teacher_and_a_revision_may_be_named(hub: FakeHub, tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    put(hub, "me/model", tmp_path / "m")
    assert teacher_fingerprint("hf-hub:me/model") == teacher_fingerprint("hf-hub:me/model@v1")
    assert open_snapshot("hf-hub:me/model", "teacher.name").commit == "c" * 40
    assert not [request for request in hub.asked if "model.safetensors" in request]
    assert teacher_fingerprint(f"local-dir:{tmp_path}/m") != teacher_fingerprint("hf-hub:me/model")


def test_a_student_of_a_repository(place: Any, tmp_path: Path) -> None:
    original = timm_folder(tmp_path / "m")
    name = place(tmp_path / "m")
    student = build_student(name, num_classes=5, image_size=32, pretrained=True).eval()
    assert (student.name, student.kwargs) == ("test_resnet", {"output_stride": 8})
    assert student.preprocess.mean == (0.1, 0.2, 0.3)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(student.features(x), original.features(x))
        assert student(x).shape == (2, 5)
    save_student(student, tmp_path / "saved", list("abcde"))
    assert timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True).num_classes == 5
    fresh = build_student(name, num_classes=3, image_size=32).eval()
    with torch.inference_mode():
        assert not torch.allclose(fresh.features(x), original.features(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet_18"}, "names the architecture 'resnet_18', which the installed timm does not have"),
        ({"architecture": "hf-hub:x/y"}, "which the installed timm does not have"),
        (
            {"architecture": "test_resnet", "model_args": {"checkpoint_path": "/etc/passwd"}},
            "checkpoint_path, which names weights in another place",
        ),
        ({"model_type": "bert"}, r"of the type bert, which ktray does not convert"),
        ({"something": 1}, r"has no open_clip_config\.json, and no config\.json of timm"),
        ([1], "is not an object of JSON"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KtrayError, match=message):
        load_teacher(f"local-dir:{tmp_path}")


def test_a_config_of_open_clip_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    towers = {**CLIP, "text_cfg": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers}))
    with pytest.raises(KtrayError, match="trust_remote_code"):
        load_teacher(f"local-dir:{tmp_path}")


def test_what_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    for name, message in (
        ("hf-hub:me/gone", r"'hf-hub:me/gone' cannot be read from the hub.*HF_TOKEN"),
        ("hf-hub:", "is not the name of a teacher"),
        ("local-dir:models/x", r"is a relative path.*full path"),
        (f"local-dir:{tmp_path}/none", "There is no folder"),
        (f"local-dir:{tmp_path}/m", r"has no weights in one file: model\.safetensors or pytorch_model\.bin"),
    ):
        with pytest.raises(KtrayError, match=message) as raised:
            load_teacher(name)
        assert "\n" not in str(raised.value)


def test_a_pickle_with_code_is_not_opened(tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"weights": Path("x")}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(KtrayError, match="contains more than tensors"):
        load_teacher(f"local-dir:{tmp_path}/m")


def test_students_are_models_of_timm(tmp_path: Path) -> None:
    clip_folder(tmp_path / "m")
    with pytest.raises(KtrayError, match="is a model of open_clip, and students are models of timm"):
        build_student(f"local-dir:{tmp_path}/m", num_classes=2)
    assert not is_snapshot("timm:resnet18")
