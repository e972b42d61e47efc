"""What the recipe and the pipeline know of an objective before any model is built.

An objective is a file in ``ktray/objectives/`` (or a module of another package): its section of the recipe, a subclass
of `ObjectiveConfig`, and the module that computes its loss. Everything that other parts of ktray ask about an objective
is a question to that subclass, so that no other file needs the objective's name.
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
Reads = Literal["logits", "features", "map"]
Views = Literal["fixed", "canvas"]

TEACHER_TARGETS: frozenset[Target] = frozenset({"logits", "embedding", "patch_embedding"})
NO_SOURCE = "none"  # the transfer source of a run without a transfer set


@dataclass(frozen=True)
class Traits:
    """What an objective needs and gives, with the values that its section has.

    Attributes:
        targets_needed: columns that a batch has beside ``pixels``: ``logits`` (N, C), ``embedding`` (N, D),
            ``patch_embedding`` (N, D, h, w), ``text`` (N, L) int64, ``label`` (N,) int64. ``text`` asks for a gallery
            with captions, ``label`` for a labelled generic set (``supervised.data``).
        reads: what the student gives: ``logits`` (N, C); ``features`` (N, F), pooled, before the classifier, which then
            stays as it was; or ``map``, the pair of pooled features and the last map (N, F, h, w).
        views: ``fixed`` takes the views that TEACH has cut, ``canvas`` takes whole images and cuts its own.
        labelled: every batch also has labelled images of the task (``label_images`` (B, 3, H, W) uint8 and
            ``label_of`` (B,) int64), and no FINETUNE follows.
    """

    targets_needed: frozenset[Target] = frozenset()
    reads: Reads = "logits"
    views: Views = "fixed"
    labelled: bool = False

    @property
    def taught(self) -> bool:
        """Whether it learns from what a teacher says."""
        return bool(self.targets_needed & TEACHER_TARGETS)

    @property
    def replays(self) -> bool:
        """Whether its loss can be kept beside the labels' loss in FINETUNE: it compares predictions."""
        return "logits" in self.targets_needed and self.reads == "logits"


class ObjectiveConfig(Section):
    """The recipe's section ``objective``. Each objective has a subclass with the keys that it reads, and no others.

    Class attributes:
        sources: values of ``transfer.source`` that suit the objective, the best first; ``("none",)`` for an objective
            without a transfer set.
        compared: how many of the possible sources a default comparison has a row for.
        compared_by_size: whether ``compare.sizes`` adds rows for it.
        searched: whether it is in the default search space of jobs/tune.py.
        order: its place among the objectives, in lists and in a default comparison.
        colour: of its points in pictures, as ``#rrggbb``. ktray's own are safe for the colour-blind (Okabe and Ito).
    """

    name: str = Field("", description="how the student is pretrained")

    sources: ClassVar[tuple[str, ...]] = ("retrieved", "generic", "target")
    compared: ClassVar[int] = 1
    compared_by_size: ClassVar[bool] = False
    searched: ClassVar[bool] = False
    order: ClassVar[int] = 1000  # those of other packages come after ktray's own
    colour: ClassVar[str] = "#000000"

    @property
    def traits(self) -> Traits:
        """What it needs and gives."""
        raise NotImplementedError

    def build(self, *, hflip: float = 0.5) -> Any:
        """The `ktray.objectives.base.Objective` with this section's values.

        Args:
            hflip: probability of a horizontal flip, for an objective that cuts its own views.
        """
        raise NotImplementedError

    def phases(self, steps: int) -> list[tuple[str, dict[str, Any]]]:
        """(name, recipe keys) of the parts of the pretraining, in order; most objectives have one, without a name.

        Args:
            steps: optimizer steps of all parts together.
        """
        return [("", {})]

    @classmethod
    def has_transfer_set(cls) -> bool:
        """Whether it is trained on a transfer set; otherwise the labels are all that it sees."""
        return cls.sources != (NO_SOURCE,)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Its keys, without ``name``."""
        return [name for name in cls.model_fields if name != "name"]

    @classmethod
    def objective_name(cls) -> str:
        """The value of ``objective.name`` that chooses it."""
        return str(cls.model_fields["name"].default)

    @classmethod
    def suitable(cls, possible: Sequence[str]) -> list[str]:
        """Its sources among those that the data allows; its first one where the data allows none of them."""
        return [source for source in cls.sources if source in possible] or [cls.sources[0]]

    @classmethod
    def comparisons(cls, possible: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Its rows in a default comparison: name of the method to recipe keys.

        Args:
            possible: values of ``transfer.source`` that the data allows.
        """
        name = cls.objective_name()
        rows = cls.suitable(possible)[: cls.compared]
        return {f"{name} {source}": {"objective.name": name, "transfer.source": source} for source in rows}

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        """Its keys (without ``objective.``) in the default search space, in the form of ``tune.space``."""
        return {}
