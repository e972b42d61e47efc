from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ktray.errors import KtrayError
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.spec import AdaptedSpec
from ktray.models.teacher.teacher import TeacherSource
from ktray.storage.store import Dir

CLASSES = ["ä b", "c", "d"]


def batch() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def adapted(tiny_clip: SimpleNamespace) -> AdaptedTeacher:
    teacher = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    head = LinearHead(torch.randn(3, 24), torch.randn(3))
    return AdaptedTeacher(teacher, head, CLASSES, temperature=0.4)


def test_logits_are_linear_on_the_unit_embedding(adapted: AdaptedTeacher) -> None:
    with torch.no_grad():
        e = adapted.embed(batch())
        expected = (e / e.norm(dim=1, keepdim=True) @ adapted.head.weight.T + adapted.head.bias) / 0.4
        torch.testing.assert_close(adapted.logits(batch()), expected)
        assert not torch.allclose(e.norm(dim=1), torch.ones(3))


def test_a_probe_is_saved_without_the_tower(adapted: AdaptedTeacher, tmp_path: Path) -> None:
    adapted.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapted.json", "head.safetensors"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 4096
    again = AdaptedTeacher.load(tmp_path)
    assert (again.classes, again.temperature, again.preprocess) == (CLASSES, 0.4, adapted.preprocess)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again.logits(batch()), adapted.eval().logits(batch()))
    assert all(n.startswith(("image_tower.", "head.")) for n, _ in again.named_parameters())


def test_a_finetuned_tower_is_saved_and_needs_no_base(adapted: AdaptedTeacher, tmp_path: Path) -> None:
    with torch.no_grad():
        adapted.image_tower.proj.add_(0.3)
    adapted.finetuned = True
    base = tmp_path / "gone.safetensors"
    adapted.source = adapted.source.__class__(
        "open_clip:mine", str(base), json.loads(Path(adapted.source.config).read_text())
    )
    adapted.save(tmp_path / "out")
    again = AdaptedTeacher.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.logits(batch()), adapted.eval().logits(batch()))
    assert again.base_fingerprint == adapted.base_fingerprint


def test_a_changed_base_is_not_taken_for_the_old_one(
    adapted: AdaptedTeacher, tiny_clip: SimpleNamespace, tmp_path: Path
) -> None:
    adapted.save(tmp_path)
    state = load_file(tiny_clip.checkpoint)
    moved, changed = tmp_path / "moved.safetensors", tmp_path / "changed.safetensors"
    moved.write_bytes(Path(tiny_clip.checkpoint).read_bytes())
    save_file({**state, "visual.proj": state["visual.proj"] * 2}, str(changed))
    AdaptedTeacher.load(tmp_path, checkpoint=str(moved))
    with pytest.raises(KtrayError, match="not the one that was adapted"):
        AdaptedTeacher.load(tmp_path, checkpoint=str(changed))


def test_folders_and_heads_that_do_not_belong(adapted: AdaptedTeacher, tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match="contains no adapted teacher"):
        AdaptedTeacher.load(tmp_path)
    adapted.save(tmp_path)
    save_file({"weight": torch.zeros(2, 24), "bias": torch.zeros(3)}, str(tmp_path / "head.safetensors"))
    with pytest.raises(KtrayError, match="do not fit"):
        AdaptedTeacher.load(tmp_path)


def test_head_of_another_task_is_refused(adapted: AdaptedTeacher, tiny_clip: SimpleNamespace) -> None:
    teacher = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    with pytest.raises(KtrayError, match="2 classes"):
        AdaptedTeacher(teacher, adapted.head, ["a", "b"])


def test_finetuning_reaches_tower_and_head_at_their_rates(adapted: AdaptedTeacher) -> None:
    groups = adapted.param_groups(layer_decay=0.5, weight_decay=0.1, head_scale=10.0)
    ours = {id(p) for g in groups for p in g["params"]}
    assert ours == {id(p) for p in adapted.parameters()}
    assert {g["lr_scale"] for g in groups} == {10.0, 1.0, 0.5, 0.25}
    adapted.train()
    adapted(batch()).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())


def test_the_files_of_the_base_may_have_moved(tmp_path: Path, tiny_clip: SimpleNamespace) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    shutil.copy(tiny_clip.checkpoint, old)
    base = load_teacher("open_clip:tiny", str(old), str(tiny_clip.config))
    adapted = AdaptedTeacher(base, LinearHead(torch.ones(2, base.embed_dim)), ["a", "b"])
    adapted.save(tmp_path / "adapted")
    old.rename(new)
    folder = Dir(str(tmp_path / "adapted"))
    with pytest.raises(KtrayError, match="There is no file"):
        AdaptedSpec(folder, base.preprocess).load()
    moved = TeacherSource("open_clip:tiny", str(new), str(tiny_clip.config))
    image = torch.zeros(1, 3, *base.preprocess.size, dtype=torch.uint8)
    found = AdaptedSpec(folder, base.preprocess, base=moved).load()
    assert torch.equal(found.logits(image), adapted.logits(image))
    other = dict(load_file(new))
    save_file({name: value + 1 for name, value in other.items()}, new)
    with pytest.raises(KtrayError, match="is not the one that was adapted"):
        AdaptedSpec(folder, base.preprocess, base=moved).load()
