"""The two trainings of a student: pretraining, and finetuning on labels.

A specification is plain data (paths in the store, numbers); a worker builds the models and the sampler from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.data.strong import PLAIN, StrongPolicy, strong_views
from ktray.data.views import ViewPolicy
from ktray.models.features import Features, Maps, feature_dim, freeze_idle, map_shape, pooled_features, trunk
from ktray.models.flops import count_flops, forward_flops, train_flops
from ktray.models.student.classifier import FeaturesAndLogits, classifier_of
from ktray.models.teacher.heads import LinearHead
from ktray.objectives.base import Objective, ObjectiveConfig, ObjectiveContext, Traits
from ktray.recipe.schema import TrainConfig
from ktray.reporting.heartbeat import beat
from ktray.storage.store import Dir
from ktray.tasks.base import TaskKind
from ktray.training.evaluation import evaluator, fall, uncompiled
from ktray.training.inputs import Labels, StudentSpec, TargetSet
from ktray.training.loop import Batch, TrainerSettings, TrainingProgram
from ktray.training.optimisation import decay_groups
from ktray.training.settled import settle_compilation, settle_precision
from ktray.training.worker import WorkerContext


class Pretrain(nn.Module):
    """The student with an objective.

    Args:
        strong: the augmentation of stored views and of labelled images, which only the student sees.
        graphs: whether the student's kernels are in CUDA graphs.
    """

    def __init__(
        self,
        student: nn.Module,
        preprocess: Preprocess,
        objective: Objective,
        strong: StrongPolicy = PLAIN,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.objective, self.strong = student, objective, strong
        self.preprocess, self.graphs = preprocess, graphs

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.graphs:  # an objective may call the student several times; all its outputs are kept until the next step
            torch.compiler.cudagraph_mark_step_begin()
        if self.strong.active:
            batch = {**batch, "pixels": strong_views(batch["pixels"], self.strong, batch["view_key"])}
            if "label_images" in batch:
                batch["label_images"] = strong_views(batch["label_images"], self.strong, batch["label_key"])
        # The views already have their final size, so they are not resized: small crops must stay small.
        return self.objective.step(self.student, self.preprocess.scale, batch, generator)


class Supervise(nn.Module):
    """The student with the loss on labels, plus a distillation term on replayed images of the transfer set, if any.

    Args:
        objective: computes that term; None if nothing is replayed.
        strong: the augmentation of labelled and of replayed images.
    """

    def __init__(
        self,
        kind: TaskKind,
        student: nn.Module,
        preprocess: Preprocess,
        objective: Objective | None,
        strong: StrongPolicy = PLAIN,
    ) -> None:
        super().__init__()
        self.kind, self.student, self.objective, self.strong = kind, student, objective, strong
        self.preprocess = preprocess

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images, labels = batch["images"], batch["label"]
        if self.strong.active:
            images = strong_views(images, self.strong, batch["view_key"])
        replay: Batch = {}
        if self.objective is not None and "replay_pixels" in batch:
            pixels = batch["replay_pixels"]
            if self.strong.active:
                pixels = strong_views(pixels, self.strong, batch["replay_view_key"])
            replay = {"images": pixels.float(), "logits": batch["replay_logits"]}
            replay = self.objective.prepare(replay, generator)
            images = torch.cat([images, replay["images"]])
        outputs = self.student(self.preprocess.normalise(images)).float()
        loss = self.kind.loss(outputs[: len(labels)], labels)
        if self.objective is not None and replay:
            loss = loss + self.objective.loss(outputs[len(labels) :], replay)["loss"]
        return {"loss": loss}


@torch.inference_mode()
def _features(model: nn.Module, preprocess: Preprocess, pixels: torch.Tensor, env: WorkerContext) -> torch.Tensor:
    model.eval()
    features = []
    for i in range(0, len(pixels), 256):
        x = pixels[i : i + 256].to(env.device)
        features.append(pooled_features(model, preprocess.normalise(x)).float())
        beat(f"features of {i + len(x):,} labelled images")
    return torch.cat(features)


def _fit_classifier(model: nn.Module, preprocess: Preprocess, labels: Labels, env: WorkerContext) -> float:
    """Set a pretrained student's untrained last layer to a linear head on its features. Returns the FLOPs of all
    workers, each of which does the same.

    It is a fair start for pretraining that trains no classifier. A random head would also distort published features in
    the first steps (Kumar et al., arXiv 2202.10054).

    The head is fitted on features of unit length. The classifier's features have other lengths, so the weights are
    divided by the mean length.
    """
    pixels, y = labels.load("train", "pixels")
    val_pixels, val_y = labels.load("val", "pixels")
    features = _features(model, preprocess, pixels, env)
    classifier = classifier_of(model)
    val = (_features(model, preprocess, val_pixels, env), val_y)
    heads: list[LinearHead] = []
    flops = count_flops(lambda: heads.append(labels.kind.student_head((features, y), val, len(classifier.weight))))
    (head,) = heads
    with torch.no_grad():
        weight = head.weight / features.norm(dim=1).mean()
        classifier.weight.copy_(weight.view_as(classifier.weight))
        assert classifier.bias is not None  # classifier_of has checked it
        classifier.bias.copy_(head.bias)
    return (flops + forward_flops(model, pixels.shape[1:]) * (len(pixels) + len(val_pixels))) * env.world


@dataclass(frozen=True)
class TransferSpec:
    """Pretraining on the transfer set.

    Attributes:
        taught: the views of the transfer set with their targets.
        labels: the task's labelled images, for validation and, if the objective uses them, for ``label_batch`` images
            in each step.
        policy: the random views of the labelled images.
        strong: the augmentation that only the student sees.
        part: the recipe's section ``train``.
        metric: name of the metric for validation.
        directory: the directory of the store for measured decisions (`ktray.training.settled`).
        probe: whether the classifier starts as a linear head on the features of the initial weights.
    """

    settings: TrainerSettings
    student: StudentSpec
    taught: TargetSet
    labels: Labels
    policy: ViewPolicy
    label_batch: int
    objective: ObjectiveConfig
    part: TrainConfig
    metric: str
    directory: Dir
    strong: StrongPolicy = PLAIN
    probe: bool = False

    def build(self, env: WorkerContext) -> TrainingProgram:
        s, taught = self.settings, self.taught
        model, preprocess = self.student.build(env, s.seed)
        traits = self.objective.traits
        fits = self.probe and traits.trains_classifier
        before = _fit_classifier(model, preprocess, self.labels, env) if fits else 0.0
        labelled = traits.labelled
        env = env.divide(int(self.part.batch_size or 1), *([self.label_batch] if labelled else []))
        batch = env.rows(int(self.part.batch_size or 1))
        precision = settle_precision(self.directory, self.student, model, env, batch, self.part.precision)
        objective: Objective = self.objective.build(hflip=self.policy.hflip)
        objective.match_with(self.labels.kind.matching)
        forms: dict[str, Callable[[nn.Module], nn.Module]] = {
            "features": Features,
            "map": Maps,
            "features_and_logits": FeaturesAndLogits,
        }
        student = forms[traits.reads](model) if traits.reads in forms else model
        size = preprocess.size[0]
        freeze_idle(model, student, size)
        objective.setup(
            ObjectiveContext(
                num_classes=self.student.num_classes,
                student_dim=feature_dim(trunk(model)),
                student_map_dim=map_shape(model, size)[0] if traits.reads == "map" else 0,
                teacher_dim=taught.embed_dim or None,
                teacher_patch_dim=taught.patch_dim or None,
                seed=s.seed,
                student=student,
                image_size=size,
                vocabulary=taught.vocabulary,
                text_length=taught.text_length,
                source_classes=taught.source_classes,
                teacher_sample=taught.sample("embedding") if traits.sampled else None,
            )
        )
        # An objective that cuts its own views from whole images also changes them itself.
        strong = self.strong if traits.views == "fixed" else PLAIN
        more = [self.objective.name, traits.reads, self.label_batch]
        compilation = settle_compilation(
            self.directory, self.student, model, precision, env, batch, s.steps, self.part, more
        )
        module = Pretrain(student, preprocess, objective, strong, compilation.graphs).to(env.device)
        compilation.apply(module.student, forgiving=self.part.compile == "auto")
        label_batch = env.rows(self.label_batch) if labelled else 0

        def batches(start: int, stop: int) -> Iterator[Batch]:
            stream = taught.batches(self.part, env, batch, s.seed, start, stop)
            if not label_batch:
                yield from stream
                return
            labelled_stream = self.labels.batches(env, label_batch, self.policy, size, s.seed, start, stop)
            for views, labelled_views in zip(stream, labelled_stream, strict=True):
                own = {"images": "label_images", "label": "label_of", "view_key": "label_key"}
                yield {**views, **{name: labelled_views[column] for column, name in own.items()}}

        evaluate, tolerance, validation = None, 0.0, 0.0
        if traits.trains_classifier or labelled:
            pixels, labels = self.labels.load("val", "pixels")
            evaluate = evaluator(self.labels.kind, pixels, labels, _predict(preprocess), env, self.metric)
            evaluate = uncompiled(evaluate) if compilation.mode else evaluate
            tolerance = fall(len(labels))
            validation = forward_flops(model, (3, size, size)) * len(labels)
        labelled_cost = train_flops(model, (3, size, size)) * label_batch if label_batch else 0.0
        teacher = taught.teacher()
        live = teacher.flops if teacher else 0.0
        per_image = objective.flops(
            lambda side: train_flops(model, (3, side, side)), lambda side: forward_flops(model, (3, side, side)), size
        )
        return TrainingProgram(
            module=module,
            model=model,
            groups=decay_groups(model, s.weight_decay, frozen=objective.frozen_share) + decay_groups(objective, 0.0),
            batches=batches,
            evaluate=evaluate,
            flops_per_step=((per_image + live) * batch + labelled_cost) * env.rank_count,
            images_per_step=(batch + label_batch) * env.rank_count,
            device=env.device,
            flops_per_evaluation=validation,
            flops_before=before,
            weight=env.weight,
            autocast=precision.autocast_dtype,
            # Heads that become part of the student are averaged with it.
            averaged=module if labelled else None,
            after_step=lambda progress: objective.after_step(student, progress),
            finish=objective.finish,
            tolerance=tolerance,
            compiled=f"{compilation.mode or 'no'}: {compilation.reason}",
            teach=(lambda views: {**views, **teacher(views["pixels"])}) if teacher else None,
        )


@dataclass(frozen=True)
class FinetuneSpec:
    """Finetuning on the labels. With random initial weights, it trains the baseline from scratch.

    Attributes:
        batch: number of labelled images in a step, over all workers.
        objective: the objective of the pretraining; None if there was none.
        part: the recipe's section for this training.
        taught: the transfer set of the pretraining.
        replay: number of images of the transfer set for each labelled image.
        strong: the augmentation of labelled and of replayed images.
        probe: whether the classifier starts as a linear head on the features of the initial weights.
    """

    settings: TrainerSettings
    student: StudentSpec
    labels: Labels
    policy: ViewPolicy
    batch: int
    objective: ObjectiveConfig | None
    part: TrainConfig
    metric: str
    directory: Dir
    taught: TargetSet | None = None
    replay: float = 0.0
    strong: StrongPolicy = PLAIN
    probe: bool = False

    def build(self, env: WorkerContext) -> TrainingProgram:
        s, kind = self.settings, self.labels.kind
        model, preprocess = self.student.build(env, s.seed)
        env = env.divide(self.batch)
        batch = env.rows(self.batch)
        traits = self.objective.traits if self.objective else Traits()
        untrained = self.student.start is not None and not traits.trains_classifier
        fits = kind.linear_student and (self.probe or untrained)
        before = _fit_classifier(model, preprocess, self.labels, env) if fits else 0.0
        # If the pretraining did not compare predictions, there is no distillation term to continue.
        extra = round(batch * self.replay) if self.taught and traits.replays else 0
        precision = settle_precision(self.directory, self.student, model, env, batch + extra, self.part.precision)
        freeze_idle(model, model, preprocess.size[0])
        objective = self.objective.build() if self.objective and extra else None
        if objective is not None:
            objective.match_with(kind.matching)
        module = Supervise(kind, model, preprocess, objective, self.strong).to(env.device)
        pixels, val_labels = self.labels.load("val", "pixels")
        size = preprocess.size[0]

        def batches(start: int, stop: int) -> Iterator[Batch]:
            labelled = self.labels.batches(env, batch, self.policy, size, s.seed, start, stop)
            if not (self.taught and extra):
                yield from labelled
                return
            replayed = self.taught.batches(self.part, env, extra, s.seed + 1, start, stop)
            for images, replay in zip(labelled, replayed, strict=True):
                yield {**images, **{f"replay_{name}": value for name, value in replay.items()}}

        teacher = self.taught.teacher() if self.taught and extra else None

        def teach(views: Batch) -> Batch:
            assert teacher is not None
            targets = teacher(views["replay_pixels"])
            return {**views, **{f"replay_{name}": value for name, value in targets.items()}}

        live = teacher.flops * extra * env.rank_count if teacher else 0.0
        images = (batch + extra) * env.rank_count
        return TrainingProgram(
            module=module,
            model=model,
            groups=decay_groups(model, s.weight_decay),
            batches=batches,
            evaluate=evaluator(kind, pixels, val_labels, _predict(preprocess), env, self.metric),
            flops_per_step=train_flops(model, (3, size, size)) * images + live,
            images_per_step=images,
            device=env.device,
            flops_per_evaluation=forward_flops(model, (3, size, size)) * len(val_labels),
            flops_before=before,
            autocast=precision.autocast_dtype,
            weight=env.weight,
            teach=teach if teacher else None,
        )


def _predict(preprocess: Preprocess) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda model, x: model(preprocess.normalise(x))
