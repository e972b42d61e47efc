from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from ktray.data.labelled.masks import IGNORE
from ktray.errors import KtrayError
from ktray.models.maps import map_loss, resize_map
from ktray.models.teacher import map_head
from ktray.models.teacher.heads import fit_temperature
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.map_head import MapHead, fit_map_probe, fit_map_temperature, unit_levels
from ktray.models.teacher.map_teacher import MapTeacher
from ktray.models.teacher.teacher import Teacher

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def convnext() -> Teacher:
    return load_teacher("miniverse")


@pytest.fixture
def vit(tiny_vit: SimpleNamespace) -> Teacher:
    return load_teacher("timm:test_vit", checkpoint=tiny_vit.checkpoint, image_size=64)


@pytest.fixture
def clip(tiny_clip: SimpleNamespace) -> Teacher:
    return load_teacher("open_clip:own", checkpoint=tiny_clip.checkpoint, config=tiny_clip.config)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_levels_of_a_plain_transformer_are_its_last_blocks(vit, tiny_vit, batch):
    found = vit.patch_embeddings(batch, levels=4)
    assert vit.level_dims(4) == [64] * 4
    assert found.shape == (3, 256, 4, 4)
    model = timm.create_model("test_vit", img_size=64, num_classes=0)
    model.load_state_dict(vit.image_tower.state_dict())
    x = vit.preprocess.normalise(batch)
    with torch.no_grad():
        wanted = model.eval().get_intermediate_layers(x, n=4, norm=True, reshape=True)
        assert torch.allclose(found, torch.cat(wanted, 1), atol=1e-5)
        assert torch.allclose(found[:, -64:], vit.patch_embeddings(batch), atol=1e-6)


def test_levels_of_an_open_clip_transformer(clip, batch):
    found = clip.patch_embeddings(batch, levels=2)
    assert clip.level_dims(2) == [32, 32]
    assert found.shape == (3, 64, 4, 4)
    assert torch.allclose(found[:, 32:], clip.patch_embeddings(batch), atol=1e-6)
    assert not torch.allclose(found[:, :32], found[:, 32:], atol=1e-2)


def test_levels_of_stages_come_at_the_finest_ones_resolution(convnext, batch):
    small = batch[..., :32, :32]
    with torch.no_grad():
        found = convnext.patch_embeddings(small, levels=3)
        stages = convnext.image_tower.trunk.forward_intermediates(
            convnext.preprocess.normalise(small), norm=True, intermediates_only=True
        )
    assert convnext.level_dims(3) == [80, 160, 320]
    assert found.shape == (3, 560, 4, 4)
    parts = found.split([80, 160, 320], 1)
    assert torch.allclose(parts[0], stages[1], atol=1e-5)
    for part, stage in zip(parts[1:], stages[2:], strict=True):
        assert torch.allclose(part, F.interpolate(stage, (4, 4), mode="bilinear", align_corners=False), atol=1e-5)


@pytest.mark.parametrize("levels", [0, 7])
def test_levels_that_are_not_there(vit, batch, levels):
    with pytest.raises(KtrayError, match="has 6 maps"):
        vit.patch_embeddings(batch, levels)


def test_every_level_counts_the_same():
    x = torch.randn(2, 5, 3, 3)
    x[:, :2] *= 1000
    unit = unit_levels(x, [2, 3])
    assert torch.allclose(unit.norm(dim=1), torch.ones(2, 3, 3), atol=1e-5)
    assert torch.allclose(unit[:, :2].norm(dim=1), torch.full((2, 3, 3), 0.5**0.5), atol=1e-5)
    assert torch.allclose(unit[:, 2:] * 2**0.5, F.normalize(x[:, 2:], dim=1), atol=1e-6)


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (12, 6, 4, 4) and masks (12, 4, 4) that they tell imperfectly."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.randint(0, 3, (12, 4, 4), generator=generator)
    centres = torch.randn(3, 6, generator=generator)
    features = centres[masks].permute(0, 3, 1, 2) + torch.randn(12, 6, 4, 4, generator=generator)
    masks[0, :2] = IGNORE
    return features, masks.to(torch.uint8)


