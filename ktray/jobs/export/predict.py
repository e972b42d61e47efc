"""Classify images with a student that ktray exported. This needs Python 3.8, numpy 1.21, Pillow 9.0 and onnxruntime
1.14, or newer ones, but not ktray.

    python predict.py IMAGE ... [--model student.int8.onnx]

prints one line of JSON for each image: its class; or, if an image may have several classes, those whose probability
reaches their threshold; or, for a segmentation model, the share of each class, and ``--masks FOLDER`` writes the masks.
In a program:

    from predict import Classifier
    Classifier().predict([open("photo.jpg", "rb").read()])

The ONNX file contains the class names and the preprocessing, so only a model file and this file are needed.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# Formats for photos whose decoders run in this process. EPS, for example, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "MPO", "PPM")
METADATA = "ktray"  # the metadata key of class names and preprocessing in the ONNX file
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_RESAMPLING = getattr(Image, "Resampling", Image)  # Pillow before 9.1 has the filters in the module
_FILTERS = {"bilinear": _RESAMPLING.BILINEAR, "bicubic": _RESAMPLING.BICUBIC}
_ORIENTATION = 0x0112  # the EXIF tag
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_WAYS = getattr(Image, "Transpose", Image)
_TURNS = {
    2: _WAYS.FLIP_LEFT_RIGHT,
    3: _WAYS.ROTATE_180,
    4: _WAYS.FLIP_TOP_BOTTOM,
    5: _WAYS.TRANSPOSE,
    6: _WAYS.ROTATE_270,
    7: _WAYS.TRANSVERSE,
    8: _WAYS.ROTATE_90,
}
# Longest side of an image as a multiple of its shortest one; of longer images the centre is used.
MOST_ASPECT = 16


def decode(data: bytes) -> Image.Image:
    """Decode an image to upright RGB; transparent pixels are blended with white, 16 bits are scaled to 8.

    Raises:
        ValueError: the data is not an image, or is damaged.
    """
    try:
        Image.init()
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            image.load()
            return _rgb(_upright(image, data))
    except Exception as error:  # decoders raise exceptions of any type on damaged input
        raise ValueError(f"not a usable image: {' '.join(str(error).split()) or type(error).__name__}") from error


def _upright(image: Image.Image, data: bytes) -> Image.Image:
    """The image as a viewer shows it: turned as its EXIF data say, or else its XMP data, which Pillow before 9.5 does
    not look at in a JPEG."""
    try:
        known = _ORIENTATION in image.getexif()
        image = ImageOps.exif_transpose(image) or image
        if known or image.format not in (None, "JPEG", "MPO"):
            return image
        found = _XMP.search(data[: data.find(b"\xff\xda") + 1 or len(data)])
        return image.transpose(_TURNS[int(found[1])]) if found and int(found[1]) in _TURNS else image
    except Exception:  # damaged metadata, while the pixels are good
        return image.copy()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if _transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _transparent(image: Image.Image) -> bool:
    """Whether an image may have transparent pixels; ``has_transparency_data`` of Pillow 10.1."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _bounded(image: Image.Image) -> Image.Image:
    w, h = image.size
    most = MOST_ASPECT * min(w, h)
    left, top = max(0, (w - most) // 2), max(0, (h - most) // 2)
    return image.crop((left, top, left + min(w, most), top + min(h, most))) if max(w, h) > most else image


def geometry(image: Image.Image, p: dict[str, Any]) -> np.ndarray:
    """Resize and crop an RGB image as in the student's evaluation; returns (3, height, width) uint8.

    Args:
        p: preprocessing: ``size`` [height, width], ``crop_pct``, ``resize_mode``, ``interpolation``, ``fill``.
    """
    height, width = p["size"]
    tall, wide = int(height / p["crop_pct"]), int(width / p["crop_pct"])
    image = _bounded(image)
    w, h = image.size
    if p["resize_mode"] == "squash":
        target = (wide, tall)
    elif p["resize_mode"] == "longest" or tall != wide:
        ratios = (h / tall, w / wide)
        ratio = max(ratios) if p["resize_mode"] == "longest" else min(ratios)
        target = (round(w / ratio), round(h / ratio))
    else:  # torchvision's rounding: the shorter edge is exact, the longer one is cut
        target = (tall, int(tall * h / w)) if w <= h else (int(tall * w / h), tall)
    resized = image.resize(target, _FILTERS[p["interpolation"]])
    fill = tuple(p["fill"]) if p["resize_mode"] == "longest" else (0, 0, 0)
    return np.ascontiguousarray(_centre(np.asarray(resized), height, width, fill).transpose(2, 0, 1))


def _centre(pixels: np.ndarray, height: int, width: int, fill: tuple[int, ...]) -> np.ndarray:
    h, w = pixels.shape[:2]
    if h < height or w < width:
        larger = np.empty((max(h, height), max(w, width), 3), np.uint8)
        larger[:] = np.array(fill, np.uint8)
        top, left = max(0, height - h) // 2, max(0, width - w) // 2
        larger[top : top + h, left : left + w] = pixels
        pixels = larger
        h, w = pixels.shape[:2]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return pixels[top : top + height, left : left + width]


def normalise(pixels: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Convert pixels (N, 3, H, W) uint8 to the model's input, float32 of the same shape."""
    mean, std = (np.array(p[name], np.float64).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    scale, bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    return np.asarray(pixels.astype(np.float32) * scale + bias)


def _weights(source: int, target: int) -> np.ndarray:
    """(target, source) float32: bilinear interpolation along one axis, with half-pixel centres."""
    at = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
    low = np.minimum(at.astype(np.int64), source - 1)
    weights = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    np.add.at(weights, (rows, low), 1 - (at - low))
    np.add.at(weights, (rows, np.minimum(low + 1, source - 1)), at - low)
    return weights


def mask_of(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel.

    Args:
        logits: map of logits (C, h, w).
        size: (height, width) of the image.

    Returns:
        (height, width) uint8.
    """
    down, across = _weights(logits.shape[1], size[0]), _weights(logits.shape[2], size[1])
    best, mask = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint8)
    for number, one in enumerate(logits):  # one class at a time: all of them at full size need much memory
        resized = down @ one @ across.T
        mask[resized > best] = number
        best = np.maximum(best, resized)
    return mask


class Classifier:
    """An exported student.

    Args:
        model: the ONNX file; None: ``student.onnx`` in the folder of this file.
        threads: number of threads of one inference; None: one for each core of the machine.

    Attributes:
        classes: names in the order of the probabilities.
        preprocess: see `geometry` and `normalise`.
        thresholds: for each class the probability from which an image has it, if an image may have several classes or
            none; None: it has one.
        maps: whether the model is for segmentation: its logits are maps (N, C, h, w), and `predict` returns masks.
        temperature: divides the logits, so that probabilities are as large as the predictions are often right; fitted
            on validation.

    Raises:
        ValueError: the file was not exported by ktray.
    """

    def __init__(self, model: str | Path | None = None, threads: int | None = None) -> None:
        path = Path(model) if model is not None else Path(__file__).with_name("student.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None:
            raise ValueError(f"{path.name} contains no class names; it was not exported by ktray")
        facts = json.loads(text)
        self.classes: list[str] = facts["classes"]
        self.preprocess: dict[str, Any] = facts["preprocess"]
        self.thresholds: list[float] | None = facts.get("thresholds")
        self.maps = bool(facts.get("maps"))
        self.temperature = float(facts.get("temperature", 1.0))
        self.input = self.session.get_inputs()[0].name

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute scores (N, C), or maps (N, C, h, w), float32 of pixels (N, 3, height, width) uint8 of `geometry`."""
        return np.asarray(self.session.run(None, {self.input: normalise(pixels, self.preprocess)})[0])

    def probabilities(self, images: Sequence[bytes], batch: int = 64) -> np.ndarray:
        """Compute the class probabilities (N, C) float64 of encoded images.

        Args:
            images: encoded images, such as the content of JPEG files.
            batch: number of images in one inference.

        Raises:
            ValueError: an image cannot be used, or the model is for segmentation.
        """
        if self.maps:
            raise ValueError("a segmentation model has no class probabilities for a whole image; call masks")
        parts = [np.zeros((0, len(self.classes)))]
        for at in range(0, len(images), batch):
            pixels = np.stack([geometry(decode(data), self.preprocess) for data in images[at : at + batch]])
            scores = self.logits(pixels).astype(np.float64) / self.temperature
            if self.thresholds is not None:
                parts.append(np.exp(-np.logaddexp(0, -scores)))
                continue
            odds = np.exp(scores - scores.max(1, keepdims=True))
            parts.append(odds / odds.sum(1, keepdims=True))
        return np.concatenate(parts)

    def masks(self, images: Sequence[bytes]) -> list[np.ndarray]:
        """Compute the mask of each encoded image: (height, width) uint8 of the image's own size, indices into
        `classes`. Only for segmentation models.

        Raises:
            ValueError: an image cannot be used.
        """
        found = []
        for data in images:
            image = decode(data)
            (logits,) = self.logits(geometry(image, self.preprocess)[None])
            found.append(mask_of(logits, (image.size[1], image.size[0])))
        return found

    def predict(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """Return for each encoded image the ``label``, its ``probability``, and the ``probabilities`` by class name. If
        an image may have several classes, ``labels``, most probable first, replaces the first two. A segmentation model
        returns the ``mask``, see `masks`, and the ``shares`` of the pixels by class name.

        Raises:
            ValueError: an image cannot be used.
        """
        if self.maps:
            return [{"mask": mask, "shares": self._shares(mask)} for mask in self.masks(images)]
        predictions = []
        for row in self.probabilities(images).tolist():
            named = dict(zip(self.classes, row))  # noqa: B905  # `strict` needs Python 3.10
            if self.thresholds is not None:
                needed = dict(zip(self.classes, self.thresholds))  # noqa: B905
                passed = [name for name in self.classes if named[name] >= needed[name]]
                labels = sorted(passed, key=lambda name: -named[name])
                predictions.append({"labels": labels, "probabilities": named})
                continue
            label = max(named, key=lambda name: named[name])
            predictions.append({"label": label, "probability": named[label], "probabilities": named})
        return predictions

    def _shares(self, mask: np.ndarray) -> dict[str, float]:
        counts = np.bincount(mask.ravel(), minlength=len(self.classes)) / mask.size
        return {self.classes[i]: float(counts[i]) for i in np.argsort(-counts) if counts[i]}


def png(mask: np.ndarray) -> bytes:
    """Encode a mask (height, width) uint8 as PNG."""
    encoded = io.BytesIO()
    Image.fromarray(mask).save(encoded, "PNG")
    return encoded.getvalue()


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Classify images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", help="ONNX file (default: student.onnx in the folder of this file)")
    parser.add_argument("--masks", metavar="FOLDER", help="where a segmentation model writes IMAGE.png, its masks")
    arguments = parser.parse_args()
    classifier = Classifier(arguments.model)
    failed = False
    for path in arguments.images:
        try:
            found = classifier.predict([Path(path).read_bytes()])[0]
            mask = found.pop("mask", None)
            if mask is not None and arguments.masks:
                Path(arguments.masks).mkdir(parents=True, exist_ok=True)
                (Path(arguments.masks) / f"{Path(path).name}.png").write_bytes(png(mask))
            print(json.dumps({"image": path, **found}, ensure_ascii=False))
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
