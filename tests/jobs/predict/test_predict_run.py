"""Predictions of images in every form: right, each image once after any interruption, cheap to repeat and to extend."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from archives import tar_bytes
from heard import heard
from PIL import Image
from results import check_result
from small_task import picture

from ktray import cli
from ktray import recipe as recipes
from ktray.data.labelled.read import read_labelled
from ktray.data.quarantine import Quarantine
from ktray.data.sources.fetch import fetch
from ktray.errors import KtrayError
from ktray.jobs.predict import folder as folders
from ktray.jobs.predict import run as module
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.ensemble import EnsembleSpec
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.pipeline.finished_run import find_run
from ktray.storage.store import Store

TARS, A_TAR, LOOSE = 3, 6, 4


def keys(run: Path, *overrides: str) -> recipes.Recipe:
    return recipes.load(None, [f"store={run.parents[1]}", f"predict.run={run.name}", *overrides])


def predict(run: Path, *overrides: str, lines: list[str] | None = None) -> dict[str, Any]:
    return heard(lines if lines is not None else [], module.predict, keys(run, *overrides))


def encoded(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    picture(int(rng.integers(0, 3)), rng).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Tars and single files, one of each damaged."""
    home, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(6)
    (home / "tars").mkdir()
    (home / "loose").mkdir()
    for number in range(TARS):
        members = [(f"{number}-{i}.png", encoded(rng)) for i in range(A_TAR)]
        if number == 1:
            members[2] = (members[2][0], members[2][1][:60])
        (home / "tars" / f"{number}.tar").write_bytes(tar_bytes(members))
    for i in range(LOOSE):
        (home / "loose" / f"{i}.png").write_bytes(encoded(rng) if i else b"")
    return home


USABLE = TARS * A_TAR + LOOSE - 2
BAD = "data.max_bad_fraction=0.2"


def data_of(images: Path) -> str:
    return f"predict.data=[{images}/tars, {images}/loose]"


def rows_of(result: dict[str, Any]) -> pd.DataFrame:
    """As any reader of a folder of Parquet files would see them."""
    return pd.read_parquet(result["predictions"]["folder"])


def test_they_are_those_of_the_student_and_a_second_job_finds_them(run: Path, student, images: Path, cluster) -> None:
    lines: list[str] = []
    result = predict(run, data_of(images), BAD, lines=lines)
    check_result("predict", Path(result["folder"]) / "result.json")
    rows = rows_of(result)
    assert len(rows) == rows["uri"].nunique() == result["predictions"]["images"] == USABLE
    assert list(rows.columns) == ["uri", "class", "probability", "probabilities"]
    encoded_of = {uri: data for uri, data, _ in fetch(rows["uri"].tolist())}
    for row in rows.itertuples():
        (expected,) = student.predict([encoded_of[row.uri]])
        assert rows.loc[row.Index, "class"] == expected.label
        assert row.probabilities == pytest.approx([expected.probabilities[name] for name in student.classes], abs=1e-5)
        assert row.probability == pytest.approx(max(row.probabilities))
    counts = rows["class"].value_counts().to_dict()
    assert {name: n for name, n in result["counts"].items() if n} == counts
    assert result["confidence"] == pytest.approx(rows["probability"].mean())
    bad = Quarantine.read(result["data"]["quarantine_list"])
    assert {b.uri.rpartition("/")[2].partition("&")[0] for b in bad} == {"1.tar#member=1-2.png", "0.png"}
    assert (result["data"]["read"], result["data"]["quarantined"]) == (USABLE + 2, 2)
    assert result["images_per_second"] > 0
    assert result["cost"]["flops"]["total"] == result["cost"]["flops"]["predict"] > 0
    assert result["cost"]["baselines"] == {}
    schema = ds.dataset(result["predictions"]["folder"]).schema
    assert json.loads(schema.metadata[b"classes"]) == student.classes

    again = predict(run, data_of(images), BAD)
    assert (again["images_per_second"], again["cost"]["flops"]["total"]) == (None, 0)
    assert again["predictions"] == result["predictions"]
    plan: list[str] = []
    heard(plan, module.show, keys(run, data_of(images)))
    assert f"{TARS + 1} shards, {TARS + 1} of them are in" in "\n".join(plan)
    assert f"predicted {USABLE} images (all of them were in the folder before); 2 cannot be used" in module.closing(
        again
    )
    assert "images/s" in module.closing(result)


