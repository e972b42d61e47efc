"""Embedding and patch embeddings from one forward pass: the same as from two passes, at half of the FLOPs."""

import pytest
import timm
import torch

from ktray.data.preprocess import Preprocess
from ktray.models.flops import count_flops
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.families.base import TeacherSource
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.spec import tower_flops
from ktray.models.teacher.teacher import embed, embed_with_patches, patch_embeddings
from ktray.targets.predict import Predict

PIXELS = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check(tower, preprocess, name):
    source = TeacherSource(name)
    with torch.inference_mode():
        embedding, patches = embed_with_patches(tower, preprocess, source, PIXELS)
        torch.testing.assert_close(embedding, embed(tower, preprocess, PIXELS))
        torch.testing.assert_close(patches, patch_embeddings(tower, preprocess, source, PIXELS))
        one = count_flops(lambda: embed_with_patches(tower, preprocess, source, PIXELS))
        assert one == count_flops(lambda: embed(tower, preprocess, PIXELS))


@pytest.mark.parametrize("model", ["test_vit", "test_vit2", "test_resnet", "test_convnext", "test_efficientnet"])
def test_one_pass_of_a_timm_tower(model):
    tower = timm.create_model(model, num_classes=0).eval()
    check(tower, Preprocess.from_timm(tower), f"timm:{model}")


def test_one_pass_of_an_open_clip_tower(tiny_clip):
    teacher = load_teacher("open_clip:mine", checkpoint=tiny_clip.checkpoint, config=tiny_clip.config)
    check(teacher.image_tower, teacher.preprocess, "open_clip:mine")


@pytest.mark.parametrize(
    "targets",
    [
        ("logits",),
        ("embedding", "logits"),
        ("patch_embedding",),
        ("embedding", "patch_embedding"),
        ("embedding", "logits", "patch_embedding"),
    ],
)
def test_the_flops_of_targets_are_those_of_one_pass(tiny_clip, targets):
    base = load_teacher("open_clip:mine", checkpoint=tiny_clip.checkpoint, config=tiny_clip.config)
    teacher = AdaptedTeacher(base, LinearHead(torch.randn(5, base.embed_dim), torch.zeros(5)), list("abcde"), 0.1)

    class Source:
        def load(self):
            return teacher

    loaded = Predict(Source(), targets, 32, 4).load()
    head = 2 * 5 * base.embed_dim * ("logits" in targets)
    # Without the pooled embedding there is no projection, which is a thousandth of this tower's FLOPs.
    assert loaded.flops == pytest.approx(tower_flops(teacher) + head, rel=2e-3)
    assert loaded.targets(PIXELS.numpy()).keys() == set(targets)


def test_a_tower_that_needs_two_passes_is_counted_twice(tiny_clip, monkeypatch):
    from ktray.models.teacher.families.base import TeacherFamily
    from ktray.models.teacher.families.open_clip import OpenClipFamily

    monkeypatch.setattr(OpenClipFamily, "output_and_maps", TeacherFamily.output_and_maps)
    base = load_teacher("open_clip:mine", checkpoint=tiny_clip.checkpoint, config=tiny_clip.config)
    teacher = AdaptedTeacher(base, LinearHead(torch.randn(5, base.embed_dim), torch.zeros(5)), list("abcde"), 0.1)

    class Source:
        def load(self):
            return teacher

    loaded = Predict(Source(), ("embedding", "patch_embedding"), 32, 4).load()
    # The second pass leaves out the projection of the pooled embedding, which is a thousandth of this tower's FLOPs.
    assert 1.9 * tower_flops(teacher) < loaded.flops <= 2 * tower_flops(teacher)
