"""The shipped teacher loads as any open_clip checkpoint does, and knows the miniverse."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ktray.miniverse import ensure_task
from ktray.miniverse.train_teacher import (
    TEACHER_DIR,
    PretrainSettings,
    _learning_rate,
    batches,
    contrastive_loss,
    normalise,
    train,
    true_captions,
)
from ktray.miniverse.zero_shot import text_classifier, zero_shot_accuracy

WEIGHTS = TEACHER_DIR / "model.safetensors"


@pytest.fixture(scope="module")
def loaded():  # type: ignore[no-untyped-def]
    open_clip.add_model_config(TEACHER_DIR / "miniverse.json")
    model, _, preprocess = open_clip.create_model_and_transforms("miniverse", pretrained=str(WEIGHTS))
    return model.eval(), preprocess, open_clip.get_tokenizer("miniverse")


def test_files_are_small_and_finite(loaded) -> None:  # type: ignore[no-untyped-def]
    assert WEIGHTS.stat().st_size <= 16_000_000
    model, _, tokenizer = loaded
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert tokenizer(["the capital letter K in red"]).shape == (1, 16)


def test_no_caption_is_cut(loaded) -> None:  # type: ignore[no-untyped-def]
    _, _, tokenizer = loaded
    longest = tokenizer(
        [
            "the capital letter W in purple on a cluttered background",
            "the question mark in orange on a cluttered background",
        ]
    )
    assert (longest[:, -1] == 0).all()


def test_zero_shot_on_val_from_files(loaded, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, preprocess, tokenizer = loaded
    folder = ensure_task(tmp_path, "letters")
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    files = sorted((folder / "val").rglob("*.png"), key=lambda p: p.name)[:208]
    images = torch.stack([preprocess(Image.open(file)) for file in files])
    labels = torch.tensor([about["classes"].index(file.parent.name) for file in files])
    names = [about["class_names"][label] for label in about["classes"]]
    classifier = text_classifier(model, tokenizer, names, about["prompts"])
    assert classifier.norm(dim=1).allclose(torch.ones(26), atol=1e-5)
    assert zero_shot_accuracy(model, images, labels, classifier) > 0.6
    wrong = classifier.roll(1, 0)
    assert zero_shot_accuracy(model, images, labels, wrong) < 0.2


def test_training_preprocessing_is_that_of_open_clip(loaded) -> None:  # type: ignore[no-untyped-def]
    _, preprocess, _ = loaded
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    theirs = torch.stack([preprocess(Image.fromarray(one)) for one in pixels])
    assert torch.allclose(normalise(pixels), theirs, atol=1e-6)


def test_card_and_log_agree() -> None:
    with (TEACHER_DIR / "train_log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    card = (TEACHER_DIR / "README.md").read_text(encoding="utf-8")
    assert int(rows[-1]["step"]) == PretrainSettings().steps
    for field in ("zero_shot_val", "zero_shot_test"):
        told = re.search(rf"`{field}` \| ([0-9.]+)", card)
        assert told is not None
        assert float(told[1]) == pytest.approx(float(rows[-1][field]), abs=5e-4)
    assert "Apache-2.0" in card
    assert "python -m ktray.miniverse.train_teacher" in card


def test_true_captions_by_hand() -> None:
    told = torch.tensor([[3, -1, -1], [3, 2, -1], [3, 2, 5], [4, -1, -1]])
    pictures = torch.tensor([[3, 2, 5], [3, 1, 5], [4, 0, -1]])
    expected = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(true_captions(told, pictures), expected)


def test_loss_equals_plain_infonce_when_captions_are_unique() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    scale = torch.tensor(9.0)
    ours = contrastive_loss(image, text, scale, torch.eye(5).bool())
    theirs = open_clip.ClipLoss()(image, text, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_loss_is_least_when_true_pairs_share_evenly() -> None:
    true = torch.tensor([[True, True, False], [False, False, True]])
    text = torch.eye(3)
    image = torch.stack([F.normalize(torch.tensor([1.0, 1.0, 0.0]), dim=0), text[2]])
    loss = contrastive_loss(image, text, torch.tensor(200.0), true)
    assert loss.item() == pytest.approx(math.log(2) / 4, abs=1e-4)  # one of two rows, one of two sides


def test_batches_continue_after_a_restart() -> None:
    settings = PretrainSettings(steps=9, batch=8)
    codes = torch.stack([torch.arange(40), torch.arange(40) % 12, torch.arange(40) % 6], 1)
    whole = list(batches(codes, settings, 0))
    again = list(batches(codes, settings, 6))
    assert len(whole) == 9
    for (rows, told), (rows2, told2) in zip(whole[6:], again, strict=True):
        assert torch.equal(rows, rows2)
        assert torch.equal(told, told2)
    assert torch.cat([rows for rows, _ in whole[:5]]).sort().values.tolist() == list(range(40))
    for rows, told in whole:
        assert true_captions(told, codes[rows]).diagonal().all()


def test_captions_get_terse() -> None:
    settings = PretrainSettings(steps=80, batch=50, terse_from=40)
    codes = torch.randint(0, 6, (500, 3), generator=torch.Generator().manual_seed(0))
    bare = [float((told[:, 1:] == -1).all(1).float().mean()) for _, told in batches(codes, settings, 0)]
    assert sum(bare[:40]) / 40 == pytest.approx(0.2, abs=0.05)
    assert sum(bare[40:]) / 40 == pytest.approx(0.7, abs=0.05)


def test_schedule_warms_up_and_ends_near_zero() -> None:
    settings = PretrainSettings(steps=100, warmup=10, lr=1.0)
    rates = [_learning_rate(step, settings) for step in range(100)]
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 0.001


def test_training_learns_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run cut in the middle leaves a checkpoint; started again it ends as the uncut one."""
    import ktray.miniverse.train_teacher as module

    monkeypatch.setattr(module, "_labelled", lambda stream, count: (torch.zeros(1, 3, 32, 32), torch.zeros(1).long()))
    settings = PretrainSettings(steps=4, batch=8, pool=32, warmup=1, every=2)
    whole = train(tmp_path / "whole", settings, processes=1)
    assert set(whole) == {"zero_shot_val", "zero_shot_test"}

    class Cut(Exception):
        pass

    original = module._write_log

    def cut(path: Path, rows: list[dict[str, object]]) -> None:
        original(path, rows)
        if rows[-1]["step"] == 4:
            raise Cut

    monkeypatch.setattr(module, "_write_log", cut)
    with pytest.raises(Cut):
        train(tmp_path / "cut", settings, processes=1)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    monkeypatch.setattr(module, "_write_log", original)
    train(tmp_path / "cut", settings, processes=1)
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)
    assert (tmp_path / "cut" / "train_log.csv").read_text().count("\n") == 3
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()
