"""What the workers train."""

import numpy as np
import pytest
import torch
from torch import nn

from ktray.data.augment import view_keys
from ktray.data.preprocess import Preprocess
from ktray.data.strong import PLAIN, StrongPolicy, strong_views
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.oriented import Oriented
from ktray.recipe.choice import chosen
from ktray.tasks.base import task_kind
from ktray.training.programs import Pretrain, Supervise


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


class Sees(nn.Module):
    """A student that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return self.weight.expand(len(x), 3)


@pytest.mark.parametrize("strong", [PLAIN, StrongPolicy(crop_min=0.4, photometric=1)])
def test_the_student_sees_the_strong_views_of_the_stored_ones(strong: StrongPolicy) -> None:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    keys, logits = view_keys(0, np.arange(6), np.zeros(6)), torch.randn(6, 3)
    preprocess = Preprocess(size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    student = Sees()
    module = Pretrain(student, preprocess, Oriented(), strong)
    loss = module({"pixels": pixels, "view_key": keys, "logits": logits}, torch.Generator())["loss"]
    torch.testing.assert_close(student.x, preprocess.normalise(strong_views(pixels, strong, keys)))
    # The target is that of the stored view: the student's output is uniform.
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(loss, (p * (p * 3).log()).sum(1).mean())


def test_labelled_and_replayed_images_have_strong_views_of_their_own_keys() -> None:
    strong, kind = StrongPolicy(crop_min=0.4), task_kind("classification")
    images, replay = (torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    own, other = (view_keys(seed, np.arange(4), np.zeros(4)) for seed in (1, 2))
    preprocess = Preprocess(size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    student = Sees()
    batch = {"images": images, "label": torch.zeros(4, dtype=torch.int64), "view_key": own}
    batch |= {"replay_pixels": replay, "replay_logits": torch.zeros(4, 3), "replay_view_key": other}
    Supervise(kind, student, preprocess, Oriented(), strong)(batch, torch.Generator())
    shown = torch.cat([strong_views(images, strong, own), strong_views(replay, strong, other)])
    torch.testing.assert_close(student.x, preprocess.normalise(shown.float()))
