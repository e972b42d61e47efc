"""The recipe section ``teach``: the teacher's targets and the views for which they are computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from ktray.recipe.section import Section


class TeachConfig(Section):
    mode: Literal["auto", "cached", "streamed", "live"] = Field(
        "auto",
        description="computation of the teacher's targets: cached (computed once and stored), streamed (computed by "
        "separate processes during training), or live (computed by the training workers); auto: the cheapest",
    )
    views: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="number of augmented views of each image of the transfer set; auto: chosen by the kind of images",
    )
    top_k: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="number of largest teacher logits that are stored for each view, with the total probability of "
        "the other classes; 0: all logits; auto: all for up to 2000 classes, else 200",
    )
    jpeg: int | None = Field(
        None,
        ge=1,
        le=100,
        description="JPEG quality of stored views, which saves most of the space; null: views are stored without "
        "compression",
    )
    crop_min: float = Field(0.5, gt=0, le=1, description="area of the smallest random crop, as a share of the image")
    hflip: float = Field(0.5, ge=0, le=1, description="probability that a view is flipped horizontally")
    jitter: float = Field(
        0.2, ge=0, lt=1, description="strength of the random changes of brightness, contrast and saturation"
    )
    seed: int = Field(0, ge=0, description="seed of the random crops, flips and colours of the views")

    @property
    def view_count(self) -> int:
        """``views`` of a resolved recipe."""
        return int(self.views)
