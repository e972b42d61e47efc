"""Static 8-bit quantisation after training, by onnxruntime: several settings are tried, and validation chooses one.

Weights are signed and scaled per output channel; activations are unsigned, with ranges measured on labelled training
images. It cannot be known in advance how the ranges of a network should be measured: some settings damage gates
(squeeze-and-excitation, hard-swish) and heads, others do not.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ktray.errors import KtrayError
from ktray.jobs.export.onnx_file import INPUT, annotate
from ktray.jobs.export.predict import Classifier, normalise
from ktray.models.messages import cause
from ktray.models.student.classifier import Student

logger = logging.getLogger("ktray")

# No further setting is tried below the first drop on validation; a note is written above the second. Fractions.
ENOUGH, NOTABLE = 0.001, 0.01
# Images whose activations are in memory at once while their ranges are measured.
STRIDE = 16
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Setting:
    """How a student is quantised.

    Attributes:
        ranges: how the ranges of activations are measured: the extremes, a percentile that excludes outliers, or the
            threshold that loses the least information (entropy).
        keep: what stays in float32: ``nothing``, or ``edges``, which are the first convolution, the classifier, and all
            operations without weights (gates, sums, pooling).
        narrow: whether weights have 7 bits, for processors whose 8-bit products saturate (x86 without VNNI).
    """

    ranges: Literal["minmax", "percentile", "entropy"]
    keep: Literal["nothing", "edges"] = "nothing"
    narrow: bool = False

    def __str__(self) -> str:
        kept = ", first layer, classifier and gates in float" if self.keep == "edges" else ""
        return f"{self.ranges} ranges{kept}{', 7-bit weights' if self.narrow else ''}"


_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
FIRST = (Setting("minmax"), Setting("percentile"), Setting("entropy"))


def then(best: Setting) -> tuple[Setting, ...]:
    """Return the settings that are tried after `FIRST`, as variants of the best of these."""
    return (
        Setting(best.ranges, "edges"),
        Setting(best.ranges, "nothing", narrow=True),
        Setting(best.ranges, "edges", narrow=True),
    )


def choose(
    student: Student,
    source: Path,
    target: Path,
    calibration: np.ndarray,
    accuracy: Callable[[Classifier], float],
    reference: float,
) -> dict[str, Any]:
    """Write the 8-bit file that is best on validation, or the first of several equally good ones.

    Args:
        student: the student that the file contains.
        source: the float32 ONNX file.
        target: path of the new file.
        calibration: (N, 3, height, width) uint8 training images.
        accuracy: returns the accuracy of a file on validation, a fraction.
        reference: accuracy of the float32 file on validation.

    Returns:
        ``setting``; ``drop`` on validation (a fraction, negative if the accuracy rose); ``images``, the number of
        calibration images; ``tried``, every setting with its accuracy or its error.

    Raises:
        KtrayError: onnxruntime could not quantise the student with any setting.
    """
    tried: list[dict[str, Any]] = []
    best: tuple[float, Setting] | None = None
    with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)

        def attempt(setting: Setting) -> None:
            nonlocal best
            candidate = Path(folder) / "candidate.onnx"
            try:
                quantise(student, prepared, candidate, calibration, setting)
                value = accuracy(Classifier(candidate))
            except Exception as error:  # onnxruntime raises its own exception types, and numpy's
                tried.append({**asdict(setting), "error": cause(error)})
                return
            tried.append({**asdict(setting), "val": value})
            logger.info(f"export    int8, {setting}: {value:.2%} on validation (float32 {reference:.2%})")
            if best is None or value > best[0]:
                best = (value, setting)
                candidate.replace(target)

        for setting in FIRST:
            if best is None or reference - best[0] > ENOUGH:
                attempt(setting)
        if best is not None and reference - best[0] > ENOUGH:
            for setting in then(best[1]):
                if reference - best[0] > ENOUGH:
                    attempt(setting)
    if best is None:
        raise KtrayError(
            f"onnxruntime cannot quantise '{student.name}': {tried[-1]['error']}",
            "Set export.int8=false.",
        )
    return {
        "setting": {**asdict(best[1]), "text": str(best[1])},
        "drop": reference - best[0],
        "images": len(calibration),
        "tried": tried,
    }


def quantise(student: Student, prepared: Path, target: Path, calibration: np.ndarray, setting: Setting) -> None:
    """Write one 8-bit file.

    Args:
        prepared: the float32 file after onnxruntime's ``quant_pre_process``.
        calibration: (N, 3, height, width) uint8.
    """
    graph = onnx.load(str(prepared)).graph
    weighted = [node for node in graph.node if node.op_type in _WEIGHTED]
    edges = setting.keep == "edges"
    # onnxruntime requires a multiple of the stride.
    stride = min(STRIDE, len(calibration))
    with _quiet():
        quantize_static(
            str(prepared),
            str(target),
            _Reader(calibration[: len(calibration) // stride * stride], student.preprocess.to_dict()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_WEIGHTED) if edges else None,
            nodes_to_exclude=[weighted[0].name, weighted[-1].name] if edges else None,
            per_channel=True,
            reduce_range=setting.narrow,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=_METHODS[setting.ranges],
            extra_options={"CalibStridedMinMax": stride},
        )
    quantised = onnx.load(str(target))
    annotate(quantised, student)
    onnx.save(quantised, str(target))


class _Reader(CalibrationDataReader):
    """Reader of calibration images for onnxruntime, which sets a range and reads its images one by one."""

    def __init__(self, pixels: np.ndarray, preprocess: dict[str, Any]) -> None:
        self.pixels, self.preprocess = pixels, preprocess
        self.set_range(0, len(pixels))

    def __len__(self) -> int:
        return len(self.pixels)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Set the range of images that `get_next` returns."""
        self.rest = self._images(start_index, end_index)

    def _images(self, start: int, end: int) -> Iterator[dict[str, np.ndarray]]:
        for i in range(start, end):
            yield {INPUT: normalise(np.asarray(self.pixels[i : i + 1]), self.preprocess)}

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context, hide what onnxruntime prints for each stride, and its advice through the root logger, which
    ktray already follows."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)
