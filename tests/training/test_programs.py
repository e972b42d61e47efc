"""What the workers train."""

import pytest
import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.objectives.base import ObjectiveContext
from ktray.recipe.choice import chosen
from ktray.training.programs import Pretrain


class Recorder(nn.Module):
    """A student that remembers the sizes it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("size", [32, 64])
def test_small_crops_of_dino_reach_the_student_small(size: int) -> None:
    student = Recorder()
    objective = chosen({"name": "dino", "prototypes": 8, "local_crops": 3}).build()
    objective.setup(
        ObjectiveContext(num_classes=2, student_dim=8, teacher_dim=None, seed=0, student=student, image_size=size)
    )
    preprocess = Preprocess(size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3)
    module = Pretrain(student, preprocess, objective)
    student.seen.clear()
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    module({"pixels": pixels, "view_key": torch.arange(4)}, torch.Generator())
    small = {32: 16, 64: 24}[size]  # 96 of 224 px, to multiples of 8
    assert student.seen == [(8, 3, size, size), (12, 3, small, small)]
