"""Teacher families: the interface between ktray and a library from which teachers are loaded.

A family is registered in `ktray.recipe.registries.TEACHERS` under the word before the colon in ``teacher.name``. It
resolves a name without loading weights, builds the towers, and provides the facts that depend on the library: maps of
patches, order of layers, licences. Everything else (fingerprint, adaptation, targets, evaluation) is the same for all
families.
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

WAY_OUT = (
    "Set teacher.checkpoint=FILE, or use a teacher that needs no download: teacher.name=efficientnet-lite0 for "
    "photographs, or teacher.name=miniverse for drawn images."
)
UNKNOWN_LICENCE = "unknown: check"


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from: everything that is needed to load it again.

    Attributes:
        name: ``teacher.name``: the family and, after a colon, the name of the model in this family.
        checkpoint: weights file, path or URI.
        config: model config for the family's library, as path or content.
        image_size: input size in pixels, if it differs from the model's own.
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
        source: the requested source.
        library: the name of the family in fingerprints.
        model: the name of the model in its library.
        tag: the tag of the published weights; None if there are none, or if a checkpoint replaces them.
        checkpoint: weights file, path or URI; None for published weights.
        config: the parsed model config; None if the library has the model.
    """

    source: TeacherSource
    library: str
    model: str
    tag: str | None = None
    checkpoint: str | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class TeacherParts:
    """The result of `TeacherFamily.build`.

    Attributes:
        image_tower: (N, 3, h, w) normalised float images to (N, embed_dim), or to a tuple that begins with it.
        preprocess: the preprocessing of the tower, with the requested input size.
        embed_dim: width of the image embedding, and of the text embedding.
        text: a list of M texts to (M, embed_dim) float32 of unit length, with an attribute ``logit_scale`` (float, the
            factor of cosine similarities before the softmax over texts); None if there is no text tower.
    """

    image_tower: nn.Module
    preprocess: Preprocess
    embed_dim: int
    text: nn.Module | None = None


class TeacherFamily(ABC):
    """A library of teachers. Instances have no state and are registered in ``TEACHERS``."""

    syntax: str
    """The format of ``teacher.name``, for messages."""
    has_text: bool = False
    """Whether its teachers have a text tower; for decisions before a teacher is loaded."""

    @abstractmethod
    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        """Check a name and find its weights, without loading them.

        Raises:
            KtrayError: there is no such model, or no weights for it. Random weights are never used silently.
        """

    def architecture(self, found: ResolvedTeacher) -> Any:
        """The part of the fingerprint for the architecture, as a JSON value."""
        return found.model

    @abstractmethod
    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        """Build the towers, with their weights.

        Args:
            found: the result of `resolve`.
            weights: local weights file to load.
            published: load the published weights. Without ``weights`` and ``published``, only the architecture is
                needed: the caller loads the weights, or never uses them.
            device: device of the modules; ``meta`` for ``--plan``, which needs only shapes. During the call it is
                torch's default device.

        Raises:
            KtrayError: the model cannot be built, or the weights cannot be fetched or do not fit.
        """

    def map_widths(self, tower: nn.Module) -> list[int]:
        """Channels of every map of patch embeddings of the tower, from input to output; none by default."""
        return []

    def patch_maps(self, tower: nn.Module, x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        """The last ``levels`` maps of patch embeddings, from input to output, each (N, D, rows, columns).

        Args:
            tower: the image tower.
            x: (N, 3, h, w) normalised images in the tower's dtype.
            levels: number of maps.
        """
        raise KtrayError("This teacher has no patch embeddings", "Choose another teacher.name.")

    def output_and_maps(self, tower: nn.Module, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """The output of the tower, and the result of `patch_maps` for one level. Families that can compute both in one
        forward pass override this method; by default there are two."""
        return tower(x), self.patch_maps(tower, x, 1)

    def layer_order(self, tower: nn.Module) -> LayerOrder | None:
        """The order of a tower's layers; None if the tower does not belong to this family or its order is unknown. In
        this case its child modules are its layers."""
        return None

    def caution(self, source: TeacherSource) -> str:
        """What is assumed of a teacher that its weights do not tell, as a sentence; empty if nothing is."""
        return ""

    def hub_files(self, model: str) -> tuple[str, tuple[str, ...]] | None:
        """The repository of a model's published weights on the Hugging Face hub, and the possible names of their file;
        None if they are not there. See `ktray.models.hub.available`."""
        return None

    def offline_size(self, model: str) -> int:
        """Size in bytes of weights that were trained on photographs and are installed on this machine, so that they
        need no download; 0 if there are none. If the model hub cannot be reached, ktray takes the largest teacher."""
        return 0

    def licence(self, model: str) -> str:
        """Licence of the published weights of a model. ``model`` is the part of ``teacher.name`` after the colon."""
        return UNKNOWN_LICENCE

    def untrained(self, model: str) -> nn.Module | None:
        """A module with random weights whose state dict is a valid checkpoint for `build`, for speed measurements.

        None (by default) if the real weights can be used because they need no download.
        """
        return None


def family_of(name: str) -> TeacherFamily:
    """The family of a ``teacher.name``.

    Raises:
        KtrayError: there is no such family.
    """
    prefix = name.partition(":")[0]
    if prefix not in TEACHERS:
        raise not_a_name(name)
    family: TeacherFamily = TEACHERS.get(prefix)
    return family


def model_of(name: str) -> str:
    """The part of a ``teacher.name`` after the colon; empty if there is none."""
    return name.partition(":")[2]


def not_a_name(name: str) -> KtrayError:
    """The error for a ``teacher.name`` that no family can read."""
    syntaxes = " or ".join(family.syntax for _, family in TEACHERS)
    return KtrayError(
        f"'{name}' is not the name of a teacher",
        f"Set teacher.name={syntaxes}; other packages can add families with the entry point group '{TEACHERS.group}'.",
    )


def no_hub(found: ResolvedTeacher, error: Exception) -> KtrayError:
    """The error for published weights that cannot be fetched."""
    return KtrayError(
        f"The weights of teacher '{found.source.name}' cannot be fetched, network or hub is not available "
        f"({cause(error)})",
        WAY_OUT,
    )


def cannot_build(found: ResolvedTeacher, error: Exception) -> KtrayError:
    """The error for an architecture that its library cannot build."""
    return KtrayError(
        f"Teacher '{found.source.name}' cannot be built: {cause(error)}", "Check teacher.name and teacher.config."
    )
