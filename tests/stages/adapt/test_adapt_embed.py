"""ADAPT in pieces: the embeddings and heads that all labelled images at once would give, without their pixels in one
process."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.spec import TeacherSpec, embed_numpy, predict_numpy, tower_flops
from ktray.models.teacher.teacher import TeacherSource
from ktray.stages.adapt import embed
from ktray.stages.adapt.embed import embed_labels, pieces, read_pieces
from ktray.stages.adapt.heads import fit_heads
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import HeadSettings, LabelledSplit, task_kind
from ktray.training.adapt_program import predict_split
from ktray.training.inputs import Labels

CLASSES = ["a", "b", "c"]
SHARDS = {"train-00000.parquet": 9, "train-00001.parquet": 0, "train-00002.parquet": 7, "val-00000.parquet": 8}
NAMES = sorted(SHARDS)


@pytest.fixture(scope="module")
def spec() -> TeacherSpec:
    return TeacherSpec.of(TeacherSource("miniverse"))


@pytest.fixture
def labels(tmp_path, spec) -> Labels:
    """A LABELS stage with shards of several sizes, one of them empty."""
    rng, stage = np.random.default_rng(0), Stage(str(tmp_path / "labels"))
    for name, n in SHARDS.items():
        columns = {
            "uri": np.array([f"{name}/{i}" for i in range(n)], dtype=str),
            "pixels": rng.integers(0, 256, (n, 3, *spec.preprocess.size), dtype=np.uint8),
            "label": np.arange(n, dtype=np.int64) % len(CLASSES),
        }
        write_rows(stage, name, columns)
    return Labels(stage, task_kind("classification"))


def whole(labels: Labels, split: str, column: str) -> np.ndarray:
    """A column of all shards of a split."""
    found = [read_rows(labels.directory, name, [column])[column] for name in NAMES if name.startswith(split)]
    return np.concatenate([values for values in found if len(values)])


def a_reporter() -> SimpleNamespace:
    """Keeps the summaries that a stage would count."""
    told: list[object] = []
    return SimpleNamespace(told=told, read=0, shards=lambda summaries: told.extend(summaries))


def test_the_pieces_are_the_embeddings_of_all_images_and_are_computed_once(
    cluster, tmp_path, labels, spec, monkeypatch
) -> None:
    stage, runtime, reporter = Stage(str(tmp_path / "adapt")), SimpleNamespace(plan=cluster), a_reporter()
    embed_labels(labels, spec, NAMES, runtime, stage, reporter)
    teacher = spec.load()
    for split in ("train", "val"):
        names = [name for name in NAMES if name.startswith(split)]
        columns = read_pieces(stage, names)
        expected = embed_numpy(teacher, whole(labels, split, "pixels"), 256)
        np.testing.assert_allclose(columns["embedding"], expected, rtol=1e-4, atol=1e-5)
        assert columns["embedding"].dtype == np.float32
        assert columns["uri"].tolist() == whole(labels, split, "uri").tolist()
        assert columns["label"].tolist() == whole(labels, split, "label").tolist()
        assert "pixels" not in columns
    assert {s.name: (s.images, s.read, s.flops) for s in reporter.told} == {
        name: (n, n, n * tower_flops(teacher)) for name, n in SHARDS.items()
    }
    assert reporter.read == 0
    # An attempt that was interrupted: one piece is missing, and only this one is computed.
    pieces(stage).delete("train-00002.parquet.json")
    asked, original = [], embed.map_shards

    def counted(items, *rest):
        asked.extend(item["name"] for item in items)
        return original(items, *rest)

    monkeypatch.setattr(embed, "map_shards", counted)
    again = a_reporter()
    embed_labels(labels, spec, NAMES, runtime, stage, again)
    assert asked == ["train-00002.parquet"]
    assert {s.name: s.images for s in again.told} == dict.fromkeys(NAMES, 0) | {"train-00002.parquet": 7}


def test_heads_from_pieces_are_those_from_all_images(tmp_path, labels, spec) -> None:
    stage, teacher, kind = Stage(str(tmp_path / "adapt")), spec.load(), labels.kind
    for name in NAMES:
        rows = read_rows(labels.directory, name)
        rows["embedding"] = embed_numpy(teacher, rows.pop("pixels"), 256)
        write_rows(pieces(stage), name, rows)
    settings = HeadSettings(CLASSES, CLASSES, ["a photo of {}"], ["text", "probe"], 1)
    found = fit_heads(stage, labels, NAMES, spec, settings, "top1", 1)

    def split(name: str) -> LabelledSplit:
        embedding = embed_numpy(teacher, whole(labels, name, "pixels"), 256)
        return LabelledSplit(
            lambda: iter(()), torch.from_numpy(embedding), torch.from_numpy(whole(labels, name, "label"))
        )

    expected = kind.fit_heads(teacher, split("train"), split("val"), settings)
    assert set(found["scores"]) == {"text", "probe"}
    for name, scores in expected.scores.items():
        assert found["scores"][name]["top1"] == pytest.approx(scores["top1"])
        assert found["scores"][name]["loss"] == pytest.approx(scores["loss"], rel=1e-3)
    assert found["flops"] == pytest.approx(expected.flops, rel=0.5)
    stored = read_rows(stage, "embedding-train.parquet")
    assert stored["uri"].tolist() == whole(labels, "train", "uri").tolist()
    np.testing.assert_allclose(np.linalg.norm(stored["embedding"].astype(np.float32), axis=1), 1, atol=1e-3)


def test_the_images_of_a_split_come_in_pieces_and_in_order(labels) -> None:
    found = [rows["pixels"] for rows in labels.shards("train", ["pixels"])]
    assert [len(pixels) for pixels in found] == [9, 0, 7]
    np.testing.assert_array_equal(np.concatenate(found), whole(labels, "train", "pixels"))


def test_predictions_in_pieces_are_those_of_all_images(labels, spec) -> None:
    torch.manual_seed(0)
    teacher = spec.load()
    adapted = AdaptedTeacher(teacher, LinearHead(torch.randn(3, teacher.embed_dim)), CLASSES, 0.7).eval()
    outputs, targets = predict_split(adapted, labels, "train")
    expected = predict_numpy(adapted, whole(labels, "train", "pixels"), 256)
    torch.testing.assert_close(outputs, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert targets.tolist() == whole(labels, "train", "label").tolist()