def test_the_images_of_the_test_split_have_the_accuracy_of_the_run(run: Path, stripes: Path, cluster) -> None:
    rows = rows_of(predict(run, f"predict.data={stripes}/test", "predict.probabilities=false"))
    assert list(rows.columns) == ["uri", "class", "probability"]
    right = [Path(uri).parent.name == name for uri, name in zip(rows["uri"], rows["class"], strict=True)]
    assert np.mean(right) == pytest.approx(json.loads((run / "result.json").read_text())["metric"]["test"])


def test_the_command_line(run: Path, stripes: Path, cluster, capsys) -> None:
    words = [f"store={run.parents[1]}", f"predict.data={stripes}/val"]
    assert cli.entry(["predict", "--plan", *words]) == 0
    out = capsys.readouterr().out
    assert f"{run.name} (the newest run with a student; predict.run names another)" in out
    assert "student   test_resnet, 3 classes" in out
    assert "to do     18 images: " in out
    assert not list((run.parents[1] / "runs").glob("*predict*"))
    assert cli.entry(["predict", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["predicted", "classes", "files", "result"]
    assert lines[-4].startswith("predicted 18 images (")


def test_an_interrupted_job_continues_by_shard(run: Path, images: Path, cluster, tmp_path, monkeypatch) -> None:
    out, finish, finished = tmp_path / "out", folders.PredictionFolder.finish, []

    def interrupted(self, shard) -> None:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finish(self, shard)
        finished.append(shard)

    monkeypatch.setattr(folders.PredictionFolder, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(run, data_of(images), BAD, f"predict.out={out}")
    monkeypatch.undo()
    first = {name: (out / name).stat().st_mtime_ns for shard in finished for name in shard.files}
    assert len(first) == 2
    stray = out / f"{finished[0].name}-00009.parquet"  # a later piece, which an attempt with other images has left
    shutil.copy(out / next(iter(first)), stray)
    lines: list[str] = []
    result = predict(run, data_of(images), BAD, f"predict.out={out}", lines=lines)
    assert any(f"2 of {TARS + 1} shards are already in" in line for line in lines)
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    assert not stray.exists()
    rows = rows_of(result)
    assert len(rows) == rows["uri"].nunique() == USABLE
    assert len(list((run.parents[1] / "runs").glob("*predict*"))) == 1  # the same run, which counts both attempts
    (stage,) = result["stages"]
    assert (stage["name"], stage["attempts"], stage["images"] >= USABLE) == ("predict", 2, True)


def test_new_images_cost_only_their_shards_and_lost_ones_leave(run: Path, images: Path, cluster, tmp_path) -> None:
    place, out = tmp_path / "growing", f"predict.out={tmp_path / 'out'}"
    shutil.copytree(images / "tars", place)
    before = predict(run, f"predict.data={place}", BAD, out)
    shutil.copy(place / "0.tar", place / "9.tar")
    (place / "2.tar").unlink()
    after = predict(run, f"predict.data={place}", BAD, out)
    assert after["predictions"]["images"] == before["predictions"]["images"] == USABLE - LOOSE + 1
    assert after["cost"]["flops"]["total"] == pytest.approx(before["cost"]["flops"]["total"] * A_TAR / (3 * A_TAR - 1))
    tars = {Path(uri.partition("#")[0]).name for uri in rows_of(after)["uri"]}
    assert tars == {"0.tar", "1.tar", "9.tar"}


@pytest.fixture
def taught(run: Path, student) -> AdaptedTeacher:
    """The adapted teacher of the run, in its store as the stage ADAPT leaves it."""
    torch.manual_seed(1)
    base = load_teacher("miniverse")
    head = LinearHead(torch.randn(3, base.embed_dim) * 8, torch.randn(3))
    teacher = AdaptedTeacher(base, head, student.classes, temperature=0.7).eval()
    stage = Store(str(run.parents[1])).stage("adapt", "0123456789abcdef")
    teacher.save(Path(stage.path) / "candidate-probe")
    stage.commit({"key": "0123456789abcdef", "directory": "candidate-probe"})
    result = json.loads((run / "result.json").read_text())
    result["stages"] = [{"name": "labels", "key": "1"}, {"name": "adapt", "key": "0123456789abcdef"}]
    (run / "result.json").write_text(json.dumps(result))
    return teacher


def test_the_teacher_labels_images_that_a_list_then_holds(
    run: Path, taught: AdaptedTeacher, stripes: Path, cluster, tmp_path
) -> None:
    result = predict(run, f"predict.data={stripes}/val", "predict.model=teacher", "predict.embedding=true")
    rows = rows_of(result).sort_values("uri")
    pixels = np.stack([taught.preprocess.eval_transform(Image.open(uri)) for uri in rows["uri"]])
    with torch.inference_mode():
        embedding = taught.embed(torch.from_numpy(pixels))
        expected = taught.logits_of(embedding).softmax(1).numpy()
    assert np.stack(rows["probabilities"]) == pytest.approx(expected, abs=1e-4)
    assert np.stack(rows["embedding"]) == pytest.approx(embedding.numpy(), abs=1e-4)
    assert result["predictions"]["embedding"] == taught.embed_dim
    assert result["model"] == {"run": run.name, "which": "teacher", "name": "miniverse", "classes": 3}

    # The lines of docs/guide/predict.md.
    predictions = ds.dataset(result["predictions"]["folder"])
    least = float(rows["probability"].median())
    sure = predictions.to_table(columns=["uri", "class"], filter=ds.field("probability") > least)
    pq.write_table(sure.rename_columns(["path", "label"]), tmp_path / "labels.parquet")
    labelled = read_labelled(str(tmp_path / "labels.parquet"), seed=0)
    chosen = rows[rows["probability"] > least]
    assert 0 < len(chosen) < len(rows)
    listed = {e.uri: labelled.classes[e.label] for e in [*labelled.train, *labelled.val, *labelled.test]}
    assert listed == dict(zip(chosen["uri"], chosen["class"], strict=True))


def test_an_ensemble_is_found_by_its_members(run: Path, taught: AdaptedTeacher) -> None:
    stage = Store(str(run.parents[1])).stage("ensemble", "fedcba9876543210")
    stage.write_json("ensemble.json", {"weights": [0.25, 0.75], "temperature": 1.0})
    stage.commit({"key": stage.uri[-16:], "inputs": {"adapts": ["0123456789abcdef", "0123456789abcdef"]}})
    result = json.loads((run / "result.json").read_text())
    result["stages"].append({"name": "adapt", "key": "fedcba9876543210"})
    (run / "result.json").write_text(json.dumps(result))
    found = find_run(keys(run), "predict").teacher()
    assert isinstance(found, EnsembleSpec)
    model = found.load()
    pixels = torch.randint(0, 256, (2, 3, *taught.preprocess.size), dtype=torch.uint8)
    with torch.inference_mode():  # twice the same teacher: the mean is this teacher
        torch.testing.assert_close(model.logits(pixels).softmax(1), taught.logits(pixels).softmax(1))


def test_a_run_without_teacher_or_whose_teacher_is_gone(run: Path, images: Path) -> None:
    with pytest.raises(KtrayError, match=r"adapted teacher of run .* is not in"):
        module.show(keys(run, data_of(images), "predict.model=teacher"))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "teacher": None}))
    with pytest.raises(KtrayError, match=r"has no teacher, because objective\.name="):
        module.show(keys(run, data_of(images), "predict.model=teacher"))


def test_what_cannot_be_predicted_is_refused_in_one_line(run: Path, images: Path, tmp_path) -> None:
    with pytest.raises(KtrayError, match=r"predict\.data is not set"):
        predict(run)
    with pytest.raises(KtrayError, match="There is no run 'nothing'"):
        predict(run, data_of(images), "predict.run=nothing")
    (run / "student" / "segmentation.json").write_text("{}")
    with pytest.raises(KtrayError, match=r"task\.kind=segmentation, and jobs/predict\.py can only predict classes"):
        module.show(keys(run, data_of(images)))


def test_too_many_damaged_images_end_the_job_and_a_higher_limit_needs_no_work(run, images, cluster, tmp_path) -> None:
    data = f"predict.data={images}/tars/1.tar"
    with pytest.raises(KtrayError, match="1 of 6 images cannot be used"):
        predict(run, data)
    result = predict(run, data, BAD)
    assert result["predictions"]["images"] == A_TAR - 1
    assert result["stages"][0]["images"] == A_TAR - 1  # of the first attempt
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(KtrayError, match=r"No image of predict\.data can be used"):
        predict(run, f"predict.data={tmp_path / 'empty'}", "data.max_bad_fraction=1")
