"""The parts of jobs/predict.py without a cluster: pieces of large shards, the folder, embeddings, the stage's key."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from archives import tar_bytes

from ktray.data.sources.lists import gallery_shards
from ktray.distributed.ray_data import _pieces
from ktray.errors import KtrayError
from ktray.jobs.predict import decode
from ktray.jobs.predict.folder import PredictedShard, PredictionFolder, table
from ktray.jobs.predict.models import predict
from ktray.jobs.predict.stage import PredictedPiece, PredictInputs, PredictShard, _joined
from ktray.models.student.classifier import build_student
from ktray.models.student.classifier_io import save_student
from ktray.models.student.tagger import Tagger
from ktray.stages.shard_summary import whole_shards
from ktray.storage.store import Dir
from ktray.tasks.students import StudentInFolder

FACTS = {"model": "a", "embedding": False}


def test_a_large_shard_is_done_in_pieces_and_each_image_once(student, stripes, tmp_path, monkeypatch) -> None:
    files = sorted((stripes / "test").rglob("*.png"))
    members = [(f"{i:02d}.png", path.read_bytes()) for i, path in enumerate(files)]
    members.insert(3, ("broken.png", b"nothing"))
    (tmp_path / "all.tar").write_bytes(tar_bytes(members))
    (shard,) = gallery_shards(str(tmp_path / "all.tar"), "auto", None)
    monkeypatch.setattr(decode, "PIECE_BYTES", 7 * 3 * 32 * 32)
    folder = PredictionFolder(Dir(str(tmp_path / "out")))
    save_student(student, tmp_path / "student", student.classes)
    source = StudentInFolder(Dir(str(tmp_path / "student")))
    work = PredictShard(folder, source, student.classes, True, False, 5.0)
    model, pieces = source.load(), []
    item = {"shard": 0, "name": shard.fingerprint}
    for part, columns in _pieces(item, decode.DecodeShard([shard], student.preprocess, 10**8)):
        assert len(columns["pixels"]) <= 7
        computed = work.compute(model, {"pixels": columns["pixels"]})
        pieces.append(PredictedPiece.from_json(json.loads(json.dumps(work.finish(part, columns, computed)))))
    assert len(pieces) == -(-len(files) // 7)
    ((*group,),) = whole_shards([*reversed(pieces)])  # tasks may return them in any order
    joined = _joined(group)
    assert (joined.rows, joined.read, len(joined.bad)) == (len(files), len(files) + 1, 1)
    assert sum(joined.counts) == joined.images == len(files)
    assert joined.flops == 5 * len(files)
    found = [row for name in sorted(joined.files) for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    assert [row["uri"].partition("member=")[2].partition("&")[0] for row in found] == [
        f"{i:02d}.png" for i in range(len(files))
    ]
    expected = student.predict([path.read_bytes() for path in files])
    assert [row["class"] for row in found] == [p.label for p in expected]
    assert joined.confidence == pytest.approx(sum(p.probability for p in expected), rel=1e-5)
    folder.finish(joined)
    assert folder.finished([shard.fingerprint]) == {shard.fingerprint: joined}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_embeddings_do_not_change_predictions(name: str) -> None:
    torch.manual_seed(0)
    model = build_student(name, {}, 4, 64 if name == "test_resnet" else 160).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, *model.preprocess.size), dtype=np.uint8)
    alone, none = predict(model, pixels, False)
    both, embedding = predict(model, pixels, True)
    assert none is None
    assert both == pytest.approx(alone, abs=1e-6)
    assert embedding.shape == (3, model.feature_dim)
    with torch.inference_mode():
        features = model.features(model.preprocess.normalise(torch.from_numpy(pixels)))
    assert embedding == pytest.approx(features.numpy(), abs=1e-6)
    nothing, empty = predict(model, pixels[:0], True)
    assert (nothing.shape, empty.shape) == ((0, 4), (0, model.feature_dim))


def test_sets_of_classes_are_those_above_their_thresholds(tmp_path) -> None:
    torch.manual_seed(0)
    student = build_student("test_resnet", {}, 3, 32)
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -2.0, -1.0]])
    tagger = Tagger.of(student, [0.5, 0.2, 0.9])
    tagger.classes = ["x", "y", "z"]
    tagger.model.forward = lambda x: logits[: len(x)]
    pixels = np.zeros((2, 3, 32, 32), np.uint8)
    score = PredictShard(
        PredictionFolder(Dir(str(tmp_path))),
        StudentInFolder(Dir("a")),
        tagger.classes,
        True,
        False,
        5.0,
        (0.5, 0.2, 0.9),
    )
    found = score.compute(tagger, {"pixels": pixels})
    columns = {"uri": np.array(["a", "b"]), "bad": np.zeros((0, 2), str), "read": np.array([2])}
    piece = PredictedPiece.from_json(score.finish({"name": "one"}, columns, found))
    rows = pq.read_table(tmp_path / piece.file).to_pylist()
    assert list(rows[0]) == ["uri", "classes", "probabilities"]
    # sigmoid(2) = 0.881, sigmoid(-1) = 0.269, sigmoid(0.5) = 0.622; of the second, sigmoid(-2) = 0.119.
    assert [row["classes"] for row in rows] == [["x", "y"], []]
    assert rows[0]["probabilities"] == pytest.approx([0.8808, 0.2689, 0.6225], abs=1e-4)
    assert piece.counts == [1, 1, 0]
    sure = (0.8808 + 0.2689 + 0.3775) / 3 + (0.9526 + 0.8808 + 0.7311) / 3
    assert piece.confidence == pytest.approx(sure, abs=1e-3)


def test_a_folder_of_other_predictions_or_of_somebody_else_is_refused(tmp_path) -> None:
    folder = PredictionFolder(Dir(str(tmp_path / "out")))
    folder.settle(FACTS)
    folder.settle(dict(FACTS))
    with pytest.raises(KtrayError, match=r"has other predictions \(they differ in: model\)"):
        folder.settle({**FACTS, "model": "b"})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "data.parquet").write_bytes(b"x")
    with pytest.raises(KtrayError, match=r"that are not predictions of ktray, for example data\.parquet"):
        PredictionFolder(Dir(str(tmp_path / "theirs"))).settle(FACTS)
    (tmp_path / "out" / "_predictions.json").write_text("{")
    with pytest.raises(KtrayError, match="has other predictions"):
        folder.settle(FACTS)


def check_damaged_shards(home: Dir) -> None:
    folder = PredictionFolder(home)
    folder.settle(FACTS)
    rows = table(np.array(["a", "b"]), np.array([[0.2, 0.8], [0.9, 0.1]], np.float32), None, ["x", "y"], False)
    for name in ("one", "two", "three"):
        size = folder.write(f"{name}-00000.parquet", rows)
        folder.finish(PredictedShard(name, rows=2, read=2, files={f"{name}-00000.parquet": size}))
    home.delete("one-00000.parquet")
    home.write("two-00000.parquet", b"half")
    found = folder.finished(["one", "two", "three", "four"])
    assert list(found) == ["three"]
    assert folder.drop_others(found) == 1
    assert list(home.names(".parquet")) == ["three-00000.parquet"]
    assert list(home.sub("_shards").names(".json")) == ["three.json"]


def test_a_shard_whose_file_is_gone_or_cut_is_not_finished(tmp_path) -> None:
    check_damaged_shards(Dir(str(tmp_path)))


def test_a_shard_whose_file_is_gone_or_cut_is_not_finished_on_s3(s3) -> None:
    check_damaged_shards(Dir(s3.home))


def test_names_and_model_are_in_the_key_and_addresses_are_not(tmp_path) -> None:
    score = PredictShard(PredictionFolder(Dir(str(tmp_path))), StudentInFolder(Dir("a")), ["x"], True, False, 5.0)
    inputs = PredictInputs(["a"], FACTS, None, [{"name": "a"}], decode.DecodeShard([], None, 1), score, 5)
    marks = PredictInputs.not_in_key()
    assert set(marks) == {"items", "decode", "score", "total", "named"}
    for field in dataclasses.fields(inputs):
        changed = dataclasses.replace(inputs, **{field.name: "another value"})
        assert (changed.key == inputs.key) == (field.name in marks), field.name