@pytest.mark.parametrize("chunk", [2**24, 3 * 16 * 5])
def test_probe_is_logistic_regression_of_pixels(pixels, chunk, monkeypatch):
    monkeypatch.setattr(map_head, "_CHUNK", chunk)
    features, masks = pixels
    l2 = 1e-2
    head = fit_map_probe(features, masks, 3, l2=[l2])
    keep = (masks != IGNORE).flatten()
    x = F.normalize(features, dim=1).permute(0, 2, 3, 1).flatten(0, 2)[keep].numpy()
    y = masks.flatten()[keep].numpy()
    reference = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=2000).fit(x, y)
    with torch.no_grad():
        found = head(features).permute(0, 2, 3, 1).flatten(0, 2)[keep].softmax(1).numpy()
    assert np.allclose(found, reference.predict_proba(x), atol=2e-3)
    assert np.allclose(head.weight.detach().numpy(), reference.coef_, atol=2e-2)


def test_probe_minimises_the_loss_of_upsampled_logits(pixels):
    features, masks = pixels
    fine = F.interpolate(masks[:, None].float(), (8, 8), mode="nearest")[:, 0].to(torch.uint8)
    head = fit_map_probe(features, fine, 3, l2=[1e-3])
    loss = map_loss(head(features), fine) + 1e-3 / 2 * head.weight.square().sum()
    loss.backward()
    assert head.weight.grad.abs().max() < 1e-4
    assert head.bias.grad.abs().max() < 1e-4


def test_probe_takes_the_strength_that_held_out_images_prefer(pixels):
    features, masks = pixels
    head = fit_map_probe(features[:6], masks[:6], 3, l2=(1e2, 1e-2, 1e-3), val=(features[6:], masks[6:]))
    assert head.l2 != 1e2
    assert head.scores[head.l2] == min(head.scores.values())
    apart = fit_map_probe(features, masks, 3)
    assert apart.l2 in apart.scores
    few = fit_map_probe(features[:3], masks[:3], 3, l2=(1e-1, 1e-2, 1e-3))
    assert few.scores == {}
    assert few.l2 == 1e-2


def test_probe_reads_halves_and_refuses_what_it_cannot_read(pixels):
    features, masks = pixels
    single = fit_map_probe(features, masks, 3, l2=[1e-2])
    assert torch.allclose(fit_map_probe(features.half(), masks, 3, l2=[1e-2]).weight, single.weight, atol=5e-2)
    with pytest.raises(KtrayError, match="no labelled pixels"):
        fit_map_probe(features, torch.full_like(masks, IGNORE), 3)
    with pytest.raises(KtrayError, match="not finite"):
        fit_map_probe(features / 0, masks, 3)


def test_temperature_is_that_of_all_labelled_pixels(pixels, monkeypatch):
    features, masks = pixels
    truth = F.one_hot(masks.long().clamp(max=2), 3).permute(0, 3, 1, 2)
    maps = 3 * truth + 4 * features[:, :3]
    keep = (masks != IGNORE).flatten()
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)[keep]
    wanted = fit_temperature(rows, masks.flatten()[keep].long())
    assert fit_map_temperature(maps, masks) == pytest.approx(wanted, rel=1e-3)
    monkeypatch.setattr(map_head, "_PIXELS", 60)
    assert fit_map_temperature(maps, masks) == fit_map_temperature(maps, masks) != pytest.approx(wanted, rel=1e-4)


def make(teacher: Teacher, levels: int = 3, **facts: object) -> MapTeacher:
    dims = teacher.level_dims(levels)
    generator = torch.Generator().manual_seed(1)
    head = MapHead(torch.randn(3, sum(dims), generator=generator), dims, torch.tensor([0.1, 0.2, 0.3]))
    return MapTeacher(teacher, head, NAMES, **facts)  # type: ignore[arg-type]


