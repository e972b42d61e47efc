"""The result of jobs/export.py, the file ``export.json``."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from ktray.reporting.result.calibration import ExportCalibration
from ktray.reporting.result.parts import Device, Number, Result, ResultPart


class ExportedStudent(ResultPart):
    name: str
    kwargs: dict[str, Any]
    parameters: int
    size: list[int] = Field(description="height and width of the input, pixels")
    classes: int


class Tensor(ResultPart):
    name: str
    dtype: str
    shape: list[int | None] = Field(description="null: any size")


class Agreement(ResultPart):
    """The differences between the outputs of two models on the same images: logits, or for files with probabilities,
    these."""

    images: int
    max_difference: Number
    largest_logit: Number
    top1_equal: Number
    top1_differs: int
    widest_margin: Number
    decisions: int = Field(0, description="number of decisions (classes of images or pixels, or sets) of the file")
    decisions_differ: int = Field(0, description="number of decisions that are not PyTorch's")


class OnnxFile(ResultPart):
    opset: int
    input: Tensor
    output: Tensor
    agreement: dict[str, Agreement] = Field(description="agreement with PyTorch, by split")


class PreprocessingCheck(ResultPart):
    levels: int = Field(description="largest difference of a pixel, in levels of 255")
    images: int = Field(description="number of images with any difference")


class QuantiseSetting(ResultPart):
    ranges: str
    keep: str
    narrow: bool


class ChosenSetting(QuantiseSetting):
    text: str


class TriedSetting(QuantiseSetting):
    val: Number = Field(0, description="the metric on validation; left out if the setting failed")
    error: str = Field("", description="why the setting failed; left out if it did not fail")


class Int8File(ResultPart):
    setting: ChosenSetting
    drop: Number = Field(description="loss of the metric on validation by quantisation")
    images: int = Field(description="number of training images on which the value ranges were measured")
    tried: list[TriedSetting]


class ModelScore(ResultPart):
    """In addition to the keys here, it has each metric of the task kind, under the name of the metric."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    metric: Number = Field(description="the metric of the task")
    per_class: dict[str, Number | None]


class ExportMetric(ResultPart):
    name: str
    val: dict[str, ModelScore] = Field(description="scores by model: pytorch, and each target")
    test: dict[str, ModelScore] | None = Field(description="scores by model; null without a test split")


class LatencyRow(ResultPart):
    batch: int
    threads: int
    median_ms: Number
    p90_ms: Number
    runs: int


class ModelLatency(ResultPart):
    rows: list[LatencyRow]
    memory_bytes: int


class Latency(ResultPart):
    batch: int
    busy_cores: Number | None
    models: dict[str, ModelLatency]


class ShippedFile(ResultPart):
    bytes: int
    sha256: str


class LoggedModel(ResultPart):
    """The export in MLflow. It has a name, a version and an alias if it is registered."""

    model_uri: str | None = Field(description="address of the model; null: the server did not answer")
    name: str = ""
    version: str = ""
    alias: str = ""


class PushedModel(ResultPart):
    """The export on the Hugging Face hub."""

    repository: str
    revision: str = Field(description="branch")
    commit: str
    url: str


class ExportResult(Result):
    """jobs/export.py. Each export target that the recipe requests has an object under its own name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, dict[str, Any] | None]

    key: str = Field(description="digest of everything that the export depends on")
    time: Number = Field(description="seconds since 1970")
    date: str
    run_id: str = Field(description="id of the run whose student is exported")
    student: ExportedStudent
    onnx: OnnxFile
    preprocessing: PreprocessingCheck
    int8: Int8File | None
    metric: ExportMetric
    calibration: ExportCalibration | None = Field(description="null: an image may have several classes, or none")
    unusable: dict[str, int] = Field(description="number of images that could not be used, by split")
    latency: Latency
    device: Device
    versions: dict[str, str]
    mlflow: LoggedModel | None
    hub: PushedModel | None = Field(None, description="null: export.push is not set")
    notes: list[str]
    files: dict[str, ShippedFile]
