"""The teacher: the image tower of a foundation model, its text tower if it has one, and its preprocessing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.maps import resize_map
from ktray.models.teacher.families.base import TeacherSource, family_of
from ktray.models.teacher.layers import Layer, tower_layers

_FLOAT32: ContextVar[bool] = ContextVar("float32_products", default=False)
_CPU_PIXELS = 16 * 224**2  # of a batch on a CPU; with 16 images a tower needs half of the CPU time of 256


class Teacher(nn.Module):
    """A foundation model, frozen by default; see `ktray.models.teacher.load.load_teacher`.

    Attributes:
        image_tower: (N, 3, h, w) normalised images to (N, embed_dim); it can be trained separately.
        text: the text tower, or None.
        preprocess: the preprocessing of the image tower.
        embed_dim: width of the image embedding (and of the text embedding).
        patch_dim: width of a patch embedding; None if the tower has no map of patches.
        name: ``teacher.name`` of the recipe.
        source: where the teacher was loaded from.
        fingerprint: hash of the architecture, the weights and the image size; 64 hex digits.
        logit_scale: factor of the cosine similarities before the softmax over texts; 1 without a text tower.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text: nn.Module | None,
        preprocess: Preprocess,
        embed_dim: int,
        patch_dim: int | None,
        source: TeacherSource,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text = text
        self.preprocess = preprocess
        self.embed_dim, self.patch_dim = embed_dim, patch_dim
        self.source, self.name = source, source.name
        self.fingerprint = fingerprint
        self.logit_scale = float(getattr(text, "logit_scale", 1.0))

    @property
    def has_text(self) -> bool:
        return self.text is not None

    def drop_text(self) -> Teacher:
        """Remove the text tower to free its memory; returns the teacher."""
        self.text = None
        return self

    def embed(self, batch: torch.Tensor) -> torch.Tensor:
        """Image embeddings, not normalised to unit length; callers that need cosine similarities normalise them.

        Gradients are computed; use ``torch.inference_mode()`` if they are not needed.

        Args:
            batch: (N, 3, H, W) uint8, on the teacher's device, of any size.

        Returns:
            (N, embed_dim) float32.
        """
        return embed(self.image_tower, self.preprocess, batch)

    def patch_embeddings(self, batch: torch.Tensor, levels: int = 1) -> torch.Tensor:
        """The last map of patch embeddings of the tower, or the concatenation of its last maps.

        Args:
            batch: see `embed`.
            levels: number of the last blocks (plain transformers) or stages (other models) to use. Coarser maps are
                resized bilinearly to the finest one; values are not scaled.

        Returns:
            (N, D, rows, columns) float32, with the level closest to the input first; D is `patch_dim` for one level,
            otherwise the sum of `level_dims`.

        Raises:
            KtrayError: the tower has no maps, or fewer levels.
        """
        self.level_dims(levels)
        return patch_embeddings(self.image_tower, self.preprocess, self.source, batch, levels)

    def level_dims(self, levels: int) -> list[int]:
        """Widths of the last ``levels`` maps, with the one closest to the input first.

        Raises:
            KtrayError: the tower has no maps, or fewer levels.
        """
        if self.patch_dim is None:
            raise KtrayError(f"Teacher '{self.name}' has no patch embeddings", "Choose another teacher.name.")
        widths = family_of(self.name).map_widths(self.image_tower)
        if not 1 <= levels <= len(widths):
            raise KtrayError(
                f"Teacher '{self.name}' has {len(widths)} maps of patch embeddings, but {levels} are needed",
                "Use fewer levels.",
            )
        return widths[-levels:]

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Text embeddings of unit length: (M, embed_dim) float32.

        Raises:
            KtrayError: the teacher has no text tower, or its tokenizer cannot be loaded.
        """
        if self.text is None:
            raise KtrayError(
                f"Teacher '{self.name}' has no text tower",
                "Use teacher.adapt=probe or finetune, or an open_clip teacher.",
            )
        encoded: torch.Tensor = self.text(texts)
        return encoded

    def blocks(self) -> list[Layer]:
        """The parameters of the image tower in layers, from the input on, for layer-wise learning rates."""
        return tower_layers(self.image_tower)


def fitting_batch(preprocess: Preprocess, device: torch.device, most: int) -> int:
    """The number of images for one forward pass, at most ``most``.

    On a CPU, the activations of 256 photographs take gigabytes in each process and do not fit its caches: larger
    batches cost memory and time.
    """
    if device.type != "cpu":
        return most
    height, width = preprocess.size
    return max(1, min(most, _CPU_PIXELS // (height * width)))


def embed(tower: nn.Module, preprocess: Preprocess, batch: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to the embedding of the tower (N, D) float32."""
    x = preprocess.normalise(batch).to(_dtype(tower))
    with _products(x.device):
        out = tower(x)
    return _pooled(out)


def embed_with_patches(
    tower: nn.Module, preprocess: Preprocess, source: TeacherSource, batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`embed` and `patch_embeddings` of the last level, in one forward pass if the tower can compute both."""
    x = preprocess.normalise(batch).to(_dtype(tower))
    with _products(x.device):
        out, (patches,) = family_of(source.name).output_and_maps(tower, x)
    return _pooled(out), patches.float()


def _pooled(out: Any) -> torch.Tensor:
    # CoCa's tower returns (pooled, tokens).
    pooled: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return pooled.float()


def patch_embeddings(
    tower: nn.Module, preprocess: Preprocess, source: TeacherSource, batch: torch.Tensor, levels: int = 1
) -> torch.Tensor:
    """Like `Teacher.patch_embeddings`, for a tower without its `Teacher`."""
    x = preprocess.normalise(batch).to(_dtype(tower))
    with _products(x.device):
        found = family_of(source.name).patch_maps(tower, x, levels)
    maps = [m.float() for m in found]
    rows, columns = max(tuple(m.shape[-2:]) for m in maps)
    return torch.cat([resize_map(m, (rows, columns)) for m in maps], 1)


def products_on(gpu: bool) -> str:
    """The number format of a teacher's matrix products: ``bf16`` on a GPU, which is 6 to 9 times as fast as ``fp32``
    there. Normalisation and heads are in float32."""
    return "bf16" if gpu else "fp32"


def rounds(device: torch.device) -> bool:
    """Whether the matrix products of a teacher are rounded to a shorter format than float32 on a device."""
    return products_on(device.type == "cuda") != "fp32"


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Inside the block, the matrix products of teachers are in float32, to compare their outputs with the usual."""
    token = _FLOAT32.set(True)
    try:
        yield
    finally:
        _FLOAT32.reset(token)


def _products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    lowered = rounds(device) and not _FLOAT32.get()
    return torch.autocast(device.type, torch.bfloat16) if lowered else contextlib.nullcontext()


def _dtype(tower: nn.Module) -> torch.dtype:
    return next(tower.parameters()).dtype