def test_maps_are_calibrated_logits_of_the_patch_embeddings(convnext, batch):
    teacher = make(convnext, temperature=2.0)
    with torch.no_grad():
        found = teacher.logits(batch)
        features = unit_levels(convnext.patch_embeddings(batch, 3), teacher.head.dims)
        wanted = torch.einsum("cd,ndhw->nchw", teacher.head.weight, features) + teacher.head.bias.view(1, 3, 1, 1)
        assert torch.allclose(found, wanted / 2, atol=1e-4)
        assert found.shape == (3, 3, 4, 4)
        assert torch.equal(teacher.embed(batch), convnext.embed(batch))
        assert torch.equal(teacher.logits(batch), found)


def test_saved_and_loaded_without_the_tower(convnext, batch, tmp_path: Path):
    teacher = make(convnext, temperature=1.5)
    teacher.save(tmp_path)
    assert (tmp_path / "dense_teacher.json").is_file()
    assert not (tmp_path / "tower.safetensors").exists()
    loaded = MapTeacher.load(tmp_path)
    assert loaded.classes == NAMES
    assert loaded.temperature == 1.5
    assert loaded.head.dims == teacher.head.dims
    with torch.no_grad():
        assert torch.equal(loaded.logits(batch), teacher.logits(batch))


def test_finetuning_moves_what_maps_need_and_is_saved(batch, tmp_path: Path):
    teacher = make(load_teacher("miniverse"), finetuned=True)
    before = {k: v.clone() for k, v in teacher.image_tower.state_dict().items()}
    groups = teacher.param_groups(0.8, 0.05, 5.0)
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in teacher.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": 0.1 * g["lr_scale"]} for g in groups])
    map_loss(teacher.logits(batch), torch.randint(0, 3, (3, 32, 32))).backward()
    assert all(p.grad is not None for g in groups for p in g["params"])
    optimizer.step()
    after = teacher.image_tower.state_dict()
    assert any(not torch.equal(before[k], v) for k, v in after.items())
    # What pools is no part of a map: it stays.
    assert all(torch.equal(before[k], after[k]) for k in after if k.startswith("head."))
    teacher.save(tmp_path)
    with torch.no_grad():
        assert torch.allclose(MapTeacher.load(tmp_path).logits(batch), teacher.eval().logits(batch), atol=1e-6)


def test_a_head_of_another_teacher_or_task_is_refused(convnext):
    dims = convnext.level_dims(2)
    with pytest.raises(KtrayError, match="widths"):
        MapTeacher(convnext, MapHead(torch.zeros(3, 10), [4, 6]), NAMES)
    with pytest.raises(KtrayError, match="2 classes"):
        MapTeacher(convnext, MapHead(torch.zeros(3, sum(dims)), dims), NAMES[:2])


def test_a_changed_base_or_a_folder_of_something_else_is_refused(convnext, tmp_path: Path):
    with pytest.raises(KtrayError, match="no segmentation teacher"):
        MapTeacher.load(tmp_path)
    teacher = make(convnext)
    teacher.base_fingerprint = "0" * 64
    teacher.save(tmp_path)
    with pytest.raises(KtrayError, match="not the one"):
        MapTeacher.load(tmp_path)


def test_a_probe_on_the_maps_finds_where_the_ink_is(convnext):
    """Dark images with a bright box: the probe must say where it is, not only that there is one."""
    rng = np.random.default_rng(0)
    masks = np.zeros((24, 32, 32), np.uint8)
    for mask in masks:
        x, y = rng.integers(0, 20, 2)
        mask[y : y + 12, x : x + 12] = 1
    images = torch.from_numpy((masks * 200 + 30)[:, None].repeat(3, 1))
    with torch.no_grad():
        features = convnext.patch_embeddings(images, 4)
    labels = torch.from_numpy(masks)
    head = fit_map_probe(features[:16], labels[:16], 2, convnext.level_dims(4), l2=[1e-4])
    with torch.no_grad():
        guess = resize_map(head(features[16:]), (32, 32)).argmax(1)
    iou = ((guess == 1) & (labels[16:] == 1)).sum() / ((guess == 1) | (labels[16:] == 1)).sum()
    assert iou > 0.6
