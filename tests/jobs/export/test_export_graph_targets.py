"""Targets that are converted from PyTorch's graph: each file answers as PyTorch does, for every kind of student.

The converters are extras of ktray. The tests of a format are skipped where its packages are missing.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from scipy.special import softmax

from ktray.errors import KtrayError
from ktray.jobs.export import agreement, latency, served_graph
from ktray.jobs.export.confidence import Confidence
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.targets.graph import GraphTarget
from ktray.models.student.classifier import Student, build_student
from ktray.models.student.segmenter import build_segmenter
from ktray.models.student.tagger import Tagger
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS
from ktray.tasks.base import task_kind

FORMATS = {name: target for name, target in EXPORTS if isinstance(target, GraphTarget)}
RUN_HERE = [name for name, target in FORMATS.items() if not target.unchecked()]
HONEST = Confidence(temperature=1.7, threshold=0.4)


def target_of(name: str) -> GraphTarget:
    """The target, or a skipped test."""
    target = FORMATS[name]
    try:
        target.require()
    except KtrayError as error:
        pytest.skip(str(error))
    return target


def written(target: GraphTarget, student: Student, folder: Path, graph: str = "logits") -> tuple[Path, dict[str, Any]]:
    """The file of a target, and its entry in ``export.json``."""
    recipe = SimpleNamespace(export=ExportConfig(graph=graph))
    work = SimpleNamespace(source=SimpleNamespace(recipe=recipe), student=student, folder=folder, confidence=HONEST)
    return folder / target.file, target.write(work)


def pixels_of(student: Student, count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, *student.preprocess.size), dtype=np.uint8)


def raw(student: Student, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return student.logits(torch.from_numpy(pixels)).numpy()


@pytest.fixture(scope="module")
def tagger() -> Student:
    torch.manual_seed(1)
    student = Tagger.of(build_student("test_resnet", {"output_stride": 8}, 3, 32), [0.5, 0.52, 0.45])
    return student.eval()


@pytest.fixture(scope="module")
def segmenter() -> Student:
    torch.manual_seed(2)
    return build_segmenter("test_resnet", {}, 4, 64).eval()


@pytest.mark.parametrize("name", RUN_HERE)
def test_logits_are_pytorchs_and_the_process_that_measures_opens_the_file(name: str, student, tmp_path: Path) -> None:
    target = target_of(name)
    path, entry = written(target, student, tmp_path)
    assert entry["input"]["shape"][1:] == [3, 32, 32]
    assert (entry["input"]["shape"][0] is None) == (not target.single)
    assert all((tmp_path / file).is_file() for file in (target.file, *target.companions))
    scorer = target.load(path)
    for count in (1, 5):
        pixels = pixels_of(student, count)
        found = scorer.logits(pixels)
        if entry["graph"] == "probabilities":
            expected = softmax(raw(student, pixels) / HONEST.temperature, axis=1)
            np.testing.assert_allclose(softmax(found / HONEST.temperature, axis=1), expected, atol=1e-5)
        else:
            np.testing.assert_allclose(found, raw(student, pixels), rtol=1e-4, atol=1e-4)
    found = latency.measure(path, 4, seconds=0.01, name=name)
    assert {row["batch"] for row in found["rows"]} == {1, 4}


@pytest.mark.parametrize("name", RUN_HERE)
def test_from_pixels_to_calibrated_probabilities_and_a_class_or_none(name: str, student, tmp_path: Path) -> None:
    target = target_of(name)
    path, entry = written(target, student, tmp_path, "probabilities")
    assert (entry["input"]["name"], entry["outputs"]) == ("pixels", ["probabilities", "label"])
    pixels = np.concatenate([pixels_of(student, 8), np.zeros((1, 3, 32, 32), np.uint8)])
    found = target.load(path).answers(pixels)
    # An independent value: scipy's softmax of the logits that are divided by the temperature.
    expected = softmax(raw(student, pixels).astype(np.float64) / HONEST.temperature, axis=1)
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    decided = np.where(expected.max(1) >= HONEST.threshold, expected.argmax(1), -1)
    clear = np.abs(expected.max(1) - HONEST.threshold) > 1e-4
    assert np.array_equal(found["label"][clear], decided[clear])
    facts = json.loads(served_graph.facts_file(path).read_text(encoding="utf-8"))
    assert (facts["classes"], facts["temperature"], facts["threshold"]) == (student.classes, 1.7, 0.4)


@pytest.mark.parametrize("name", RUN_HERE)
def test_sets_of_classes_have_their_own_thresholds(name: str, tagger, tmp_path: Path) -> None:
    target = target_of(name)
    path, entry = written(target, tagger, tmp_path, "probabilities")
    assert entry["outputs"] == ["probabilities", "labels"]
    pixels = pixels_of(tagger)
    scorer = target.load(path)
    found = scorer.answers(pixels)
    expected = 1 / (1 + np.exp(-raw(tagger, pixels).astype(np.float64)))
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    clear = np.abs(expected - tagger.thresholds) > 1e-4
    assert np.array_equal(found["labels"][clear], (expected >= tagger.thresholds).astype(np.int32)[clear])
    np.testing.assert_allclose(scorer.logits(pixels), raw(tagger, pixels), atol=1e-4)


@pytest.mark.parametrize("name", RUN_HERE)
def test_maps_of_a_segmentation_student(name: str, segmenter, tmp_path: Path) -> None:
    target = target_of(name)
    path, _ = written(target, segmenter, tmp_path, "probabilities")
    pixels = pixels_of(segmenter, 2)
    found = target.load(path).answers(pixels)
    reference = raw(segmenter, pixels) / HONEST.temperature
    np.testing.assert_allclose(found["probabilities"], softmax(reference, axis=1), atol=1e-5)
    whole = torch.nn.functional.interpolate(torch.from_numpy(reference), (64, 64), mode="bilinear").softmax(1)
    expected = torch.where(whole.amax(1) >= HONEST.threshold, whole.argmax(1), -1).numpy()
    assert found["label"].shape == (2, 64, 64)
    assert np.mean(found["label"] != expected) < 0.001


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "no description"])
def test_a_damaged_file_is_one_clear_error(name: str, damage: str, student, good: Path, tmp_path: Path) -> None:
    target = target_of(name)
    for file in (target.file, *target.companions, f"{target.file}.json"):
        (tmp_path / file).write_bytes((good / name / file).read_bytes())
    path = tmp_path / target.file
    data = path.read_bytes()
    if damage == "no description":
        served_graph.facts_file(path).write_text("[]")
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"\x07" * 5000}[damage])
    with pytest.raises(KtrayError) as caught:
        target.load(path)
    assert target.file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def good(student, tmp_path_factory) -> Path:
    """A good file of each format, by name of the target."""
    folder = tmp_path_factory.mktemp("good")
    for name, target in FORMATS.items():
        try:
            target.require()
        except KtrayError:
            continue
        (folder / name).mkdir()
        written(target, student, folder / name)
    return folder


class Odd(torch.nn.Module):
    """Looks at the pixels to decide which way to go, which no graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_cannot_be_converted_is_one_clear_error(name: str, tmp_path: Path, capfd) -> None:
    target = target_of(name)
    odd = build_student("test_resnet", {}, 3, 32)
    odd.model = Odd().eval()
    with pytest.raises(KtrayError, match=rf"cannot be exported to {target.format}: .* Remove {name} from"):
        written(target, odd, tmp_path)
    assert capfd.readouterr().err == ""


