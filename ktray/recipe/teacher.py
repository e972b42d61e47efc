"""The recipe's sections for the adaptations that train the teacher's tower."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ktray.recipe.places import Place
from ktray.recipe.section import Section

# The names of these adaptations, which are also those of their sections.
TRAINED_TOWERS = ("finetune", "lora")


class OtherTeacher(Section):
    """A further teacher. It may be written as its name alone."""

    name: str = Field(description="model, as in teacher.name")
    checkpoint: Place | None = Field(None, description="file of its weights; null: published weights")
    config: Place | None = Field(None, description="JSON file with its open_clip configuration")
    image_size: int | None = Field(None, ge=16, description="side of its input, in pixels; null: its own")


def other_teachers(value: Any) -> Any:
    """The value of ``teacher.others`` with a mapping in place of each name."""
    one = [value] if isinstance(value, str | dict) else value
    return [{"name": item} if isinstance(item, str) else item for item in one] if isinstance(one, list) else one


class TeacherFinetuneConfig(Section):
    """Finetuning of the teacher's tower (teacher.adapt=finetune or auto)."""

    steps: int = Field(150, ge=1, description="optimizer steps of the teacher's finetuning")
    batch_size: int = Field(64, ge=1, description="images per step of the teacher's finetuning, over all workers")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of the teacher's last layers")
    head_lr: float = Field(1e-3, gt=0, description="peak learning rate of the head on the teacher")
    layer_decay: float = Field(
        0.75, gt=0, le=1, description="factor by which the learning rate falls from each block to the block below it"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW in the teacher's finetuning")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the teacher's averaged weights (EMA); 0: no averaging")


class TeacherLoraConfig(TeacherFinetuneConfig):
    """Low-rank adaptation of the teacher's tower (teacher.adapt=lora)."""

    rank: int = Field(8, ge=1, description="rank of the products that LoRA adds to the weights of the teacher's layers")
    alpha: float = Field(16.0, gt=0, description="scale of these products: alpha / rank")
    steps: int = Field(150, ge=1, description="optimizer steps of the low-rank adaptation")
    batch_size: int = Field(64, ge=1, description="images per step of the low-rank adaptation, over all workers")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the products in the teacher's last layers")
    head_lr: float = Field(1e-3, gt=0, description="peak learning rate of the head in the low-rank adaptation")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor by which LoRA's learning rate falls from each block to the block below it"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW in the low-rank adaptation")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the averaged products and head (EMA); 0: no averaging")
