"""The recipe sections for training the student: pretraining, finetuning, and the scratch baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.section import Section


class AugmentConfig(Section):
    """Strong augmentation in every training of the student: changes of a view that only the student sees, drawn anew at
    each visit. The target of the teacher belongs to the view without them."""

    crop_min: float = Field(
        1.0, gt=0, le=1, description="area of the smallest random crop of a view, as a share of the view; 1: no crop"
    )
    photometric: int = Field(
        0, ge=0, description="number of random photometric operations (those of RandAugment) on each view; 0: none"
    )
    magnitude: float = Field(0.5, ge=0, le=1, description="strength of the photometric operations")
    erase: float = Field(0.0, ge=0, le=1, description="probability that a box of the view is erased; 0: never")


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
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of pretraining (AdamW, linear warm-up, cosine decay); null: chosen by the "
        "start of the student",
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW in pretraining")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the pretraining steps in which the learning rate rises"
    )
    ema: float = Field(
        0.99, ge=0, lt=1, description="decay of the student's averaged weights (EMA) in pretraining; 0: no averaging"
    )
    clip: float = Field(1.0, gt=0, description="norm to which larger gradients are clipped")
    evals: int = Field(
        12,
        ge=1,
        description="number of validations during pretraining; the best student is kept if later ones are worse by "
        "more than chance",
    )
    patience: int = Field(
        4,
        ge=0,
        description="number of validations in a row that are worse than the best one by more than chance, after which "
        "pretraining ends; 0: it never ends early",
    )
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="number format of training; auto: the faster one in a short measurement"
    )
    compile: bool | Literal["auto", "graphs"] = Field(
        "auto",
        description="compile the student with torch.compile in pretraining; auto: on a GPU, if the training is long "
        "and a measurement shows that it saves more time than it takes; graphs: compile into CUDA graphs, for small "
        "batches on a GPU",
    )
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
        description="size in bytes up to which a transfer set stays in the memory of a worker, or on its GPU; larger "
        "ones are streamed",
    )
    window_bytes: int | None = Field(
        None,
        ge=1,
        description="size in bytes of the window in which streamed rows are shuffled; null: chosen by the memory of "
        "the machines",
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
    scratch: bool | Literal["auto"] = Field(
        "auto",
        description="also train the student on the labels from random weights, as a baseline; auto: if pretraining "
        "starts from random weights",
    )
    start: bool | Literal["auto"] = Field(
        "auto",
        description="also finetune the student on the labels from its published weights, as a baseline; auto: if "
        "pretraining starts from published weights",
    )
    scratch_steps: int | None = Field(
        None, ge=1, description="optimizer steps of the baselines; null: as many as train.steps"
    )
