"""What a teacher family is: all that ktray needs to know about a library that teachers come from.

A family is registered in `ktray.recipe.registries.TEACHERS` under the word that stands before the colon in
``teacher.name``. It resolves a name without loading weights, builds the towers, and knows what only their library
knows: maps of patches, order of layers, licences. Everything else (fingerprint, adaptation, targets, evaluation) is
the same for all families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.teacher.layers import LayerOrder
from ktray.recipe.registries import TEACHERS

WAY_OUT = "Set teacher.checkpoint=FILE, or teacher.name=miniverse to use the small teacher that ships with ktray."
UNKNOWN_LICENCE = "unknown: check"


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from; all that is needed to load it again.

    Attributes:
        name: ``teacher.name``: the family, and after a colon the family's own name of the model.
        checkpoint: weights file, path or URI.
        config: model config of the family's library: its path, or its content.
        image_size: input size other than the model's own, pixels.
    """

    name: str
    checkpoint: str | None = None
    config: str | dict[str, Any] | None = None
    image_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ResolvedTeacher:
    """A source, resolved as far as possible without loading weights.

    Attributes:
        source: what was asked for.
        library: the family's name in fingerprints.
        model: the model's name in its library.
        tag: the published weights, None where there are none or where a checkpoint stands for them.
        checkpoint: weights file, path or URI; None for published weights.
        config: the parsed model config, None where the library knows the model.
    """

    source: TeacherSource
    library: str
    model: str
    tag: str | None = None
    checkpoint: str | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class TeacherParts:
    """What `TeacherFamily.build` gives.

    Attributes:
        image_tower: (N, 3, h, w) normalised float images to (N, embed_dim), or to a tuple that begins with it.
        preprocess: what the tower expects, at the input size that was asked for.
        embed_dim: width of the image embedding, and of the text embedding.
        text: a list of M texts to (M, embed_dim) float32 of unit length, with an attribute ``logit_scale`` (float, the
            factor on cosines before the softmax over texts); None where there is no text tower.
    """

    image_tower: nn.Module
    preprocess: Preprocess
    embed_dim: int
    text: nn.Module | None = None


class TeacherFamily(ABC):
    """A library of teachers. Instances have no state and are registered in ``TEACHERS``."""

    syntax: str
    """How ``teacher.name`` is written, for messages."""
    has_text: bool = False
    """Whether its teachers have a text tower; asked where none is loaded."""

    @abstractmethod
    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        """Check a name and find its weights, without loading them.

        Raises:
            KtrayError: no such model, or no weights for it; random weights are never used silently.
        """

    def architecture(self, found: ResolvedTeacher) -> Any:
        """What the fingerprint says of the architecture; JSON."""
        return found.model

    @abstractmethod
    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        """Make the towers, with their weights.

        Args:
            found: what `resolve` gave.
            weights: local weights file to load.
            published: load the published weights. With neither, the architecture is enough, its weights are filled by
                the caller or never used.
            device: where the modules are made; ``meta`` for ``--plan``, which reads shapes alone. It is torch's default
                device during the call.

        Raises:
            KtrayError: the model cannot be built, or the weights cannot be fetched or do not fit.
        """

    def map_widths(self, tower: nn.Module) -> list[int]:
        """Channels of every map of patch embeddings that the tower can give, input side first; none by default."""
        return []

    def patch_maps(self, tower: nn.Module, x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        """The last ``levels`` maps of patch embeddings, input side first, each (N, D, rows, columns).

        Args:
            x: (N, 3, h, w) normalised images of the tower's dtype.
        """
        raise KtrayError("This teacher gives no patch embeddings", "Choose another teacher.name.")

    def layer_order(self, tower: nn.Module) -> LayerOrder | None:
        """The order of a tower's layers; None where the tower is not one of this family, or has no known order (its
        child modules are then its layers)."""
        return None

    def licence(self, model: str) -> str:
        """Licence of the published weights of a model (the part of ``teacher.name`` after the colon)."""
        return UNKNOWN_LICENCE

    def untrained(self, model: str) -> nn.Module | None:
        """A module with random weights whose state dict is a checkpoint that `build` takes, for speed measurements.

        None (by default) where the real weights need no download and serve as well.
        """
        return None


def family_of(name: str) -> TeacherFamily:
    """The family of a ``teacher.name``.

    Raises:
        KtrayError: there is none.
    """
    prefix = name.partition(":")[0]
    if prefix not in TEACHERS:
        raise not_a_name(name)
    family: TeacherFamily = TEACHERS.get(prefix)
    return family


def model_of(name: str) -> str:
    """The part of a ``teacher.name`` that its family reads; empty where there is none."""
    return name.partition(":")[2]


def not_a_name(name: str) -> KtrayError:
    """The error for a ``teacher.name`` that no family can read."""
    known = " or ".join(family.syntax for _, family in TEACHERS)
    return KtrayError(
        f"'{name}' is not the name of a teacher",
        f"Set teacher.name={known}; other packages add families by the entry point group '{TEACHERS.group}'.",
    )


def no_hub(found: ResolvedTeacher, error: Exception) -> KtrayError:
    """The error for published weights that cannot be fetched."""
    return KtrayError(
        f"The weights of teacher '{found.source.name}' cannot be fetched, there is no network or no hub "
        f"({cause(error)})",
        WAY_OUT,
    )


def cannot_build(found: ResolvedTeacher, error: Exception) -> KtrayError:
    """The error for an architecture that its library refuses."""
    return KtrayError(
        f"Teacher '{found.source.name}' cannot be built: {cause(error)}", "Check teacher.name and teacher.config."
    )
