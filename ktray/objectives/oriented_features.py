"""Task-oriented transfer of features: the student matches the adapted teacher's features, and its predictions.

The teacher first learns the task (ADAPT), and its tower then gives the target: its embedding ``t`` and its calibrated
logits ``z`` of a view. With the student's pooled features ``f``, its logits ``s`` and a projection ``P``, which is
trained together with the student and then dropped,

    loss = features * d(P(f), t) + predictions * T^2 * KL(softmax(z / T) || softmax(s / T)).

``d`` and ``P`` are those of `ktray.objectives.agnostic`: the cosine distance, the squared error to the target of unit
mean square, or the contrastive loss. The second term is the loss of `ktray.objectives.oriented`. Both read one pass of
the student. Features of an adapted teacher instead of its predictions are the target of EdgeCrafter (arXiv
2603.18739), for detection; ``predictions=0`` is this form. With ``mixup``, images, probabilities and embeddings of unit
length of the same pair are mixed with the same weight.

Only ``teacher.adapt=finetune`` changes the tower. With ``probe`` and ``text`` the adapted tower is the frozen tower, so
``predictions=0`` is then the loss of ``agnostic``. FINETUNE continues with the term of the predictions.

Use it when the teacher was finetuned on the task and the student has the capacity for its features. Do not use it when
the features of the teacher are much wider than those of the student and the steps are few: use oriented.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ktray.objectives.agnostic import Agnostic, AgnosticConfig, Match
from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, ObjectiveContext, Traits
from ktray.objectives.matching import Matching
from ktray.objectives.oriented import Oriented, OrientedConfig


@OBJECTIVES.register("oriented_features")
class OrientedFeaturesConfig(ObjectiveConfig):
    """Task-oriented transfer of features: the student matches the adapted teacher's features through a projection, and
    its predictions. Use it when the teacher was finetuned on the task (teacher.adapt=finetune). Do not use it when the
    steps are few and the teacher is much wider than the student."""

    name: Literal["oriented_features"] = "oriented_features"
    match: Match = Field("cosine", description="loss between the features of student and teacher")
    features: float = Field(1.0, gt=0, description="weight of the loss between the features")
    predictions: float = Field(
        1.0, ge=0, description="weight of the loss between the predictions; 0: the features alone"
    )
    temperature: float = Field(
        1.0, gt=0, description="temperature that softens both predictions, in addition to the fitted one"
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of mixup on images and targets; 0: no mixup; null: chosen by the kind of images"
    )

    searched: ClassVar[bool] = True
    order: ClassVar[int] = 44
    colour: ClassVar[str] = "#332288"

    @model_validator(mode="after")
    def _trained(self) -> OrientedFeaturesConfig:
        # A contrastive loss identifies each image among the others, which a mixture of two images does not allow.
        if self.match == "contrastive" and self.mixup:
            raise ValueError("objective.match=contrastive does not accept mixed images: set objective.mixup=0")
        return self

    @property
    def may_mix(self) -> bool:
        return self.match != "contrastive"

    @property
    def traits(self) -> Traits:
        """With a weight of 0, logits are needed all the same: they make ADAPT adapt the teacher, and TEACH then has the
        same targets for each weight."""
        reads: Literal["features", "features_and_logits"] = "features_and_logits" if self.predictions else "features"
        return Traits(frozenset({"embedding", "logits"}), reads=reads, classes=True)

    def build(self, *, hflip: float = 0.5) -> OrientedFeatures:
        return OrientedFeatures(self.match, self.features, self.predictions, self.temperature, self.mixup or 0.0)

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {**OrientedConfig.search_space(), **AgnosticConfig.search_space(), "predictions": [0.0, 1.0]}


class OrientedFeatures(Objective):
    """See the docstring of the module.

    Batch: ``images`` (N, 3, H, W) float, ``logits`` (N, C) calibrated and ``embedding`` (N, D), both of the adapted
    teacher. It reads pooled features (N, F) and logits (N, C), or, with ``predictions=0``, features alone. FINETUNE
    gives it logits without ``embedding``.

    Args:
        match: d, the loss between features.
        features, predictions: weights of the two terms.
        temperature, mixup: settings of the loss between predictions, as in `Oriented`.
    """

    def __init__(
        self,
        match: Match = "cosine",
        features: float = 1.0,
        predictions: float = 1.0,
        temperature: float = 1.0,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        self.feature_loss, self.prediction_loss = Agnostic(match), Oriented(temperature)
        self.features, self.predictions, self.mixup = features, predictions, mixup

    def match_with(self, matching: Matching) -> None:
        super().match_with(matching)
        self.prediction_loss.match_with(matching)

    def setup(self, context: ObjectiveContext) -> None:
        """Create the projection. Raises ValueError if the width of the teacher's embedding is not known."""
        self.feature_loss.setup(context)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        batch = self.prediction_loss.prepare(batch, generator)
        if "embedding" in batch:
            batch["embedding"] = F.normalize(batch["embedding"].float(), dim=1)
        if self.mixup > 0:
            from ktray.data.mixing import mixup

            mixed = [name for name in ("targets", "embedding") if name in batch]
            widths = [batch[name].shape[1] for name in mixed]
            joined = torch.cat([batch[name] for name in mixed], dim=1)
            batch["images"], joined = mixup(batch["images"], joined, self.mixup, generator)
            batch |= dict(zip(mixed, joined.split(widths, dim=1), strict=True))
        return batch

    def loss(
        self, student_out: torch.Tensor | tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The loss of features and logits, of features alone (``predictions=0``), or, for a batch without
        ``embedding``, of logits alone."""
        result: dict[str, torch.Tensor] = {}
        terms: list[torch.Tensor] = []
        pair = student_out if isinstance(student_out, tuple) else (student_out, student_out)
        if "embedding" in batch:
            features = self.feature_loss.loss(pair[0], batch)
            terms.append(self.features * features["loss"])
            result |= {"feature_loss": features["loss"].detach(), "cosine": features["cosine"]}
        if self.predictions:
            predictions = self.prediction_loss.loss(pair[1], batch)
            terms.append(self.predictions * predictions["loss"])
            result |= {"prediction_loss": predictions["loss"].detach(), "agreement": predictions["agreement"]}
        return {"loss": torch.stack(terms).sum(), **result}
