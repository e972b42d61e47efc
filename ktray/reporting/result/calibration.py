"""The honesty of a student's probabilities, in the results of jobs/distill.py and jobs/export.py."""

from __future__ import annotations

from pydantic import Field

from ktray.reporting.result.parts import Number, ResultPart


class ReliabilityBin(ResultPart):
    images: int
    confidence: Number = Field(description="mean probability of the predicted class")
    accuracy: Number


class CoveragePoint(ResultPart):
    """The most confident images, if the model abstains from the others."""

    share: Number = Field(description="share of the images that are predicted")
    accuracy: Number
    threshold: Number = Field(description="lowest confidence among them")


class Calibration(ResultPart):
    """Whether predictions with confidence p are right with frequency p (`ktray.tasks.calibration`)."""

    ece: Number = Field(description="expected calibration error, a fraction")
    nll: Number = Field(description="mean negative log-likelihood of the labels, nats")
    confidence: Number = Field(description="mean probability of the predicted class")
    bins: list[ReliabilityBin] = Field(description="bins of equal width by confidence, those with images")
    coverage: list[CoveragePoint]


class SplitCalibration(ResultPart):
    """A split before and after the temperature."""

    ece_before: Number
    nll_before: Number
    ece: Number
    nll: Number


class Abstention(ResultPart):
    """A threshold of the calibrated confidence below which the model abstains; it is chosen on validation."""

    share: Number = Field(description="share of the validation images above the threshold")
    threshold: Number
    val_accuracy: Number
    test_share: Number | None = Field(description="share of the test images above it; null without a test split")
    test_accuracy: Number | None = Field(description="of these images; null if there are none")


class ExportCalibration(ResultPart):
    """The temperature that the exported files divide their logits by."""

    temperature: Number = Field(description="fitted on validation; above 1: the student was too confident")
    val: SplitCalibration
    test: SplitCalibration | None
    abstention: list[Abstention]
    files: list[str] = Field(description="the exported files that contain the temperature, for predict.py")
