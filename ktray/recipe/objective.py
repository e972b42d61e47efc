"""What the recipe and the pipeline need to know about an objective before any model is built.

An objective is a file in ``ktray/objectives/`` (or a module of another package) with its recipe section, which is a
subclass of `ObjectiveConfig`, and the module that computes its loss. Other parts of ktray only use the attributes and
methods of that subclass, so no other file needs the name of the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from ktray.recipe.section import Section

# logits, embedding and patch_embedding come from the teacher; text (the caption's tokens) and label (the class in a
# labelled generic set) come with the image.
Target = Literal["logits", "embedding", "patch_embedding", "text", "label"]
Reads = Literal["logits", "features", "map", "features_and_logits"]
Views = Literal["fixed", "canvas"]

TEACHER_TARGETS: frozenset[Target] = frozenset({"logits", "embedding", "patch_embedding"})
NO_SOURCE = "none"  # value of transfer.source for a run without a transfer set


@dataclass(frozen=True)
class Traits:
    """The inputs and outputs of an objective, with the values of its section.

    Attributes:
        targets_needed: columns of a batch in addition to ``pixels``: ``logits`` (N, C), ``embedding`` (N, D),
            ``patch_embedding`` (N, D, h, w), ``text`` (N, L) int64, ``label`` (N,) int64. ``text`` needs a gallery
            with captions, ``label`` a labelled generic set (``supervised.data``).
        reads: the output of the student that the objective reads: ``logits`` (N, C); ``features`` (N, F), pooled,
            before the classifier, which is then not trained; ``map``, the pair of pooled features and the last map
            (N, F, h, w); or ``features_and_logits``, the pair of pooled features and logits of one pass.
        views: ``fixed``: the views that TEACH has cut; ``canvas``: whole images, from which the objective cuts views.
        labelled: whether each batch also has labelled images of the task (``label_images`` (B, 3, H, W) uint8 and
            ``label_of`` (B,) int64); then FINETUNE is skipped.
        classes: whether the objective is defined for classes of images only, with a linear last layer of the student.
        sampled: whether the objective needs a sample of the teacher's embeddings before the first step. Then TEACH must
            store them (``teach.mode=cached``).
        frozen: for an objective without a transfer set, whether only a linear head is fitted, on the features of the
            initial weights.
    """

    targets_needed: frozenset[Target] = frozenset()
    reads: Reads = "logits"
    views: Views = "fixed"
    labelled: bool = False
    classes: bool = False
    sampled: bool = False
    frozen: bool = False

    @property
    def trains_classifier(self) -> bool:
        """Whether the student's own classifier is trained, because the objective reads its logits."""
        return self.reads in ("logits", "features_and_logits")

    @property
    def taught(self) -> bool:
        """Whether the objective learns from the outputs of a teacher."""
        return bool(self.targets_needed & TEACHER_TARGETS)

    @property
    def replays(self) -> bool:
        """Whether FINETUNE can continue to use the loss together with that on labels, because it compares
        predictions. FINETUNE calls the loss with the logits alone."""
        return "logits" in self.targets_needed and self.trains_classifier


class ObjectiveConfig(Section):
    """The recipe section ``objective``. Each objective has a subclass with only those keys that it reads.

    Class attributes:
        sources: values of ``transfer.source`` that suit the objective, the best first; ``("none",)`` for an objective
            without a transfer set.
        compared: number of possible sources for which a default comparison has a row.
        compared_by_size: whether ``compare.sizes`` adds rows for the objective.
        searched: whether the objective is in the default search space of jobs/tune.py.
        order: sort key of the objective, in lists and in a default comparison.
        colour: colour of the objective in plots, as ``#rrggbb``. Colour-blind people can distinguish ktray's colours
            (Okabe and Ito).
    """

    name: str = Field("", description="objective of pretraining, which decides what the student learns from")

    sources: ClassVar[tuple[str, ...]] = ("retrieved", "generic", "target")
    compared: ClassVar[int] = 1
    compared_by_size: ClassVar[bool] = False
    searched: ClassVar[bool] = False
    order: ClassVar[int] = 1000  # objectives of other packages come after those of ktray
    colour: ClassVar[str] = "#000000"

    @property
    def traits(self) -> Traits:
        """The inputs and outputs of the objective."""
        raise NotImplementedError

    @property
    def may_mix(self) -> bool:
        """Whether the loss accepts mixed images; if not, a key ``mixup`` or ``cutmix`` that is open becomes 0."""
        return True

    def build(self, *, hflip: float = 0.5) -> Any:
        """Create the `ktray.objectives.base.Objective` with the values of this section.

        Args:
            hflip: probability of a horizontal flip, for an objective that cuts its own views.
        """
        raise NotImplementedError

    def phases(self, steps: int) -> list[tuple[str, dict[str, Any]]]:
        """(name, recipe keys) of the phases of pretraining, in order. Most objectives have one phase, whose name is
        empty.

        Args:
            steps: number of optimizer steps of all phases together.
        """
        return [("", {})]

    @classmethod
    def has_transfer_set(cls) -> bool:
        """Whether the objective uses a transfer set; otherwise it uses only the labels."""
        return cls.sources != (NO_SOURCE,)

    @classmethod
    def own_fields(cls) -> list[str]:
        """The keys of the objective, without ``name``."""
        return [name for name in cls.model_fields if name != "name"]

    @classmethod
    def objective_name(cls) -> str:
        """The value of ``objective.name`` that chooses the objective."""
        return str(cls.model_fields["name"].default)

    @classmethod
    def suitable(cls, possible: Sequence[str]) -> list[str]:
        """The sources of the objective that the data allows; if the data allows none, the first source."""
        return [source for source in cls.sources if source in possible] or [cls.sources[0]]

    @classmethod
    def comparisons(cls, possible: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows of the objective in a default comparison, as name of the method -> recipe keys.

        Args:
            possible: values of ``transfer.source`` that the data allows.
        """
        name = cls.objective_name()
        rows = cls.suitable(possible)[: cls.compared]
        return {f"{name} {source}": {"objective.name": name, "transfer.source": source} for source in rows}

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        """The keys of the objective (without ``objective.``) in the default search space, in the form of
        ``tune.space``."""
        return {}
