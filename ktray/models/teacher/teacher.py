"""The teacher: a foundation model's image tower, its text tower where there is one, and its preprocessing."""

from __future__ import annotations

import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.maps import resize_map
from ktray.models.teacher.families.base import TeacherSource, family_of
from ktray.models.teacher.layers import Layer, tower_layers


class Teacher(nn.Module):
    """A frozen-by-default foundation model; see `ktray.models.teacher.load.load_teacher`.

    Attributes:
        image_tower: (N, 3, h, w) normalised images to (N, embed_dim); can be trained by itself.
        preprocess: what the tower expects.
        embed_dim: width of the image embedding (and of the text embedding).
        patch_dim: width of a patch embedding, None where the tower has no map of patches.
        name: as in the recipe.
        source: how to load it again.
        fingerprint: changes with the architecture, the weights and the image size; 64 hex digits.
        logit_scale: factor on cosines before the softmax over texts; 1 without a text tower.
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
        """Free the text tower; returns the teacher."""
        self.text = None
        return self

    def embed(self, batch: torch.Tensor) -> torch.Tensor:
        """Image embeddings, not normalised to unit length (callers that compare cosines do that).

        Gradients flow; wrap in ``torch.inference_mode()`` to embed only.

        Args:
            batch: (N, 3, H, W) uint8, on the teacher's device, any size.

        Returns:
            (N, embed_dim) float32.
        """
        return embed(self.image_tower, self.preprocess, batch)

    def patch_embeddings(self, batch: torch.Tensor, levels: int = 1) -> torch.Tensor:
        """The tower's last map of patch embeddings, or its last maps side by side.

        Args:
            batch: as for `embed`.
            levels: how many of the last blocks (plain transformers) or stages (others) to take. Coarser maps are
                resized bilinearly to the finest one; none is scaled.

        Returns:
            (N, D, rows, columns) float32, input side first; D is `patch_dim` for one level, else the sum of
            `level_dims`.

        Raises:
            KtrayError: the tower has no such map, or fewer levels.
        """
        self.level_dims(levels)
        return patch_embeddings(self.image_tower, self.preprocess, self.source, batch, levels)

    def level_dims(self, levels: int) -> list[int]:
        """Widths of the last ``levels`` maps, input side first.

        Raises:
            KtrayError: the tower has no maps, or fewer.
        """
        if self.patch_dim is None:
            raise KtrayError(f"Teacher '{self.name}' gives no patch embeddings", "Choose another teacher.name.")
        widths = family_of(self.name).map_widths(self.image_tower)
        if not 1 <= levels <= len(widths):
            raise KtrayError(
                f"Teacher '{self.name}' has {len(widths)} maps of patch embeddings, not {levels}",
                "Take fewer levels.",
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
        """The image tower's parameters in layers, input first, for layer-wise learning rates."""
        return tower_layers(self.image_tower)


def embed(tower: nn.Module, preprocess: Preprocess, batch: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to the tower's embedding (N, D) float32."""
    x = preprocess.normalise(batch).to(_dtype(tower))
    out = tower(x)
    # CoCa's tower gives (pooled, tokens).
    pooled: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return pooled.float()


def patch_embeddings(
    tower: nn.Module, preprocess: Preprocess, source: TeacherSource, batch: torch.Tensor, levels: int = 1
) -> torch.Tensor:
    """The function behind `Teacher.patch_embeddings`, for those who hold the tower alone."""
    x = preprocess.normalise(batch).to(_dtype(tower))
    maps = [m.float() for m in family_of(source.name).patch_maps(tower, x, levels)]
    rows, columns = max(tuple(m.shape[-2:]) for m in maps)
    return torch.cat([resize_map(m, (rows, columns)) for m in maps], 1)


def _dtype(tower: nn.Module) -> torch.dtype:
    return next(tower.parameters()).dtype
