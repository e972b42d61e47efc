"""The 8-bit file is one, validation chooses among settings, and what fails is told."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from heard import heard
from PIL import Image

from ktray.errors import KtrayError
from ktray.jobs.export import agreement, quantise
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.quantise import FIRST, Setting, then


@pytest.fixture(scope="module")
def images(student, stripes: Path) -> dict[str, np.ndarray]:
    return {
        split: np.stack(
            [student.preprocess.eval_transform(Image.open(p)) for p in sorted((stripes / split).glob("*/*"))]
        )
        for split in ("train", "test")
    }


def weights(path: Path) -> dict[str, tuple[str, int]]:
    """Of every convolution: the type and the number of scales of its weights, float32 ones with 0 scales."""
    graph = onnx.load(str(path)).graph
    constants = {one.name: one for one in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv":
            source = made.get(node.input[1])
            if source is None:
                found[node.name] = ("float", 0)
            else:
                scales = constants[source.input[1]]
                kind = onnx.TensorProto.DataType.Name(constants[source.input[0]].data_type)
                found[node.name] = (kind, int(np.prod(scales.dims)))
    return found


def test_weights_are_8_bit_per_channel_and_predictions_stay(student, onnx_file: Path, images, tmp_path: Path) -> None:
    seen: list[float] = []
    lines: list[str] = []

    def accuracy(model: Classifier) -> float:
        rows = agreement.logits(model, images["test"])
        seen.append(float((rows.argmax(1) == reference.argmax(1)).mean()))
        return seen[-1]

    reference = agreement.logits(Classifier(onnx_file), images["test"])
    target = tmp_path / "int8.onnx"
    found = heard(lines, quantise.choose, student, onnx_file, target, images["train"], accuracy, 1.0)
    assert found["drop"] == pytest.approx(1 - max(seen))
    assert [one["val"] for one in found["tried"]] == seen
    assert found["images"] == 15
    assert max(seen) > 0.9
    assert len(lines) == len(seen)
    kinds = set(weights(target).values())
    assert ("INT8", 3) not in kinds  # no layer has three channels: these are scales of channels, not of tensors
    assert any(kind == "INT8" and scales >= 16 for kind, scales in kinds)
    again = Classifier(target)  # class names and preprocessing are in it
    assert again.classes == student.classes
    assert accuracy(again) == max(seen)
    exact = np.abs(agreement.logits(again, images["test"]) - reference).max()
    assert 0 < exact < np.abs(reference).max()


def test_edges_stay_in_float(student, onnx_file: Path, images, tmp_path: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = tmp_path / "prepared.onnx"
    quant_pre_process(str(onnx_file), str(prepared), skip_symbolic_shape=True)
    quantise.quantise(student, prepared, tmp_path / "edges.onnx", images["train"], Setting("minmax", "edges"))
    kinds = list(weights(tmp_path / "edges.onnx").values())
    assert kinds[0] == ("float", 0)
    assert all(kind == "INT8" for kind, _ in kinds[1:])
    gemm = next(n for n in onnx.load(str(tmp_path / "edges.onnx")).graph.node if n.op_type == "Gemm")
    assert "quantized" not in gemm.input[1]


def test_validation_chooses_and_stops_where_nothing_is_lost(student, onnx_file: Path, monkeypatch, tmp_path) -> None:
    wrote: list[Setting] = []

    def written(student, prepared, target: Path, calibration, setting: Setting) -> None:
        wrote.append(setting)
        if setting.ranges == "entropy":
            raise RuntimeError("a histogram without counts\nand more")
        target.write_text(str(setting))

    values = {str(FIRST[0]): 0.7, str(FIRST[1]): 0.8}
    values |= {str(setting): value for setting, value in zip(then(FIRST[1]), (0.8, 0.895, 0.5), strict=True)}
    monkeypatch.setattr(quantise, "quantise", written)
    monkeypatch.setattr(quantise, "Classifier", lambda path: path.read_text())
    target = tmp_path / "int8.onnx"
    choice = quantise.choose(student, onnx_file, target, np.zeros(0), values.__getitem__, 0.9)
    assert wrote == [*FIRST, *then(Setting("percentile"))]
    assert target.read_text() == str(then(FIRST[1])[1])
    assert choice["drop"] == pytest.approx(0.005)
    assert choice["setting"] == {**asdict(Setting("percentile", narrow=True)), "text": target.read_text()}
    assert choice["tried"][2] == {**asdict(Setting("entropy")), "error": "a histogram without counts"}

    wrote.clear()
    quantise.choose(student, onnx_file, target, np.zeros(0), lambda model: 0.9, 0.9)
    assert wrote == [FIRST[0]]


def test_a_model_that_onnxruntime_cannot_quantise(student, onnx_file: Path, monkeypatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("unsupported")

    monkeypatch.setattr(quantise, "quantise", refuse)
    with pytest.raises(KtrayError, match=r"cannot quantise 'test_resnet': unsupported. Set export\.int8=false"):
        quantise.choose(student, onnx_file, tmp_path / "x", np.zeros(0), lambda m: 1.0, 1.0)
