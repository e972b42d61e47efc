"""A teacher that has been taught a segmentation task: image tower, linear head on patch embeddings, temperature."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import freeze_idle
from ktray.models.teacher.adapted import AdaptedTeacher, _base, _fill, _plain
from ktray.models.teacher.dense_head import DenseHead
from ktray.models.teacher.layers import layer_decay_groups
from ktray.models.teacher.teacher import Teacher, TeacherSource, embed, patch_embeddings
from ktray.storage.store import Stage

_FILE, _FORMAT = "dense_teacher.json", 1


class DenseTeacher(nn.Module):
    """Predicts a class for every patch; the counterpart of `ktray.models.teacher.adapted.AdaptedTeacher`.

    Args:
        teacher: the base; its image tower is shared, not copied.
        head: on the patch embeddings of its last levels.
        classes: names, in the order of the logits.
        temperature: divides the logits; fitted on validation.
        finetuned: the tower's weights differ from the base teacher's (they are then saved too).

    Raises:
        KtrayError: head, classes and teacher do not belong together.
    """

    def __init__(
        self,
        teacher: Teacher,
        head: DenseHead,
        classes: Sequence[str],
        temperature: float = 1.0,
        finetuned: bool = False,
    ) -> None:
        super().__init__()
        wanted = teacher.level_dims(len(head.dims))
        if head.dims != wanted or len(head.weight) != len(classes):
            raise KtrayError(
                f"The head has {len(head.weight)} classes on maps of widths {head.dims}, "
                f"{len(classes)} classes of this teacher need {len(classes)} on {wanted}",
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

    def maps(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8, or float on the scale 0..255, to calibrated logits (N, C, h, w) float32.

        h and w are those of the finest map of patch embeddings; probabilities of pixels are the softmax of the map
        after `ktray.tasks.segmentation.resize_map`.
        """
        features = patch_embeddings(self.image_tower, self.preprocess, self.source, batch, len(self.head.dims))
        return self.maps_of(features)

    def maps_of(self, features: torch.Tensor) -> torch.Tensor:
        """Calibrated logits of patch embeddings (N, D, h, w) that are at hand."""
        found: torch.Tensor = self.head(features).float()
        return found / self.temperature

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """`maps` under the name that it has in every adapted teacher."""
        return self.maps(batch)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.maps(batch)

    def param_groups(self, layer_decay: float, weight_decay: float, head_scale: float) -> list[dict[str, Any]]:
        """Optimizer groups for finetuning: the tower with layer-wise decay, the head at `head_scale` times the rate.

        Freezes what takes no part in `maps`, such as the layers that pool.
        """
        freeze_idle(self, self, self.preprocess.size[0])
        head = [
            {"params": [self.head.weight], "lr_scale": head_scale, "weight_decay": weight_decay},
            {"params": [self.head.bias], "lr_scale": head_scale, "weight_decay": 0.0},
        ]
        return layer_decay_groups(self.image_tower, layer_decay, weight_decay) + head

    def save(self, directory: str | Path) -> None:
        """Write ``dense_teacher.json``, ``head.safetensors`` and, only when finetuned, ``tower.safetensors``."""
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
            "head": {
                "input": "patch embeddings of the last levels, each L2-normalised",
                "dims": self.head.dims,
                "l2": self.head.l2,
            },
            "preprocess": self.preprocess.to_dict(),
            "base": {**self.source.to_dict(), "fingerprint": self.base_fingerprint},
        }
        (folder / _FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        checkpoint: str | None = None,
        config: str | None = None,
    ) -> DenseTeacher:
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
            facts = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            base = dict(facts["base"])
            fingerprint = base.pop("fingerprint")
            source = TeacherSource(**base)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KtrayError(
                f"'{folder}' holds no segmentation teacher: {error}", "Give the folder that the adapt stage wrote."
            ) from error
        where = TeacherSource(source.name, checkpoint or source.checkpoint, config or source.config, source.image_size)
        teacher = _base(folder, facts, where, fingerprint)
        dims = facts["head"]["dims"]
        head = DenseHead(torch.zeros(len(facts["classes"]), sum(dims)), dims)
        _fill(head, folder / "head.safetensors")
        head.l2 = facts["head"]["l2"]
        return cls(teacher, head, facts["classes"], facts["temperature"], facts["finetuned"]).eval().to(device)


def is_dense_teacher(directory: str | Path) -> bool:
    """Whether `DenseTeacher.save` wrote this folder."""
    return (Path(directory) / _FILE).is_file()


def load_adapted(directory: str | Path, device: str | torch.device = "cpu") -> AdaptedTeacher | DenseTeacher:
    """The adapted teacher of either kind of task in a folder; see the ``load`` of both for what it raises."""
    kind = DenseTeacher if is_dense_teacher(directory) else AdaptedTeacher
    return kind.load(directory, device)


def save_candidate(stage: Stage, name: str, teacher: AdaptedTeacher | DenseTeacher) -> None:
    """Keep an adapted teacher in the stage until the best is chosen."""
    with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
        teacher.save(folder)
        stage.put(Path(folder), f"candidate-{name}")