def test_a_file_that_decides_otherwise_is_refused(student, tmp_path: Path) -> None:
    target = FORMATS["torch_export"]
    path, _ = written(target, student, tmp_path, "probabilities")
    scorer = target.load(path)
    answers = scorer.answers

    class Flipped(type(scorer)):
        def answers(self, pixels):
            found = answers(pixels)
            return {**found, "label": found["label"] + 1}

    pixels = pixels_of(student, 8)
    batch = SimpleNamespace(pixels=pixels, shipped=pixels, columns={}, labels=np.zeros(8, np.int64))
    kind = task_kind("classification")
    for one, right in ((scorer, True), (Flipped(scorer.session, scorer.facts, scorer.file), False)):
        found = agreement.score(student, kind, {"file": one}, [batch]).compared["file"]
        assert (found["decisions"], found["decisions_differ"]) == (8, 0 if right else 8)
        if not right:
            with pytest.raises(KtrayError, match="8 of 8 decisions differ"):
                agreement.require(found, "student.pt2")


def test_another_number_of_outputs_than_described_is_told(student, good: Path) -> None:
    path = good / "torch_export" / "student.pt2"
    scorer = FORMATS["torch_export"].load(path)
    scorer.facts["outputs"] = ["probabilities", "label"]
    with pytest.raises(KtrayError, match="returns 1 outputs"):
        scorer.logits(pixels_of(student))


def test_predict_py_does_not_take_probabilities_for_logits(student, good: Path) -> None:
    path = good / "onnx_pixels" / "student.pixels.onnx"
    with pytest.raises(ValueError, match="contains no class names"):
        Classifier(path)
    model = onnx.load(str(path))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert json.loads({p.key: p.value for p in model.metadata_props}["classes"]) == student.classes


@pytest.mark.skipif(sys.platform == "darwin", reason="there, the file is run")
@pytest.mark.parametrize("graph", ["logits", "probabilities"])
def test_core_ml_is_converted_here_and_says_that_it_was_not_run(graph: str, student, tmp_path: Path) -> None:
    target = target_of("coreml")
    import coremltools as ct

    path, entry = written(target, student, tmp_path, graph)
    assert target.load(path) is None
    note = target.notes("coreml", {"coreml": {**entry, "agreement": {}}}, "val", "validation")
    assert "was not checked against PyTorch" in note[0]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    spec = ct.models.MLModel(str(tmp_path / "student.mlpackage"), skip_model_load=True).get_spec()
    assert [one.name for one in spec.description.input] == [entry["input"]["name"]]
    assert [one.name for one in spec.description.output] == entry["outputs"]
    kind = spec.description.input[0].type.WhichOneof("Type")
    assert kind == ("imageType" if graph == "probabilities" else "multiArrayType")


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs only on Apple's systems")
def test_core_ml_on_macos(student, tmp_path: Path) -> None:
    target = target_of("coreml")
    path, _ = written(target, student, tmp_path)
    pixels = pixels_of(student)
    np.testing.assert_allclose(target.load(path).logits(pixels), raw(student, pixels), rtol=1e-3, atol=1e-3)
