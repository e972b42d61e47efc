"""Preprocessing, which is part of a model.

Loaders return uint8 pixels; each model has its own input size, interpolation, mean and standard deviation. There are
two operations: `Preprocess.eval_transform` applies the geometry (resize and crop) to one whole image on the CPU, with
the same result as open_clip and timm with PIL; `Preprocess.normalise` converts a batch of uint8 crops to the input of a
model, on the device of the batch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio, str_to_interp_mode
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

Interpolation = Literal["bilinear", "bicubic"]
ResizeMode = Literal["shortest", "squash", "longest"]

# Longest side of an image as a multiple of its shortest one; of longer images the centre is used.
MOST_ASPECT = 16

# Pixels of the shorter side that `Ample` leaves: more than the input of any teacher here (518).
AMPLE = 700

_RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_TIMM_CROP_MODES: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash", "border": "longest"}


@dataclass(frozen=True)
class Preprocess:
    """What a model expects of its input.

    Attributes:
        size: (height, width) of the input, in pixels.
        mean, std: mean and standard deviation per channel (RGB), on the scale 0..1.
        interpolation: interpolation of every resize.
        resize_mode: ``shortest`` fits the shorter edge and crops the centre, ``squash`` ignores the aspect
            ratio, ``longest`` fits the longer edge and pads with `fill`.
        crop_pct: side of the crop as a share of the edge of the resized image, as in timm.
        fill: RGB of the padding, 0..255.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    crop_pct: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def from_open_clip(cls, model: nn.Module | dict[str, Any]) -> Preprocess:
        """The preprocessing of an open_clip model (its ``visual.preprocess_cfg``), or of such a dictionary."""
        import open_clip  # slow to import, and not needed for students

        cfg = open_clip.get_model_preprocess_cfg(model) if isinstance(model, nn.Module) else model
        mean = cfg.get("mean") or open_clip.OPENAI_DATASET_MEAN
        std = cfg.get("std") or open_clip.OPENAI_DATASET_STD
        return cls(
            size=_pair(cfg.get("size", 224)),
            mean=_three(mean),
            std=_three(std),
            interpolation=_interpolation(cfg.get("interpolation")),
            resize_mode=cfg.get("resize_mode") or "shortest",
            fill=(int(cfg.get("fill_color") or 0),) * 3,
        )

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocess:
        """The preprocessing of a timm model (its ``pretrained_cfg``, as timm resolves it)."""
        cfg = timm.data.resolve_model_data_config(model)
        mean = _three(cfg["mean"])
        return cls(
            size=_pair(cfg["input_size"][-2:]),
            mean=mean,
            std=_three(cfg["std"]),
            interpolation=_interpolation(cfg["interpolation"]),
            resize_mode=_TIMM_CROP_MODES[cfg["crop_mode"]],
            crop_pct=float(cfg["crop_pct"]),
            # timm pads with the mean colour.
            fill=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])),
        )

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Preprocess:
        """Inverse of `to_dict`, also after conversion to and from JSON."""
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**tuples)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def timm_config(self) -> dict[str, Any]:
        """This preprocessing as entries of a timm ``pretrained_cfg``."""
        modes = {ours: theirs for theirs, ours in _TIMM_CROP_MODES.items()}
        return {
            "input_size": [3, *self.size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": modes[self.resize_mode],
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def with_size(self, size: int | tuple[int, int]) -> Preprocess:
        """This preprocessing with another input size, in pixels."""
        return replace(self, size=_pair(size))

    @property
    def fingerprint(self) -> str:
        """Hash of all fields, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def eval_transform(self, image: np.ndarray | Image.Image, whole: tuple[int, int] | None = None) -> np.ndarray:
        """Resize and crop one whole image as open_clip's and timm's own evaluation transforms do.

        Args:
            image: (H, W, 3) uint8, or an RGB PIL image.
            whole: height and width of the original image, if ``image`` was decoded at a lower resolution: the crop is
                then that of the original image to a fraction of a pixel.

        Returns:
            (3, height, width) uint8, contiguous.
        """
        pil = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
        if whole and whole != (pil.height, pil.width):
            resized = pil.resize(_resized(self, *whole), _RESAMPLING[self.interpolation])
            pixels = np.asarray(_geometry(self).transforms[1](resized))
        else:
            pixels = np.asarray(_geometry(self)(_bounded(pil)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """Convert uint8 crops to the input of the model, on the device of the batch.

        A batch of another size is resized to `size` with antialiasing. The images are crops already, so `resize_mode`
        and `crop_pct` do not apply.

        Args:
            batch: (N, 3, H, W) uint8, or float on the scale 0..255 (mixed images).

        Returns:
            (N, 3, height, width) float32.
        """
        x = batch.float()
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True, align_corners=False)
            # Bicubic interpolation overshoots at edges; PIL clips as well.
            x = x.clamp_(0, 255)
        return self.scale(x)

    def scale(self, batch: torch.Tensor) -> torch.Tensor:
        """Like `normalise`, but without resizing: (N, 3, H, W) on the scale 0..255 to (N, 3, H, W) float32."""
        scale, bias = _affine(self.mean, self.std, batch.device)
        return torch.addcmul(bias, batch.float(), scale)


def _bounded(image: Image.Image) -> Image.Image:
    """The centre of an image that is more than `MOST_ASPECT` times as long as wide; every other image unchanged.

    The shorter edge is fitted to the input, so that a strip of 60,000 x 1 pixels would become one of 13 million x 224.
    """
    width, height = image.size
    most = MOST_ASPECT * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


class Ample:
    """How much smaller an image may be where a teacher looks at the whole of it: a `ktray.data.decode.Enough` for the
    stages that embed images and compare their fingerprints.

    The factor depends on the size of the image alone, so that copies of a file have the same pixels, and the same
    digest, in all these stages.

    Attributes:
        whole: height and width of the image that was asked for last; for `Preprocess.eval_transform`.
    """

    whole: tuple[int, int] = (0, 0)

    def __call__(self, height: int, width: int) -> float:
        self.whole = height, width
        bounded = max(height, width) > MOST_ASPECT * min(height, width)
        return 1.0 if bounded else min(height, width) / AMPLE


@lru_cache(maxsize=256)
def _resized(p: Preprocess, height: int, width: int) -> tuple[int, int]:
    """Width and height to which an image of this size is resized before the crop. The transforms themselves tell it;
    an image of one bit is resized in no time."""
    size: tuple[int, int] = _geometry(p).transforms[0](Image.new("1", (width, height))).size
    return size


@lru_cache(maxsize=64)
def _geometry(p: Preprocess) -> transforms.Compose:
    scaled = (int(p.size[0] / p.crop_pct), int(p.size[1] / p.crop_pct))
    mode = str_to_interp_mode(p.interpolation)
    if p.resize_mode == "squash":
        return transforms.Compose([transforms.Resize(scaled, mode), transforms.CenterCrop(p.size)])
    if p.resize_mode == "longest":
        resize = ResizeKeepRatio(scaled, longest=1.0, interpolation=p.interpolation)
        return transforms.Compose([resize, CenterCropOrPad(list(p.size), fill=p.fill)])
    if scaled[0] == scaled[1]:
        # ResizeKeepRatio would be wrong: in this case both libraries round the longer edge as torchvision does.
        return transforms.Compose([transforms.Resize(scaled[0], mode), transforms.CenterCrop(p.size)])
    return transforms.Compose([ResizeKeepRatio(scaled, interpolation=p.interpolation), transforms.CenterCrop(p.size)])


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # (x / 255 - mean) / std as one multiply-add over the batch. Cached, because each batch would wait for a copy.
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale, bias = 1 / (255 * s), -m / s
    return scale.float().view(1, 3, 1, 1).to(device), bias.float().view(1, 3, 1, 1).to(device)


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _three(values: Any) -> tuple[float, float, float]:
    if isinstance(values, (int, float)):
        return (float(values),) * 3
    red, green, blue = values
    return (float(red), float(green), float(blue))


def _interpolation(name: str | None) -> Interpolation:
    # Rare values ("random", "lanczos") have no antialiased kernel on devices; bicubic is the closest one.
    return "bilinear" if name == "bilinear" else "bicubic"
