from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ktray.errors import BadImage, KtrayError
from ktray.models.student.classifier import build_student
from ktray.models.student.classifier_io import load_student, save_student
from ktray.models.student.given import AnyImage


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_efficientnet", {}),
        ("test_vit", {"patch_size": 8}),
        ("convnext_atto", {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ],
)
def test_plain_timm_loads_a_saved_student(name: str, kwargs: dict, tmp_path: Path, photo: np.ndarray) -> None:
    student = build_student(name, kwargs, num_classes=3, image_size=64)
    # Buffers must travel too.
    student.train()(torch.randn(4, 3, 64, 64))
    student.eval()
    classes = ["a b", "ü", "c"]
    save_student(student, tmp_path, classes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert set(load_file(tmp_path / "model.safetensors")) == set(plain.state_dict())
    assert type(plain).__module__.startswith("timm.")
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(plain), is_training=False)
    with torch.inference_mode():
        expected = plain(theirs(Image.fromarray(photo))[None]).softmax(1)[0]

    again = load_student(tmp_path)
    assert again.classes == classes == plain.pretrained_cfg["label_names"]
    assert again.preprocess == student.preprocess
    assert again.preprocess.size == (64, 64)
    [found] = again.predict([photo])
    np.testing.assert_allclose(list(found.probabilities.values()), expected.numpy(), atol=1e-5)
    assert found.label == classes[int(expected.argmax())]
    assert found.probability == max(found.probabilities.values())


def test_predict_takes_every_form_of_image(photo: np.ndarray, tmp_path: Path) -> None:
    student = build_student("test_efficientnet", num_classes=2, image_size=32)
    pil = Image.fromarray(photo)
    encoded = io.BytesIO()
    pil.save(encoded, "PNG")
    (tmp_path / "x.png").write_bytes(encoded.getvalue())
    content = encoded.getvalue()
    pq.write_table(pa.table({"image": [{"bytes": content, "path": "x.png"}]}), tmp_path / "x.parquet")
    named: list[AnyImage] = [tmp_path / "x.png", f"{tmp_path}/x.png", f"{tmp_path}/x.parquet#row=0"]
    cells: list[AnyImage] = [{"bytes": content, "path": "gone.png"}, {"bytes": None, "path": f"{tmp_path}/x.png"}]
    found = student.predict([photo, pil, content, *named, pil.convert("RGBA"), *cells], batch=2)
    assert len(found) == 9
    assert torch.equal(student.transform(f"{tmp_path}/x.parquet#row=0"), student.transform(photo))
    with pytest.raises(BadImage, match=r"gone\.png': no such file"):
        student.predict([f"{tmp_path}/gone.png"])
    with pytest.raises(TypeError, match=r"A int is not an image\. Use PIL"):
        student.predict([3])  # type: ignore[list-item]
    assert len({round(f.probability, 6) for f in found}) == 1
    assert student.predict([]) == []
    with pytest.raises(BadImage):
        student.predict([b"no image"])


def test_wrappers_leave_no_trace(tmp_path: Path) -> None:
    student = build_student("test_efficientnet", num_classes=2, image_size=32)
    student.model = torch.compile(student.model)
    save_student(student, tmp_path, ["a", "b"])
    assert not any("_orig_mod" in k or "model." in k for k in load_file(tmp_path / "model.safetensors"))
    load_student(tmp_path)


def test_features_are_what_the_classifier_sees() -> None:
    student = build_student("test_vit", num_classes=5, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        features = student.features(x)
        assert features.shape == (2, student.feature_dim)
        torch.testing.assert_close(student.model.get_classifier()(features), student(x))


def test_uint8_logits_are_normalised() -> None:
    student = build_student("test_efficientnet", num_classes=2, image_size=32).eval()
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (student.preprocess.mean, student.preprocess.std))
    with torch.inference_mode():
        torch.testing.assert_close(student.logits(batch), student.model((batch / 255 - mean) / std))


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("fastvit_s21", {}, r"no timm model.*fastvit_s"),
        ("test_resnet", {"patchsize": 4}, r"no argument 'patchsize'"),
        ("test_vit", {"num_classes": 4}, r"num_classes cannot be set"),
        ("test_vit", {"patch_size": 5}, r"cannot (be built|process)"),
        ("test_vit", {"embed_dim": -1}, r"cannot be built"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, kwargs: dict, match: str) -> None:
    with pytest.raises(KtrayError, match=match):
        build_student(name, kwargs, num_classes=2, image_size=32)


def test_one_position_is_warned_of() -> None:
    assert "1x1" in build_student("mobilenetv3_small_050", {}, 2, image_size=32).warnings[0]
    assert not build_student("mobilenetv3_small_050", {}, 2, image_size=64).warnings
    assert "1x1" in build_student("test_vit", {"patch_size": 32}, 2, image_size=32).warnings[0]
    assert not build_student("test_vit", {}, 2, image_size=32).warnings


def test_checkpoints_start_a_student(tmp_path: Path) -> None:
    source = build_student("test_efficientnet", num_classes=7, image_size=64)
    path = tmp_path / "start.safetensors"
    save_file({k: v.clone() for k, v in source.model.state_dict().items()}, str(path))
    same = build_student("test_efficientnet", num_classes=7, image_size=64, checkpoint=str(path))
    assert not same.warnings
    assert torch.equal(same.model.get_classifier().weight, source.model.get_classifier().weight)
    other = build_student("test_efficientnet", num_classes=3, image_size=64, checkpoint=str(path))
    assert "other classes" in other.warnings[0]
    assert torch.equal(other.model.conv_stem.weight, source.model.conv_stem.weight)
    with pytest.raises(KtrayError, match=r"do not fit.*student.checkpoint"):
        build_student("test_resnet", num_classes=7, image_size=64, checkpoint=str(path))
    with pytest.raises(KtrayError, match=r"no file.*student.checkpoint"):
        build_student("test_resnet", num_classes=7, checkpoint=str(tmp_path / "none.pt"))


def test_published_weights_need_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(KtrayError, match=r"network or hub is not available.*student.checkpoint"):
        build_student("test_vit", num_classes=2, image_size=32, pretrained=True)
    with pytest.raises(KtrayError, match="publishes no weights"):
        build_student("test_vit4", num_classes=2, image_size=32, pretrained=True)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match="contains no student"):
        load_student(tmp_path)
    student = build_student("test_efficientnet", num_classes=2, image_size=32)
    with pytest.raises(KtrayError, match="2 logits for 3 classes"):
        save_student(student, tmp_path, ["a", "b", "c"])
    save_student(student, tmp_path, ["a", "b"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, str(tmp_path / "model.safetensors"))
    with pytest.raises(KtrayError, match="missing"):
        load_student(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(KtrayError, match="cannot be read"):
        load_student(tmp_path)
    student.kwargs = {"act_layer": nn.ReLU}
    with pytest.raises(KtrayError, match="cannot be saved"):
        save_student(student, tmp_path, ["a", "b"])


def test_config_holds_no_address_of_foreign_weights(tmp_path: Path) -> None:
    save_student(build_student("test_vit", num_classes=2, image_size=32), tmp_path, ["a", "b"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"hf_hub_id", "url", "file"} & set(config["pretrained_cfg"])
    assert config["model_args"] == {"img_size": 32}
