"""Weight files of strangers: whatever reads one, nothing in it runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from payloads import write_legacy, write_numpy, write_pickle, write_torch

from ktray.errors import KtrayError
from ktray.models.student.classifier import build_student
from ktray.models.student.classifier_io import save_student
from ktray.models.student.segmenter import build_segmenter
from ktray.models.student.segmenter_io import save_segmenter
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.tasks.students import load_student

Write = Callable[[Path, Path], Path]
FILES: list[tuple[str, Write]] = [
    ("w.pt", write_torch),
    ("w.pth", write_torch),
    ("w.bin", write_pickle),
    ("w.ckpt", write_legacy),
    ("w.safetensors", write_torch),
    ("w.npz", write_numpy),
    ("w.npy", write_numpy),
    ("weights", write_pickle),
]


def test_the_payloads_are_real_ones(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, write in FILES:
        path = write(tmp_path / name, mark)
        if write is write_numpy:
            found = np.load(path, allow_pickle=True)
            if name.endswith("z"):
                found["params/img/embedding/kernel"]
        elif write is write_pickle:
            pickle.loads(path.read_bytes())
        else:
            with open(path, "rb") as stream:  # by its content: torch goes by the suffix .safetensors
                torch.load(stream, weights_only=False)
        assert mark.read_text() == "executed", name
        mark.unlink()


@pytest.mark.parametrize("name", [name for name, _ in FILES])
@pytest.mark.parametrize("loader", ["open_clip", "timm", "miniverse", "student", "dense student"])
def test_a_checkpoint_with_a_payload_is_refused_and_not_run(
    loader: str, name: str, tiny_clip: SimpleNamespace, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    path = str(dict(FILES)[name](tmp_path / name, mark))
    loads: dict[str, Callable[[], object]] = {
        "open_clip": lambda: load_teacher("open_clip:mine", path, tiny_clip.config),
        "timm": lambda: load_teacher("timm:test_vit", path),
        "miniverse": lambda: load_teacher("miniverse", path),
        "student": lambda: build_student("test_vit", checkpoint=path, image_size=32),
        "dense student": lambda: build_segmenter("test_resnet", {}, 3, 32, head="lraspp", checkpoint=path),
    }
    with pytest.raises(KtrayError, match=r"can run code|cannot be read as weights"):
        loads[loader]()
    assert not mark.exists()


@pytest.mark.parametrize("write", [write_torch, write_pickle])
def test_saved_models_whose_weights_were_exchanged_are_refused(
    write: Write, tiny_clip: SimpleNamespace, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    save_student(build_student("test_vit", num_classes=2, image_size=32), tmp_path / "student", ["a", "b"])
    dense = build_segmenter("test_resnet", {"output_stride": 8}, 2, 32, head="lraspp")
    save_segmenter(dense, tmp_path / "dense", ["a", "b"])
    teacher = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    AdaptedTeacher(teacher, LinearHead(torch.zeros(2, 24)), ["a", "b"], 1.0, True).save(tmp_path / "adapted")
    for folder, file, load in (
        ("student", "model.safetensors", load_student),
        ("dense", "head.safetensors", load_student),
        ("dense", "model.safetensors", load_student),
        ("adapted", "head.safetensors", AdaptedTeacher.load),
        ("adapted", "tower.safetensors", AdaptedTeacher.load),
    ):
        whole = (tmp_path / folder / file).read_bytes()
        write(tmp_path / folder / file, mark)
        with pytest.raises(KtrayError, match="cannot be read as weights"):
            load(tmp_path / folder)
        (tmp_path / folder / file).write_bytes(whole)
        load(tmp_path / folder)
    assert not mark.exists()


def test_a_students_config_names_no_other_weights(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    save_student(build_student("test_vit", num_classes=2, image_size=32), tmp_path / "s", ["a", "b"])
    evil = write_torch(tmp_path / "s" / "pytorch_model.bin", mark)
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"file": str(evil), "custom_load": True, "url": evil.as_uri()}
    file.write_text(json.dumps(config))
    load_student(tmp_path / "s")  # the weights beside it, and no others
    config["model_args"]["checkpoint_path"] = str(evil)
    file.write_text(json.dumps(config))
    with pytest.raises(KtrayError, match="contains no student"):
        load_student(tmp_path / "s")
    # Plain timm takes the safetensors too, and would refuse the other.
    config["model_args"].pop("checkpoint_path")
    config["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if k not in ("file", "url")}
    (tmp_path / "s" / "model.safetensors").unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(Exception, match="weights_only"):
        timm.create_model(f"local-dir:{tmp_path / 's'}", pretrained=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("part", "more", "message"),
    [
        (
            "text_cfg",
            {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}},
            "execution of external code",
        ),
        ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}, "is a location"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/x"}, "is a location"),
    ],
)
def test_a_teachers_config_names_no_code_and_no_place(
    part: str, more: dict, message: str, tiny_clip: SimpleNamespace, tmp_path: Path
) -> None:
    config = json.loads(Path(tiny_clip.config).read_text())
    config[part] |= more
    for nested in (config, {"model_cfg": config, "preprocess_cfg": {}}):
        (tmp_path / "c.json").write_text(json.dumps(nested))
        with pytest.raises(KtrayError, match=message):
            load_teacher("open_clip:mine", tiny_clip.checkpoint, str(tmp_path / "c.json"))
