"""The recipe sections for training the student: pretraining, finetuning, and the scratch baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.section import Section


class TrainConfig(Section):
    """Pretraining on the transfer set (and training of the scratch baseline)."""

    epochs: float | None = Field(
        None,
        gt=0,
        description="pretraining length as passes over the transfer set; ignored where train.steps is set; null: "
        "chosen with train.steps",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="pretraining length in optimizer steps; takes precedence over train.epochs; null: chosen by the "
        "size of the transfer set",
    )
    batch_size: int | None = Field(
        None, ge=1, description="images per pretraining step, over all workers; null: chosen by the device"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate of pretraining (AdamW, linear warm-up, cosine decay)")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW in pretraining")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the pretraining steps in which the learning rate rises"
    )
    ema: float = Field(
        0.99, ge=0, lt=1, description="decay of the student's averaged weights (EMA) in pretraining; 0: no averaging"
    )
    clip: float = Field(1.0, gt=0, description="norm to which larger gradients are clipped")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="number format of training; auto: the faster one in a short measurement"
    )
    compile: bool = Field(False, description="compile the student with torch.compile")
    accumulate: int = Field(
        1,
        ge=1,
        description="number of parts that the batch of a worker is cut into (gradient accumulation), which saves "
        "memory; batch statistics and contrastive terms see one part at a time",
    )
    checkpoint_seconds: float = Field(15.0, gt=0, description="seconds between two checkpoints of training")
    resident_bytes: int = Field(
        2_000_000_000,
        ge=0,
        description="size in bytes up to which a transfer set stays in the memory of a worker; larger ones are "
        "streamed",
    )
    window_bytes: int = Field(
        256_000_000, ge=1, description="size in bytes of the window in which streamed rows are shuffled"
    )


class FinetuneConfig(Section):
    """Finetuning of the student on the labels."""

    steps: int = Field(150, ge=0, description="optimizer steps of finetuning; 0: no finetuning")
    batch_size: int = Field(64, ge=1, description="labelled images per finetuning step, over all workers")
    lr: float = Field(3e-4, gt=0, description="peak learning rate of finetuning")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW in finetuning")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the finetuning steps in which the learning rate rises")
    ema: float = Field(
        0.98, ge=0, lt=1, description="decay of the student's averaged weights (EMA) in finetuning; 0: no averaging"
    )
    replay: float = Field(
        1.0,
        ge=0,
        description="transfer images per labelled image in a finetuning batch, on which the distillation loss "
        "continues; 0: labels only",
    )
    evals: int = Field(
        10,
        ge=1,
        description="number of validations during finetuning; the student with the best one is kept, the start "
        "included",
    )


class BaselinesConfig(Section):
    scratch: bool = Field(True, description="also train the student without pretraining, as the baseline")
    scratch_steps: int | None = Field(
        None, ge=1, description="optimizer steps of the scratch baseline; null: as many as train.steps"
    )
