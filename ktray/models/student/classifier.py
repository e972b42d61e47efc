"""The student: any timm model with its preprocessing, checked before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import feature_dim, map_positions, pooled_features, trunk
from ktray.models.messages import cause, unknown_name
from ktray.models.packaged import PackagedWeights, named, packaged
from ktray.models.snapshots import TIMM, is_snapshot, open_snapshot
from ktray.models.student.given import AnyImage, upright_images
from ktray.models.weights import fetch, load_timm_weights

# Arguments of timm.create_model that ktray sets itself, or that would change the type of model.
_RESERVED = {
    "num_classes": "the classes of the task determine it",
    "pretrained": "use student.pretrained=",
    "checkpoint_path": "use student.checkpoint=",
    "in_chans": "the images of students are RGB",
    "features_only": "a student needs a classifier",
    "pretrained_cfg": "timm's own is used",
    "pretrained_cfg_overlay": "timm's own is used",
    "cache_dir": "timm's own is used",
    "scriptable": "it does not change the weights",
    "exportable": "it does not change the weights",
    "no_jit": "it does not change the weights",
}
# The source of weights that timm downloads.
HUB = "hub"


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image, its probability, and the probabilities of all classes."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Student(nn.Module):
    """A timm classifier with its preprocessing and class names.

    A student with another output is a subclass with its own ``model`` and `decide`.

    Attributes:
        model: the module that is trained, averaged and saved; here the plain timm model.
        name, kwargs: arguments of ``timm.create_model``.
        preprocess: the preprocessing of the model.
        classes: names in the order of the logits; numbers as text until they are set.
        feature_dim: width of `features`.
        warnings: warnings for the user about this model.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        kwargs: dict[str, Any],
        preprocess: Preprocess,
        classes: Sequence[str],
        warnings: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.name, self.kwargs = name, dict(kwargs)
        self.preprocess = preprocess
        self.classes = list(classes)
        self.warnings = list(warnings)
        self.feature_dim = feature_dim(trunk(model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w) normalised float to the model's output, here logits (N, C)."""
        out: torch.Tensor = self.model(x)
        return out

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 to the model's output as float32, here logits (N, C)."""
        x = self.preprocess.normalise(batch).to(next(self.model.parameters()).dtype)
        return self.forward(x).float()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w) normalised float to pooled features (N, feature_dim), before the classifier."""
        return pooled_features(trunk(self.model), x)

    def transform(self, image: AnyImage) -> torch.Tensor:
        """One image to the input of `model`, (3, h, w) float32: resized, cropped and normalised.

        Args:
            image: see `predict`.
        """
        pixels = torch.from_numpy(self.preprocess.eval_transform(upright_images([image])[0]))
        return self.preprocess.normalise(pixels[None])[0]

    @torch.inference_mode()
    def predict(self, images: Sequence[AnyImage], batch: int = 64) -> list[Any]:
        """Predict whole images, in evaluation mode; see `decide` for the results.

        Args:
            images: PIL images, (H, W, 3) uint8 arrays, encoded bytes, ``{"bytes": ..., "path": ...}`` as Hugging Face
                has them, paths, or uris such as those of a labelled set or of predictions (``X.parquet#row=3``).
            batch: images per forward pass.

        Raises:
            BadImage: bytes or a file that cannot be read or decoded.
            TypeError: an image in another form.
        """
        was_training, device = self.training, next(self.model.parameters()).device
        self.eval()
        predictions = []
        for i in range(0, len(images), batch):
            upright = upright_images(images[i : i + batch])
            pixels = np.stack([self.preprocess.eval_transform(image) for image in upright])
            logits = self.logits(torch.from_numpy(pixels).to(device))
            sizes = [image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1] for image in upright]
            predictions += self.decide(logits, sizes)
        self.train(was_training)
        return predictions

    def served_facts(self) -> dict[str, Any]:
        """What an exported file needs in addition to its weights, as JSON: class names and preprocessing."""
        return {"classes": self.classes, "preprocess": self.preprocess.to_dict()}

    def answers(self, out: torch.Tensor, temperature: float, threshold: float) -> dict[str, torch.Tensor]:
        """What an exported file answers, by name, from the model's output; it can be traced by ``torch.export``.

        Args:
            out: the model's output, here logits (N, C).
            temperature: divides the logits.
            threshold: an image whose largest probability is below it gets no class.

        Returns:
            ``probabilities``, float32 of the shape of the output; and the decision, here ``label`` (N,) int32, the
            number of the class, or -1 for none.
        """
        probabilities = (out / temperature).softmax(1)
        return {"probabilities": probabilities, "label": sure_label(probabilities, threshold)}

    def decide(self, logits: torch.Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Any]:
        """A `Prediction` for each image.

        Args:
            logits: logits of a batch (N, C).
            sizes: (height, width) of each whole image.
        """
        predictions = []
        for row in logits.softmax(1).tolist():
            best = int(np.argmax(row))
            predictions.append(Prediction(self.classes[best], row[best], dict(zip(self.classes, row, strict=True))))
        return predictions


def sure_label(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """(N, C, ...) probabilities to (N, ...) int32: the most probable class, or -1 if its probability is below the
    threshold."""
    largest, label = probabilities.max(1)
    # A product instead of `torch.where` with a number, which not every converter knows.
    return (label.to(torch.int32) + 1) * (largest >= threshold).to(torch.int32) - 1


def classifier_of(model: Any) -> nn.Linear | nn.Conv2d:
    """The last layer of a timm classifier: linear or a 1 x 1 convolution, with a bias.

    Raises:
        KtrayError: the model has another type of classifier.
    """
    layer = model.get_classifier()
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None:
        raise KtrayError(
            f"{type(model).__name__} has no linear classifier with a bias, but {type(layer).__name__}",
            "Set student.name to another model, or objective.name=oriented.",
        )
    return layer


class FeaturesAndLogits(nn.Module):
    """A module that returns the pooled features (N, F) and the logits (N, C) of one pass of a timm classifier. It
    shares the model.

    Raises:
        KtrayError: see `classifier_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        classifier_of(model)
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = pooled_features(self.model, x)
        # A classifier that is a 1 x 1 convolution has the weights of a linear layer, with two more dimensions.
        layer = classifier_of(self.model)
        return features, F.linear(features, layer.weight.flatten(1), layer.bias)


def build_student(
    name: str,
    kwargs: dict[str, Any] | None = None,
    num_classes: int = 1000,
    image_size: int | None = None,
    pretrained: bool | str = False,
    checkpoint: str | None = None,
) -> Student:
    """Build a student by its timm name.

    Args:
        name: any timm model, also ``model.pretrained_tag``, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``. The student of
            a repository or folder has the name and the arguments that its config gives.
        kwargs: arguments of the model, e.g. ``{"patch_size": 2}``.
        num_classes: number of classes of the task.
        image_size: input size in pixels; None: the model's own.
        pretrained: initialise with published weights, from the source that `published_source` finds (true), or from
            the named source.
        checkpoint: initial weights; a classifier for other classes is not loaded.

    Raises:
        KtrayError: the name or an argument is unknown, the weights cannot be loaded or do not fit, or the model cannot
            process images of this size.
    """
    kwargs = dict(kwargs or {})
    if is_snapshot(name):
        return _published_student(name, kwargs, num_classes, image_size, bool(pretrained), checkpoint)
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models(), "student.name")
    for key in kwargs:
        if key in _RESERVED:
            raise KtrayError(f"student.kwargs.{key} cannot be set: {_RESERVED[key]}", f"Remove student.kwargs.{key}.")
    source = published_source(name) if pretrained is True else pretrained
    model = _create(name, kwargs, num_classes, image_size, source == HUB)
    if source and source != HUB:
        _check_start(name, named(str(source))).load(model)
    warnings = []
    if checkpoint:
        path = fetch(checkpoint, "student.checkpoint")
        if not load_timm_weights(model, path, "student.checkpoint"):
            warnings.append(
                f"the classifier in '{checkpoint}' is for other classes; its classifier starts with random weights"
            )
    preprocess = _preprocess(model, image_size)
    warnings += _dry_run(model, name, preprocess.size, num_classes)
    return Student(model, name, kwargs, preprocess, [str(i) for i in range(num_classes)], warnings)


def _published_student(
    name: str,
    kwargs: dict[str, Any],
    num_classes: int,
    image_size: int | None,
    pretrained: bool,
    checkpoint: str | None,
) -> Student:
    found = open_snapshot(name, "student.name")
    if found.kind != TIMM:
        raise KtrayError(
            f"'{name}' is a model of {found.kind}, and students are models of timm",
            "Set student.name to a repository or folder whose config.json has the key architecture.",
        )
    weights = checkpoint or (str(found.weights()) if pretrained else None)
    arguments = {**found.arguments, **kwargs}
    student = build_student(found.architecture, arguments, num_classes, image_size, checkpoint=weights)
    model: Any = student.model
    own = {key: value for key, value in found.pretrained_cfg.items() if key in ("mean", "std", "interpolation")}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    student.preprocess = _preprocess(model, image_size)
    return student


def _preprocess(model: nn.Module, image_size: int | None) -> Preprocess:
    preprocess = Preprocess.from_timm(model)
    if image_size:
        # ktray trains on whole crops of this size, so the edges of images are not removed for predictions.
        preprocess = Preprocess.from_dict({**preprocess.to_dict(), "size": [image_size] * 2, "crop_pct": 1.0})
    return preprocess


def published_source(name: str) -> str:
    """Where ``student.pretrained=true`` takes the weights of a timm model from: the name of packaged weights whose
    package is installed, or else `HUB`."""
    found = packaged(name)
    return found.name if found is not None and found.find() is not None else HUB


def published_name(name: str) -> str:
    """The full name of the weights that timm publishes for a model: ``architecture.tag``."""
    cfg = timm.get_pretrained_cfg(name)
    return name if cfg is None or not cfg.tag else f"{name.partition('.')[0]}.{cfg.tag}"


def _check_start(name: str, weights: PackagedWeights) -> PackagedWeights:
    if packaged(name) is not weights:
        raise KtrayError(
            f"The weights {weights.name} are for {weights.architecture}, not for student '{name}'",
            "Set student.pretrained=true, or choose another student.name.",
        )
    return weights


def _create(name: str, kwargs: dict[str, Any], num_classes: int, image_size: int | None, pretrained: bool) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    if image_size and cfg is not None and cfg.fixed_input_size:
        # Recorded in the kwargs, because the saved weights (position embeddings) depend on it.
        kwargs.setdefault("img_size", image_size)
    if pretrained and not (cfg is not None and cfg.has_weights):
        raise KtrayError(f"timm publishes no weights for student '{name}'", "Set student.pretrained=false.")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except TypeError as error:
        unknown = [key for key in kwargs if f"'{key}'" in str(error)]
        if unknown == ["img_size"] and kwargs["img_size"] == image_size:
            raise KtrayError(
                f"Student '{name}' accepts only images of its own size",
                "Remove image_size, or choose another student.name.",
            ) from error
        if unknown and "unexpected keyword" in str(error):
            raise KtrayError(
                f"Student '{name}' has no argument '{unknown[0]}'", f"Remove student.kwargs.{unknown[0]}."
            ) from error
        raise _cannot_build(name, kwargs, error) from error
    except Exception as error:
        if pretrained:
            package = packaged(name)
            raise KtrayError(
                f"The weights of student '{name}' cannot be fetched, network or hub is not available ({cause(error)})",
                (f"Install them as a package ({package.command}). Or set" if package else "Set")
                + " student.checkpoint=FILE, or student.pretrained=false.",
            ) from error
        raise _cannot_build(name, kwargs, error) from error


def _cannot_build(name: str, kwargs: dict[str, Any], error: Exception) -> KtrayError:
    return KtrayError(
        f"Student '{name}' cannot be built with {kwargs}: {cause(error)}", "Check student.name and student.kwargs."
    )


@torch.inference_mode()
def _dry_run(model: nn.Module, name: str, size: tuple[int, int], num_classes: int) -> list[str]:
    """Run the model on a black image; returns warnings about models that would learn little."""
    was_training = model.training
    model.eval()
    timm_model: Any = model
    try:
        x = torch.zeros(1, 3, *size)
        features = timm_model.forward_features(x)
        out = timm_model.forward_head(features)
    except Exception as error:
        raise KtrayError(
            f"Student '{name}' cannot process images of {size[0]}x{size[1]} px: {cause(error)}",
            "Choose another image_size or student.name, or set student.kwargs (patch_size, img_size).",
        ) from error
    finally:
        model.train(was_training)
    if tuple(out.shape) != (1, num_classes):
        raise KtrayError(
            f"Student '{name}' has an output of shape {tuple(out.shape[1:])} instead of {num_classes} logits",
            "Choose another student.name.",
        )
    positions = map_positions(timm_model, features)
    if positions == 1:
        return [
            f"the last feature map of {name} at {size[0]}x{size[1]} px is 1x1: with only one position, it "
            "learns little; lower its stride with student.kwargs (patch_size, output_stride), or choose another student"
        ]
    return []
