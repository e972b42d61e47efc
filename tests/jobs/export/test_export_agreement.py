"""Differences are found where there are some, and only there."""

from pathlib import Path

import numpy as np
import pytest

from ktray.data.labelled.labelled_set import LabelledExample
from ktray.errors import KtrayError
from ktray.jobs.export import agreement
from ktray.jobs.export.images import Split
from ktray.jobs.export.predict import Classifier
from ktray.tasks.base import task_kind


def test_numbers_by_hand() -> None:
    reference = np.array([[1.0, 2.0, 0.0], [3.0, 2.5, 0.0], [-4.0, 0.0, 1.0]], np.float32)
    other = np.array([[1.0, 2.0, 0.0], [2.0, 2.5, 0.0], [-4.0, 0.25, 1.0]], np.float32)
    assert agreement.compare(reference, other) == {
        "images": 3,
        "max_difference": 1.0,
        "largest_logit": 4.0,
        "top1_equal": pytest.approx(2 / 3),
        "top1_differs": 1,
        "widest_margin": 0.5,
    }
    same = agreement.compare(reference, reference)
    assert (same["max_difference"], same["top1_equal"], same["widest_margin"]) == (0, 1, 0)
    agreement.require(same, "the file")


@pytest.mark.parametrize("wrong", [0.02, float("nan")])
def test_more_than_rounding_is_refused(wrong: float) -> None:
    reference = np.array([[1.0, 10.0], [3.0, 1.0]], np.float32)
    other = reference.copy()
    other[1, 0] += wrong
    with pytest.raises(KtrayError, match="does not agree with the PyTorch model"):
        agreement.require(agreement.compare(reference, other), "student.onnx")
    other[1, 0] = reference[1, 0] + 0.005
    agreement.require(agreement.compare(reference, other), "student.onnx")


def test_student_and_file_on_real_images(student, stripes: Path, onnx_file: Path, monkeypatch) -> None:
    paths = sorted((stripes / "test").glob("*/*"))
    examples = [LabelledExample(str(path), student.classes.index(path.parent.name)) for path in paths]
    model = Classifier(onnx_file)
    split = Split("test", examples, student.preprocess, 10**6)
    kind = task_kind("classification")
    scores = agreement.score(student, kind, {"onnx": model}, split.batches())
    assert (scores.levels, scores.differing) == (0, 0)
    found = agreement.compare(scores.outputs["pytorch"], scores.outputs["onnx"])
    assert scores.compared["onnx"] == pytest.approx(found)
    assert found["images"] == 60
    assert found["top1_equal"] == 1
    assert found["max_difference"] < 1e-4 * found["largest_logit"]
    values = agreement.metrics(scores, kind, student, "top1")
    expected = np.mean([p.label == path.parent.name for p, path in zip(student.predict(paths), paths, strict=True)])
    assert values["pytorch"]["metric"] == values["onnx"]["top1"] == pytest.approx(expected)
    assert np.mean(list(values["onnx"]["per_class"].values())) == pytest.approx(expected)  # 20 images a class

    # A shipped preprocessing that is not the student's is noticed.
    monkeypatch.setattr("ktray.jobs.export.predict._FILTERS", {"bicubic": 0, "bilinear": 0})  # nearest
    spoilt = agreement.score(student, kind, {"onnx": model}, split.batches())
    assert spoilt.differing == 60
    assert spoilt.levels > 20
