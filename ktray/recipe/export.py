"""The recipe section of jobs/export.py. Other jobs do not read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.section import Section


class ExportConfig(Section):
    run: str | None = Field(
        None,
        description="run whose student is exported: its id in the store, or its folder, local or s3://; null: the "
        "newest run in the store that has a student",
    )
    targets: list[str] = Field(
        [],
        description="further files to write, by the names of the export targets, such as [openvino,executorch]; most "
        "of them need an extra: pip install 'ktray[openvino]'",
    )
    graph: Literal["logits", "probabilities"] = Field(
        "logits",
        description="what the files of export.targets compute: logits of normalised float32 images; or probabilities "
        "and decisions of uint8 pixels, with normalisation, temperature and thresholds in the file",
    )
    abstain: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the validation images, the least confident ones, for which a file with "
        "export.graph=probabilities gives no class; the same threshold holds for other images",
    )
    int8: bool = Field(
        False, description="also export an 8-bit model, quantised with the settings that are best on validation"
    )
    calibration: int = Field(
        256,
        ge=1,
        description="number of labelled training images on which the value ranges of the 8-bit model are measured",
    )
    batch: int = Field(
        32, ge=2, description="batch size at which latency is measured, in addition to a batch of one image"
    )
    register_as: str | None = Field(
        None, description="name of the model in MLflow's registry that receives the export as a new version; null: none"
    )
    alias: str = Field("champion", min_length=1, description="alias of the new version in MLflow's registry")
    push: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$",
        description="ORG/NAME of the repository on the Hugging Face hub that receives the export with its model card, "
        "optionally with @BRANCH; the token comes from HF_TOKEN or `hf auth login`; null: none",
    )
    private: bool = Field(True, description="whether a repository that export.push creates is private")
    serve: Literal["float", "int8"] = Field(
        "float", description="file that the model in MLflow runs: the float or the 8-bit one"
    )
