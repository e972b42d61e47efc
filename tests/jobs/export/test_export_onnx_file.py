"""The file is valid ONNX, says what PyTorch says for any batch, and knows its classes."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ktray.errors import KtrayError
from ktray.jobs.export import onnx_file as module
from ktray.models.student.classifier import build_student


def logits(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {module.INPUT: x.numpy()})[0]


def test_logits_are_pytorchs_for_every_batch(student, onnx_file: Path) -> None:
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = student(x).numpy()
        np.testing.assert_allclose(logits(onnx_file, x), expected, rtol=1e-4, atol=1e-4)


def test_opset_shapes_and_facts_stand_in_the_file(student, onnx_file: Path) -> None:
    model = onnx.load(str(onnx_file))
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", module.OPSET)]
    assert module.signature(model) == {
        "opset": module.OPSET,
        "input": {"name": "image", "dtype": "float32", "shape": [None, 3, 32, 32]},
        "output": {"name": "logits", "dtype": "float32", "shape": [None, 3]},
    }
    facts = json.loads({p.key: p.value for p in model.metadata_props}["ktray"])
    assert facts == {"classes": student.classes, "preprocess": student.preprocess.to_dict()}


def test_branches_that_only_training_needs_are_merged(tmp_path: Path) -> None:
    student = build_student("repghostnet_050", {}, 5, 64).eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    module.write(student, tmp_path / "merged.onnx")
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        np.testing.assert_allclose(logits(tmp_path / "merged.onnx", x), student(x).numpy(), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


class Odd(nn.Module):
    """Looks at the pixels to decide which way to go, which no graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_torch_cannot_export_is_one_clear_error(tmp_path: Path) -> None:
    student = build_student("test_resnet", {}, 3, 32)
    student.model = Odd().eval()
    with pytest.raises(KtrayError, match=r"cannot be exported to ONNX: .* choose another student\.name for ONNX"):
        module.write(student, tmp_path / "odd.onnx")
    assert not (tmp_path / "odd.onnx").exists()


def test_a_fixed_batch_or_a_broken_graph_is_refused(onnx_file: Path) -> None:
    model = onnx.load(str(onnx_file))
    broken = onnx.load(str(onnx_file))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(KtrayError, match=r"fixed batch size in 'image'"):
        module.check(model, Path("student.onnx"))
    broken.graph.node[0].op_type = "Convolve"
    with pytest.raises(KtrayError, match="not valid ONNX"):
        module.check(broken, Path("student.onnx"))
