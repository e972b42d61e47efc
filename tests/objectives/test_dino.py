"""DINO: loss, momentum, centring and views against closed forms, and a short run that must not collapse."""

import math

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax, softmax

from ktray.data.augment import random_views, view_keys
from ktray.models.features import Features
from ktray.models.student.classifier import classifier_of
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.dino import Dino, Head, local_side

N, K = 4, 16


def student(name="test_resnet", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    classifier_of(model).requires_grad_(False)
    return Features(model)


def dino(body, **kwargs):
    objective = Dino(**{"prototypes": K, "local_crops": 2, "hidden": 32, "bottleneck": 16, **kwargs})
    objective.setup(ObjectiveContext(3, body.model.num_features, None, seed=1, student=body, image_size=32))
    return objective


def batch(n=N, visit=0, first=0):
    rows = np.arange(first, first + n)
    return {"pixels": textures(first + n)[first:], "view_key": view_keys(0, rows, np.full(n, visit))}


def textures(n, side=40):
    """(n, 3, side, side) uint8: coloured gratings of any direction, frequency and phase."""
    g = torch.Generator().manual_seed(5)
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    turn, pace, phase = (torch.rand(n, 1, 1, generator=g) for _ in range(3))
    wave = torch.sin((x * torch.cos(turn * math.pi) + y * torch.sin(turn * math.pi)) * (0.2 + pace) + 7 * phase)
    colour = torch.rand(n, 3, 1, 1, generator=g)
    return (127.5 + 127.5 * wave[:, None] * (2 * colour - 1)).to(torch.uint8)


def normalise(x):
    return x.float() / 64 - 2


def test_loss_is_its_closed_form():
    objective = dino(student())
    g = torch.Generator().manual_seed(0)
    seen, target = torch.randn(4 * N, K, generator=g), torch.randn(2 * N, K, generator=g)
    objective.center.copy_(torch.randn(K, generator=g))
    # Halfway through the warm-up of the teacher's temperature.
    objective.progress.fill_(0.05)
    heat = (0.04 + 0.07) / 2
    q = softmax((target.double().numpy() - objective.center.double().numpy()) / heat, axis=1)
    log_p = log_softmax(seen.double().numpy() / 0.1, axis=1)
    total, pairs = 0.0, 0
    for a in range(2):
        for b in range(4):
            if a == b:
                continue
            for i in range(N):
                total -= (q[a * N + i] * log_p[b * N + i]).sum()
                pairs += 1
    found = objective.loss(seen, {"teacher": target})
    assert float(found["loss"]) == pytest.approx(total / pairs, rel=1e-4)
    entropy = -(q * np.log(q + 1e-300)).sum(1).mean() / math.log(K)
    assert float(found["teacher_entropy"]) == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize(("progress", "heat"), [(0.0, 0.04), (0.1, 0.07), (1.0, 0.07)])
def test_the_teachers_temperature_rises_to_its_end_and_stays(progress, heat):
    objective = dino(student())
    objective.progress.fill_(progress)
    target = torch.randn(2 * N, K) / 10
    expected = torch.special.entr((target / heat).softmax(1)).sum(1).mean() / math.log(K)
    found = objective.loss(torch.zeros(4 * N, K), {"teacher": target})["teacher_entropy"]
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_head_gives_cosines_with_the_prototypes():
    head = Head(5, 8, 6, 7)
    x = torch.randn(3, 5)
    with torch.no_grad():
        inner = head.mlp(x)
        found = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(x)
    assert half.dtype == torch.float32
    assert torch.allclose(half, found, atol=0.05)
    for i in range(3):
        for k in range(7):
            w = head.prototypes.weight[k].detach()
            assert float(found[i, k]) == pytest.approx(float(inner[i] @ w / (inner[i].norm() * w.norm())), abs=1e-5)


def test_step_cuts_the_crops_by_the_images_keys_and_shows_the_teacher_the_global_ones():
    body = student()
    objective = dino(body, hflip=0.3, jitter=(0.1, 0.2, 0.3))
    given = batch()
    seen, taught = [], []
    body.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    objective.teacher.register_forward_pre_hook(lambda _, x: taught.append(x[0]))
    objective.step(body, normalise, given, torch.Generator())
    assert [tuple(x.shape) for x in seen] == [(2 * N, 3, 32, 32), (2 * N, 3, 16, 16)]
    assert torch.equal(taught[0], seen[0])
    for policy, side, x, first in ((objective.global_policy, 32, seen[0], 0), (objective.local_policy, 16, seen[1], 2)):
        for i in range(2):
            views = random_views(given["pixels"], policy, given["view_key"], salt=first + i, size=side)
            assert torch.equal(x[i * N : (i + 1) * N], normalise(views))
    assert objective.global_policy.scale == (0.4, 1.0)
    assert objective.local_policy.scale == (0.05, 0.4)
    assert {objective.global_policy.hflip, objective.local_policy.hflip} == {0.3}
    assert objective.local_policy.saturation == 0.3


def test_step_is_the_loss_of_its_outputs_and_moves_the_centre():
    body = student()
    objective = dino(body)
    old = torch.randn(K) / 5
    objective.center.copy_(old)
    outputs = []
    objective.teacher_head.register_forward_hook(lambda _, x, y: outputs.append(y))
    seen = []
    objective.head.register_forward_hook(lambda _, x, y: seen.append(y))
    found = objective.step(body, normalise, batch(), torch.Generator())
    assert torch.allclose(objective.center, 0.9 * old + 0.1 * outputs[0].mean(0), atol=1e-6)
    objective.center.copy_(old)
    again = objective.loss(torch.cat(seen), {"teacher": outputs[0]})
    assert float(found["loss"].detach()) == pytest.approx(float(again["loss"].detach()), rel=1e-6)


def test_the_centre_is_of_the_batches_of_all_workers(monkeypatch):
    objective = dino(student())
    target, other = torch.randn(2 * N, K), torch.randn(2 * N, K)
    module = "ktray.objectives.dino.dist"
    monkeypatch.setattr(f"{module}.is_initialized", lambda: True)
    monkeypatch.setattr(f"{module}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.all_reduce", lambda mean: mean.add_(other.mean(0)))
    objective._move_center(target)
    assert torch.allclose(objective.center, 0.1 * torch.cat([target, other]).mean(0), atol=1e-6)


def test_gradient_reaches_body_and_head_and_never_teacher_or_classifier():
    body = student()
    objective = dino(body)
    objective.progress.fill_(0.5)
    objective.step(body, normalise, batch(), torch.Generator())["loss"].backward()
    classifier = set(map(id, classifier_of(body.model).parameters()))
    for name, p in body.model.named_parameters():
        assert (p.grad is None) == (id(p) in classifier), name
    for name, p in objective.named_parameters():
        assert (p.grad is None) == name.startswith("teacher"), name
        assert p.requires_grad != name.startswith("teacher"), name


def test_prototypes_rest_at_first():
    body = student()
    objective = dino(body)
    for progress, rests in ((0.0, True), (0.02, False)):
        objective.progress.fill_(progress)
        objective.zero_grad()
        objective.step(body, normalise, batch(), torch.Generator())["loss"].backward()
        assert (objective.head.prototypes.weight.grad.abs().sum() == 0) == rests
        assert objective.head.mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("progress", [0.001, 0.5, 1.0])
def test_after_step_moves_the_teacher_by_the_closed_form(progress):
    body = student()
    objective = dino(body, momentum=0.8)
    with torch.no_grad():
        for p in [*body.parameters(), *objective.head.parameters()]:
            p.add_(torch.randn_like(p))
    pairs = [(objective.teacher, body), (objective.teacher_head, objective.head)]
    before = [[p.clone() for p in teacher.parameters()] for teacher, _ in pairs]
    objective.after_step(body, progress)
    m = {0.001: 0.8, 0.5: 0.9, 1.0: 1.0}[progress]
    for (teacher, live), old in zip(pairs, before, strict=True):
        for now, was, target in zip(teacher.parameters(), old, live.parameters(), strict=True):
            assert torch.allclose(now, m * was + (1 - m) * target, atol=1e-4)
    assert float(objective.progress) == pytest.approx(progress)


def test_teacher_starts_as_the_student_and_normalises_by_its_batches_but_drops_nothing():
    body = student("test_resnet", drop_path_rate=0.5, drop_rate=0.5)
    objective = dino(body)
    mine, theirs = objective.teacher.state_dict(), body.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert {id(p) for p in objective.teacher.parameters()}.isdisjoint(map(id, body.parameters()))
    objective.train()
    norms = [m for m in objective.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all(m.training for m in norms)
    others = [m for m in objective.teacher.modules() if type(m).__name__ in ("Dropout", "DropPath")]
    assert others
    assert not any(m.training for m in others)
    assert not any(m.training for m in objective.eval().teacher.modules())


def test_finish_hands_on_the_teacher_to_plain_timm_however_often():
    body = student()
    objective = dino(body)
    objective.step(body.train(), normalise, batch(), torch.Generator())["loss"].backward()
    with torch.no_grad():
        for p in body.parameters():
            p.add_(torch.randn_like(p) / 10)
    objective.after_step(body, 0.3)
    objective.finish(body.model)
    once = {k: v.clone() for k, v in body.model.state_dict().items()}
    objective.finish(body.model)
    assert all(torch.equal(v, once[k]) for k, v in body.model.state_dict().items())
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    plain.load_state_dict(body.model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(Features(plain)(x), objective.eval().teacher(x), atol=1e-5)


@pytest.mark.parametrize(("size", "side"), [(32, 16), (64, 24), (224, 96), (16, 16), (12, 12)])
def test_local_side(size, side):
    assert local_side(size) == side


def test_a_student_of_a_fixed_size_gets_local_crops_of_that_size():
    body = student("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1)
    objective = dino(body)
    shapes = []
    body.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape[-1]))
    objective.step(body, normalise, batch(), torch.Generator())
    assert shapes == [32, 32]
    assert objective.flops(lambda s: 3.0 * s, lambda s: s, 32) == (2 + 2) * 96 + 64
    assert dino(student()).flops(lambda s: 3.0 * s, lambda s: s, 32) == 2 * 96 + 2 * 48 + 64


def test_without_local_crops_there_are_two():
    body = student()
    objective = dino(body, local_crops=0)
    found = objective.step(body, normalise, batch(), torch.Generator())
    assert math.isfinite(float(found["loss"].detach()))


def test_the_student_is_needed():
    with pytest.raises(ValueError, match="student"):
        Dino().setup(ObjectiveContext(3, 8, None, seed=0))


_STEPS = 30


def short_run(monkeypatch, centring):
    """Spread of the features of unseen images, and entropy of the prototypes that the teacher uses."""
    if not centring:
        monkeypatch.setattr(Dino, "_move_center", lambda self, target: None)
    body = student(output_stride=8)
    objective = dino(body, prototypes=64, momentum=0.9)
    trained = [p for m in (body, objective) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    used = []
    for step in range(_STEPS):
        found = objective.step(body.train(), normalise, batch(16, visit=step, first=16 * (step % 8)), torch.Generator())
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(body, (step + 1) / _STEPS)
        used.append(float(found["used_entropy"]))
    objective.finish(body.model)
    with torch.no_grad():
        features = body.eval()(normalise(textures(192)[128:, :, 4:36, 4:36]))
    std = torch.nn.functional.normalize(features, dim=1).std(0)
    return float(std.square().sum().sqrt()), float(np.mean(used[-10:]))


def test_a_short_run_does_not_collapse_and_does_without_centring(monkeypatch):
    spread, used = short_run(monkeypatch, centring=True)
    # A share of what unit vectors that point anywhere would have (1); constant features would have 0.
    assert spread > 0.3
    assert used > 0.8
    _, collapsed = short_run(monkeypatch, centring=False)
    assert collapsed < 0.2
