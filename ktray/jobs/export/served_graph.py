"""The graph of a student for deployment: its network, optionally from uint8 pixels to probabilities and decisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from ktray.errors import KtrayError
from ktray.jobs.export.confidence import Confidence
from ktray.models.messages import cause
from ktray.models.student.classifier import Student

Form = Literal["logits", "probabilities"]
LOGITS: Literal["logits"] = "logits"
PROBABILITIES: Literal["probabilities"] = "probabilities"
IMAGE, PIXELS = "image", "pixels"  # names of the input: normalised float32, or 0..255
MAX_BATCH = 1024  # largest batch of a graph whose batch size is free


class ServedNet(nn.Module):
    """The network of a student. It returns a tuple of tensors: the logits, or the values of `Student.answers`."""

    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, student: Student, form: Form, confidence: Confidence) -> None:
        super().__init__()
        self.net = reparameterize_model(student.model)  # a copy, with merged branches
        self.form, self.confidence = form, confidence
        # A student is a module with the original network, which must not become a part of this one.
        self.answers: Callable[..., dict[str, torch.Tensor]] = student.answers
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (student.preprocess.mean, student.preprocess.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1))
        self.register_buffer("bias", (-mean / std).float().view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, 3, height, width): normalised float32 for logits, otherwise uint8 or float32 on the scale 0..255."""
        if self.form == LOGITS:
            return (self.net(x),)
        out = self.net(x.float() * self.scale + self.bias)
        return tuple(self.answers(out, self.confidence.temperature, self.confidence.threshold).values())


@dataclass(frozen=True)
class ServedGraph:
    """What a deployed file computes.

    Attributes:
        net: the network, in evaluation mode.
        form: what it returns.
        input: name of the input.
        outputs: names of the outputs, in order.
        example: an input (N, 3, height, width); N is 1 if the batch size is fixed.
        facts: class names, preprocessing, temperature, thresholds and the form, as JSON.
    """

    net: ServedNet
    form: Form
    input: str
    outputs: tuple[str, ...]
    example: torch.Tensor
    facts: dict[str, Any]

    def program(self) -> torch.export.ExportedProgram:
        """Return the graph by ``torch.export``; the batch size is free if the example has more than one image."""
        single = len(self.example) == 1
        shapes = None if single else ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
        return torch.export.export(self.net, (self.example,), dynamic_shapes=shapes)

    def signature(self) -> dict[str, Any]:
        """Return name, dtype and shape of the input, and the names of the outputs, for ``export.json``."""
        single = len(self.example) == 1
        shape = [1 if single else None, *self.example.shape[1:]]
        dtype = str(self.example.dtype).removeprefix("torch.")
        return {
            "input": {"name": self.input, "dtype": dtype, "shape": shape},
            "outputs": list(self.outputs),
            "graph": self.form,
        }

    def write_facts(self, path: Path) -> None:
        """Write the facts beside the file ``path``; see `facts_file`."""
        facts_file(path).write_text(json.dumps(self.facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def build(
    student: Student, form: Form, confidence: Confidence, single: bool = False, pixels: torch.dtype = torch.uint8
) -> ServedGraph:
    """Build the graph of a student.

    Args:
        student: in evaluation mode.
        form: ``logits``, or ``probabilities`` with preprocessing and decisions.
        confidence: temperature and threshold; for ``logits`` they are only among the facts.
        single: whether the batch size is one, instead of free.
        pixels: dtype of the input if the form is ``probabilities``.
    """
    net = ServedNet(student, form, confidence).eval()
    count, (height, width) = 1 if single else 2, student.preprocess.size
    name = IMAGE if form == LOGITS else PIXELS
    example = torch.zeros(count, 3, height, width, dtype=torch.float32 if form == LOGITS else pixels)
    outputs: tuple[str, ...] = (LOGITS,)
    if form == PROBABILITIES:
        with torch.no_grad():
            out = net.net(torch.zeros(1, 3, height, width))
        outputs = tuple(student.answers(out, 1.0, 0.0))
    facts = {
        **student.served_facts(),
        "temperature": confidence.temperature,
        "threshold": confidence.threshold,
        "graph": form,
        "input": {"name": name, "dtype": str(example.dtype).removeprefix("torch."), "shape": [3, height, width]},
        "outputs": list(outputs),
    }
    return ServedGraph(net, form, name, outputs, example, facts)


def facts_file(path: Path) -> Path:
    """The file with class names, preprocessing and thresholds beside an exported file."""
    return path.with_name(f"{path.name}.json")


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of an exported file.

    Raises:
        KtrayError: they are missing or damaged.
    """
    place = facts_file(path)
    try:
        facts: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if not {"classes", "preprocess", "temperature", "threshold", "graph", "outputs"} <= set(facts):
            raise ValueError("keys are missing")
    except (OSError, ValueError, TypeError) as error:
        raise KtrayError(
            f"'{place.name}', which describes '{path.name}', cannot be read: {cause(error)}",
            "Keep both files together, or write the export again.",
        ) from error
    return facts
