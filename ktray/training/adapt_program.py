"""The training of the teacher: its adaptation to the labels. See `ktray.training.programs` for those of the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ktray.data.views import ViewPolicy
from ktray.models.flops import forward_flops, train_flops
from ktray.models.teacher.lora import add_lora, merge_lora
from ktray.models.teacher.spec import predict_numpy
from ktray.recipe.teacher import TeacherFinetuneConfig, TeacherLoraConfig
from ktray.storage.store import Dir
from ktray.tasks.base import TaskKind
from ktray.training.evaluation import evaluator
from ktray.training.inputs import Labels
from ktray.training.loop import Batch, TrainerSettings, TrainingProgram
from ktray.training.worker import WorkerContext

if TYPE_CHECKING:
    from ktray.models.teacher.adapted import AdaptedTeacher


@dataclass(frozen=True)
class AdaptSpec:
    """Finetuning of the teacher's image tower (or of its products of low rank) and head on the labels, with layer-wise
    decay of the learning rate.

    Attributes:
        start: the directory of the adapted teacher that the training starts from.
    """

    settings: TrainerSettings
    start: Dir
    labels: Labels
    policy: ViewPolicy
    part: TeacherFinetuneConfig
    metric: str

    def build(self, env: WorkerContext) -> TrainingProgram:
        kind = self.labels.kind
        with self.start.local() as folder:
            teacher = kind.teacher_form.load(folder, env.device)
        self.prepare(teacher)
        env = env.divide(self.part.batch_size)
        batch = env.rows(self.part.batch_size)
        pixels, val_labels = self.labels.load("val", "pixels")
        size = teacher.preprocess.size
        groups = teacher.param_groups(self.part.layer_decay, self.part.weight_decay, self.part.head_lr / self.part.lr)
        seed = self.settings.seed
        return TrainingProgram(
            module=_Adapt(kind, teacher),
            model=teacher,
            groups=groups,
            batches=lambda start, stop: self.labels.batches(env, batch, self.policy, size[0], seed, start, stop),
            evaluate=evaluator(kind, pixels, val_labels, lambda m, x: m.logits(x), env, self.metric),
            flops_per_step=train_flops(teacher.image_tower, (3, *size)) * batch * env.rank_count,
            images_per_step=batch * env.rank_count,
            device=env.device,
            flops_per_evaluation=forward_flops(teacher.image_tower, (3, *size)) * len(val_labels),
            weight=env.weight,
            autocast=torch.bfloat16 if env.device.type == "cuda" else None,
        )

    def prepare(self, teacher: AdaptedTeacher) -> None:
        """Give a teacher the parameters that are trained, and that the stored weights contain."""
        if isinstance(self.part, TeacherLoraConfig):
            add_lora(teacher.image_tower, self.part.rank, self.part.alpha, self.settings.seed)

    def complete(self, teacher: AdaptedTeacher) -> None:
        """Make an ordinary teacher of a trained one."""
        merge_lora(teacher.image_tower)
        teacher.finetuned = True


def predict_split(teacher: AdaptedTeacher, labels: Labels, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's calibrated predictions for the images of a split, (N, C) float32 or maps (N, C, h, w), and their
    targets (N, ...). The pixels of few shards are in memory at a time."""
    kind = labels.kind
    target = kind.label_column("pixels")
    outputs, targets = [], []
    for rows in labels.shards(split, ["pixels", target]):
        outputs.append(torch.from_numpy(predict_numpy(teacher, rows["pixels"], kind.test_batch)))
        targets.append(kind.targets(rows[target]))
    return torch.cat(outputs), torch.cat(targets)


class _Adapt(nn.Module):
    def __init__(self, kind: TaskKind, teacher: AdaptedTeacher) -> None:
        super().__init__()
        self.kind, self.teacher = kind, teacher

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": self.kind.loss(self.teacher.logits(batch["images"]).float(), batch["label"])}
