"""Weights as other tools save them: wrappers are taken off, other forms are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ktray.errors import KtrayError
from ktray.models.student.classifier import build_student
from ktray.models.teacher.load import load_teacher
from ktray.models.weight_forms import common_prefix, file_form, key_form, unwrapped

WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "module.module.",
    "model.",
    "module.model.",
)


@pytest.mark.parametrize("prefix", [*WRAPPERS, "net."])
def test_wrappers_of_a_student_are_taken_off(tmp_path: Path, prefix: str) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "w.pt")
    student = build_student("test_resnet", {}, 5, 32, False, str(tmp_path / "w.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(student.model.state_dict()[name], value), name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model."])
def test_wrappers_of_a_teacher_are_taken_off(tmp_path: Path, tiny_clip: SimpleNamespace, prefix: str) -> None:
    state = load_file(tiny_clip.checkpoint)
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "w.safetensors")
    image = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    plain = load_teacher("open_clip:tiny", str(tiny_clip.checkpoint), str(tiny_clip.config))
    wrapped = load_teacher("open_clip:tiny", str(tmp_path / "w.safetensors"), str(tiny_clip.config))
    assert torch.equal(plain.embed(image), wrapped.embed(image))


def test_inner_wrappers_and_names_that_only_begin_like_one() -> None:
    names = {"_orig_mod.a._orig_mod.b": 1, "module.c": 2, "modules.d": 3, "a.module_list.e": 4}
    assert unwrapped(names) == {"a.b": 1, "c": 2, "modules.d": 3, "a.module_list.e": 4}
    assert common_prefix(["model.a", "model.b.c"]) == "model."
    assert common_prefix(["model.a", "b"]) == common_prefix(["a", "b"]) == common_prefix([]) == ""


class _Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_other_files_are_named(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    page = tmp_path / "page.safetensors"
    page.write_text("<!doctype html><html>log in</html>")
    script = tmp_path / "ViT-B-32.pt"
    torch.jit.script(_Net()).save(str(script))
    saved = tmp_path / "saved.safetensors"
    with open(saved, "wb") as stream:
        torch.save({"a": torch.ones(1)}, stream)
    renamed = tmp_path / "renamed.pt"
    save_file({"a": torch.ones(1)}, renamed)
    empty = tmp_path / "empty.pt"
    empty.touch()
    for path, words in (
        (pointer, "git lfs pull"),
        (page, "HTML"),
        (script, "TorchScript"),
        (saved, "rename it to .pt"),
        (renamed, "rename it to .safetensors"),
        (empty, "empty"),
    ):
        assert words in file_form(path), path
        with pytest.raises(KtrayError, match=words):
            build_student("test_resnet", {}, 5, 32, False, str(path))


def test_other_names_are_explained(tmp_path: Path) -> None:
    assert "transformers" in key_form(["vision_model.encoder.layers.0.mlp.fc1.weight", "text_model.x"])
    assert "transformers" in key_form(["embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"])
    assert "open_clip" in key_form(["visual.transformer.resblocks.0.ln_1.weight"])
    assert "LoRA" in key_form(["blocks.0.attn.qkv.lora_A.weight"])
    assert key_form(["blocks.0.attn.qkv.weight"]) == ""
    torch.save(
        {"vision_model.embeddings.class_embedding": torch.ones(1), "text_model.a": torch.ones(1)}, tmp_path / "t.pt"
    )
    with pytest.raises(KtrayError, match=r"do not fit the model.*names are those of transformers"):
        build_student("test_resnet", {}, 5, 32, False, str(tmp_path / "t.pt"))
    torch.save({"other.a": torch.ones(1), "other.b": torch.ones(1)}, tmp_path / "o.pt")
    with pytest.raises(KtrayError, match=r"All names begin with 'other\.'"):
        build_student("test_resnet", {}, 5, 32, False, str(tmp_path / "o.pt"))
