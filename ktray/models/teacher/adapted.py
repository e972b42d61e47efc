"""Adapted teachers: image tower, head, temperature, preprocessing and class names for a task."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import freeze_idle
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.layers import layer_decay_groups
from ktray.models.teacher.teacher import Teacher, TeacherSource, embed
from ktray.models.weights import fill, plain
from ktray.storage.store import Stage

_FORMAT = 1

Form = TypeVar("Form", bound="AdaptedTeacher")


class AdaptedTeacher(nn.Module):
    """Predicts the outputs of a task for an image, with the tower of a teacher and a head.

    Another type of head needs a subclass: its methods check, describe and create the head, and compute the logits.

    Args:
        teacher: the base teacher; its image tower is shared, not copied.
        head: linear on the L2-normalised embedding.
        classes: names in the order of the logits.
        temperature: divides the logits; fitted on validation.
        finetuned: whether the weights of the tower differ from those of the base teacher, so that they must be saved.

    Raises:
        KtrayError: head, classes and teacher do not fit together.
    """

    FILE: ClassVar[str] = "adapted.json"
    HOLDS: ClassVar[str] = "adapted teacher"
    POOLED: ClassVar[bool] = True  # whether the head reads the pooled embedding

    def __init__(
        self,
        teacher: Teacher,
        head: Any,
        classes: Sequence[str],
        temperature: float = 1.0,
        finetuned: bool = False,
    ) -> None:
        super().__init__()
        if problem := self.misfit(teacher, head, len(classes)):
            raise KtrayError(problem, "Use the teacher and the classes for which the head was created.")
        self.image_tower = teacher.image_tower
        self.head = head
        self.preprocess: Preprocess = teacher.preprocess
        self.classes = list(classes)
        self.temperature = temperature
        self.finetuned = finetuned
        self.embed_dim, self.patch_dim = teacher.embed_dim, teacher.patch_dim
        self.source: TeacherSource = teacher.source
        self.base_fingerprint = teacher.fingerprint

    @classmethod
    def misfit(cls, teacher: Teacher, head: Any, outputs: int) -> str:
        """Why a head does not fit this teacher and this number of outputs; "" if it fits."""
        if tuple(head.weight.shape) == (outputs, teacher.embed_dim):
            return ""
        return (
            f"The head has the shape {tuple(head.weight.shape)}, but {outputs} classes with a "
            f"{teacher.embed_dim}-dimensional teacher need {(outputs, teacher.embed_dim)}"
        )

    def head_facts(self) -> dict[str, Any]:
        """Properties of the head that are saved in addition to its weights."""
        return {"input": "L2-normalised embedding", "l2": self.head.l2}

    @classmethod
    def empty_head(cls, facts: dict[str, Any], teacher: Teacher, outputs: int) -> Any:
        """A head of the type that `head_facts` describes, into which weights can be loaded."""
        return LinearHead(torch.zeros(outputs, teacher.embed_dim))

    @property
    def members(self) -> Sequence[AdaptedTeacher]:
        """The teachers that predict together; only this one, unless it is an ensemble."""
        return [self]

    def embed(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 to (N, embed_dim) float32, not normalised to unit length."""
        return embed(self.image_tower, self.preprocess, batch)

    def logits(self, batch: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """(N, 3, H, W) uint8 to calibrated logits (N, C) float32.

        Args:
            batch: images.
            embedding: the result of `embed` for the batch, if it was computed already.
        """
        return self.logits_of(self.embed(batch) if embedding is None else embedding)

    def logits_of(self, embedding: torch.Tensor) -> torch.Tensor:
        """Calibrated logits for computed embeddings."""
        # In half precision, the steps between the logits of a CLIP head (up to 100) are larger than an eighth.
        exact = torch.autocast("cuda", enabled=False) if embedding.is_cuda else contextlib.nullcontext()
        with exact:
            logits: torch.Tensor = self.head(embedding.float())
        return logits / self.temperature

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.logits(batch)

    def param_groups(self, layer_decay: float, weight_decay: float, head_scale: float) -> list[dict[str, Any]]:
        """Optimizer groups for finetuning: tower with layer-wise decay, head with `head_scale` times the rate.

        Parameters without influence on `logits`, as CoCa's tower has them, are frozen.
        """
        freeze_idle(self, self, self.preprocess.size[0])
        head = [
            {"params": [self.head.weight], "lr_scale": head_scale, "weight_decay": weight_decay},
            {"params": [self.head.bias], "lr_scale": head_scale, "weight_decay": 0.0},
        ]
        return layer_decay_groups(self.image_tower, layer_decay, weight_decay) + head

    def save(self, directory: str | Path) -> None:
        """Write ``FILE``, ``head.safetensors`` and, only if the tower was finetuned, ``tower.safetensors``."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(plain(self.head), str(folder / "head.safetensors"))
        if self.finetuned:
            save_file(plain(self.image_tower), str(folder / "tower.safetensors"))
        facts = {
            "format": _FORMAT,
            "classes": self.classes,
            "temperature": self.temperature,
            "finetuned": self.finetuned,
            "head": self.head_facts(),
            "preprocess": self.preprocess.to_dict(),
            "base": {**self.source.to_dict(), "fingerprint": self.base_fingerprint},
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (folder / self.FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls: type[Form],
        directory: str | Path,
        device: str | torch.device = "cpu",
        checkpoint: str | None = None,
        config: str | dict[str, Any] | None = None,
    ) -> Form:
        """Inverse of `save`, in evaluation mode.

        Args:
            directory: the folder that `save` wrote.
            device: the device of the result.
            checkpoint, config: the new paths of the base teacher's files, if they were moved.

        Raises:
            KtrayError: files are missing or damaged, or the base teacher has changed.
        """
        folder = Path(directory)
        try:
            facts = json.loads((folder / cls.FILE).read_text(encoding="utf-8"))
            base = dict(facts["base"])
            fingerprint = base.pop("fingerprint")
            source = TeacherSource(**base)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KtrayError(
                f"'{folder}' contains no {cls.HOLDS}: {error}", "Use a folder that the stage ADAPT wrote."
            ) from error
        current = TeacherSource(
            source.name, checkpoint or source.checkpoint, config or source.config, source.image_size
        )
        teacher = _base(folder, facts, current, fingerprint)
        head = cls.empty_head(facts["head"], teacher, len(facts["classes"]))
        fill(head, folder / "head.safetensors")
        head.l2 = facts["head"]["l2"]
        adapted = cls(teacher, head, facts["classes"], facts["temperature"], facts["finetuned"])
        return adapted.eval().to(device)


def _base(folder: Path, facts: dict[str, Any], source: TeacherSource, fingerprint: str) -> Teacher:
    """The image tower and preprocessing of an adapted teacher, with its own weights if it was finetuned, otherwise with
    those of the base teacher.

    Raises:
        KtrayError: the base teacher has changed since it was adapted.
    """
    # The import is slow, and workers that read stored targets do not load a teacher.
    from ktray.models.teacher.load import build_teacher, load_teacher

    if facts["finetuned"]:
        teacher = build_teacher(source)
        fill(teacher.image_tower, folder / "tower.safetensors")
        teacher.fingerprint = fingerprint
    else:
        teacher = load_teacher(source.name, source.checkpoint, source.config, image_size=source.image_size)
        if teacher.fingerprint != fingerprint:
            raise KtrayError(
                f"The base teacher '{source.name}' is not the one that was adapted in '{folder}': "
                "its weights or its config have changed",
                "Restore its files, or run the stage ADAPT again.",
            )
    teacher.drop_text()
    teacher.preprocess = Preprocess.from_dict(facts["preprocess"])
    return teacher


def save_candidate(stage: Stage, name: str, teacher: AdaptedTeacher) -> None:
    """Store an adapted teacher in the stage until the best candidate is chosen."""
    with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
        teacher.save(folder)
        stage.put(Path(folder), f"candidate-{name}")
