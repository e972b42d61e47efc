"""A teacher that has been taught a task: image tower, head, temperature, preprocessing, class names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.layers import layer_decay_groups
from ktray.models.teacher.teacher import Teacher, TeacherSource, embed
from ktray.models.weights import mismatch, weight_errors, wrong_keys

_FORMAT = 1


class AdaptedTeacher(nn.Module):
    """Predicts a task's classes; made from a teacher and a head.

    Args:
        teacher: the base; its image tower is shared, not copied.
        head: linear on the L2-normalised embedding.
        classes: names, in the order of the logits.
        temperature: divides the logits; fitted on validation.
        finetuned: the tower's weights differ from the base teacher's (they are then saved too).

    Raises:
        KtrayError: head, classes and teacher do not belong together.
    """

    def __init__(
        self,
        teacher: Teacher,
        head: LinearHead,
        classes: Sequence[str],
        temperature: float = 1.0,
        finetuned: bool = False,
    ) -> None:
        super().__init__()
        if tuple(head.weight.shape) != (len(classes), teacher.embed_dim):
            raise KtrayError(
                f"The head is {tuple(head.weight.shape)}, {len(classes)} classes of a "
                f"{teacher.embed_dim}-dimensional teacher need {(len(classes), teacher.embed_dim)}",
                "Use the head with the teacher and classes that it was made for.",
            )
        self.image_tower = teacher.image_tower
        self.head = head
        self.preprocess: Preprocess = teacher.preprocess
        self.classes = list(classes)
        self.temperature = temperature
        self.finetuned = finetuned
        self.embed_dim, self.patch_dim = teacher.embed_dim, teacher.patch_dim
        self.source: TeacherSource = teacher.source
        self.base_fingerprint = teacher.fingerprint

    def embed(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 to (N, embed_dim) float32, not normalised to unit length."""
        return embed(self.image_tower, self.preprocess, batch)

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 to calibrated logits (N, C) float32."""
        return self.logits_of(self.embed(batch))

    def logits_of(self, embedding: torch.Tensor) -> torch.Tensor:
        """Calibrated logits of embeddings that are at hand."""
        found: torch.Tensor = self.head(embedding).float()
        return found / self.temperature

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.logits(batch)

    def param_groups(self, layer_decay: float, weight_decay: float, head_scale: float) -> list[dict[str, Any]]:
        """Optimizer groups for finetuning: the tower with layer-wise decay, the head at `head_scale` times the rate."""
        head = [
            {"params": [self.head.weight], "lr_scale": head_scale, "weight_decay": weight_decay},
            {"params": [self.head.bias], "lr_scale": head_scale, "weight_decay": 0.0},
        ]
        return layer_decay_groups(self.image_tower, layer_decay, weight_decay) + head

    def save(self, directory: str | Path) -> None:
        """Write ``adapted.json``, ``head.safetensors`` and, only when finetuned, ``tower.safetensors``."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_plain(self.head), str(folder / "head.safetensors"))
        if self.finetuned:
            save_file(_plain(self.image_tower), str(folder / "tower.safetensors"))
        facts = {
            "format": _FORMAT,
            "classes": self.classes,
            "temperature": self.temperature,
            "finetuned": self.finetuned,
            "head": {"input": "L2-normalised embedding", "l2": self.head.l2},
            "preprocess": self.preprocess.to_dict(),
            "base": {**self.source.to_dict(), "fingerprint": self.base_fingerprint},
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (folder / "adapted.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        checkpoint: str | None = None,
        config: str | None = None,
    ) -> AdaptedTeacher:
        """Inverse of `save`, in evaluation mode.

        Args:
            directory: what `save` wrote.
            device: where to put it.
            checkpoint, config: where the base teacher's files are now, if they have moved.

        Raises:
            KtrayError: files are missing or damaged, or the base teacher is not the one that was adapted.
        """
        folder = Path(directory)
        try:
            facts = json.loads((folder / "adapted.json").read_text(encoding="utf-8"))
            base = dict(facts["base"])
            fingerprint = base.pop("fingerprint")
            source = TeacherSource(**base)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KtrayError(
                f"'{folder}' holds no adapted teacher: {error}", "Give the folder that the adapt stage wrote."
            ) from error
        where = TeacherSource(source.name, checkpoint or source.checkpoint, config or source.config, source.image_size)
        teacher = _base(folder, facts, where, fingerprint)
        head = LinearHead(torch.zeros(len(facts["classes"]), teacher.embed_dim))
        _fill(head, folder / "head.safetensors")
        head.l2 = facts["head"]["l2"]
        adapted = cls(teacher, head, facts["classes"], facts["temperature"], facts["finetuned"])
        return adapted.eval().to(device)


def _base(folder: Path, facts: dict[str, Any], where: TeacherSource, fingerprint: str) -> Teacher:
    """The image tower and preprocessing of an adapted teacher: its own weights if it was finetuned, else the base's.

    Raises:
        KtrayError: the base teacher is not the one that was adapted.
    """
    # Slow to import, and workers that read stored targets load no teacher.
    from ktray.models.teacher.load import build_teacher, load_teacher

    if facts["finetuned"]:
        teacher = build_teacher(where)
        _fill(teacher.image_tower, folder / "tower.safetensors")
        teacher.fingerprint = fingerprint
    else:
        teacher = load_teacher(where.name, where.checkpoint, where.config, image_size=where.image_size)
        if teacher.fingerprint != fingerprint:
            raise KtrayError(
                f"The base teacher '{where.name}' is not the one that was adapted in '{folder}' "
                "(its weights or config have changed)",
                "Restore its checkpoint, or run the adapt stage again.",
            )
    teacher.drop_text()
    teacher.preprocess = Preprocess.from_dict(facts["preprocess"])
    return teacher


def _plain(module: nn.Module) -> dict[str, torch.Tensor]:
    # Cloned: safetensors refuses tensors that share memory.
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def _fill(module: nn.Module, path: Path) -> None:
    with weight_errors(path):
        state = load_file(str(path))
    if why := mismatch(module, state):
        raise wrong_keys(path, why)
    module.load_state_dict(state)
