from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ktray.errors import KtrayError
from ktray.models.teacher.families import miniverse
from ktray.models.teacher.load import build_teacher, load_teacher, teacher_fingerprint
from ktray.models.teacher.spec import COMPARED, cosine_to_float32, embed_numpy
from ktray.models.teacher.teacher import TeacherSource, float32_products
from ktray.models.weights import fetch
from ktray.storage.store import Dir


def clip_teacher(tiny: SimpleNamespace, **kwargs):
    return load_teacher("open_clip:mine", checkpoint=tiny.checkpoint, config=tiny.config, **kwargs)


def test_open_clip_embeds_as_open_clip_does(tiny_clip: SimpleNamespace, photo: np.ndarray) -> None:
    teacher = clip_teacher(tiny_clip)
    assert not teacher.training
    pixels = torch.from_numpy(teacher.preprocess.eval_transform(photo))[None]
    with torch.inference_mode():
        expected = tiny_clip.model.encode_image(tiny_clip.transform(Image.fromarray(photo))[None])
        texts = ["a red letter", "nothing"]
        expected_text = tiny_clip.model.encode_text(tiny_clip.tokenizer(texts), normalize=True)
        torch.testing.assert_close(teacher.embed(pixels), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(teacher.encode_text(texts), expected_text, atol=1e-6, rtol=1e-5)
    assert expected.std() > 0.01
    assert teacher.embed_dim == 24
    assert teacher.logit_scale == pytest.approx(tiny_clip.model.logit_scale.exp().item())


def test_a_rounded_teacher_is_compared_with_float32_on_its_first_images(
    tiny_vit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher("timm:test_vit", checkpoint=tiny_vit.checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, *teacher.preprocess.size), dtype=np.uint8)
    exact = embed_numpy(teacher, pixels, 20)
    assert len(cosine_to_float32(teacher, pixels, exact)) == 0, "on a CPU, products are in float32"
    monkeypatch.setattr("ktray.models.teacher.teacher.products_on", lambda gpu: "bf16")  # as on a GPU
    rounded = embed_numpy(teacher, pixels, 20)
    with float32_products():
        np.testing.assert_allclose(embed_numpy(teacher, pixels, 20), exact, rtol=1e-5, atol=1e-6)
    dot = (rounded * exact).sum(1, dtype=np.float64)
    expected = dot / (np.linalg.norm(rounded, axis=1) * np.linalg.norm(exact, axis=1))
    found = [cosine_to_float32(teacher, pixels, rounded) for _ in range(3)]
    assert [len(some) for some in found] == [20, COMPARED - 20, 0]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert 0.99 < found[0].mean() < 0.999999


def test_text_can_be_dropped(tiny_clip: SimpleNamespace) -> None:
    teacher = clip_teacher(tiny_clip)
    assert teacher.has_text
    teacher.drop_text()
    assert not teacher.has_text
    assert all(name.startswith("image_tower.") for name, _ in teacher.named_parameters())
    with pytest.raises(KtrayError, match="no text tower"):
        teacher.encode_text(["x"])


def test_timm_embeds_as_timm_does(tiny_vit: SimpleNamespace, photo: np.ndarray) -> None:
    teacher = load_teacher("timm:test_vit", checkpoint=tiny_vit.checkpoint)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(tiny_vit.model))
    pixels = torch.from_numpy(teacher.preprocess.eval_transform(photo))[None]
    with torch.inference_mode():
        x = theirs(Image.fromarray(photo))[None]
        features = tiny_vit.model.forward_features(x)
        expected = tiny_vit.model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(teacher.embed(pixels), expected, atol=1e-5, rtol=1e-4)
        patches = teacher.patch_embeddings(pixels)
    assert (teacher.embed_dim, teacher.has_text) == (expected.shape[1], False)
    grid = tiny_vit.model.patch_embed.grid_size
    assert patches.shape == (1, teacher.patch_dim, *grid)
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), features[:, 1:], atol=1e-5, rtol=1e-4)


def test_open_clip_patches_have_the_declared_width(tiny_clip: SimpleNamespace) -> None:
    teacher = clip_teacher(tiny_clip)
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert teacher.patch_embeddings(batch).shape == (2, 32, 4, 4)


@pytest.mark.parametrize(
    "name", ["open_clip:coca_ViT-B-32", "open_clip:convnext_base", "timm:fastvit_mci0", "timm:mobilenetv3_small_050"]
)
def test_widths_are_as_declared(name: str) -> None:
    teacher = build_teacher(TeacherSource(name, checkpoint="unused"), device="meta")
    batch = torch.zeros(2, 3, *teacher.preprocess.size, dtype=torch.uint8, device="meta")
    assert teacher.embed(batch).shape == (2, teacher.embed_dim)
    assert teacher.patch_embeddings(batch).shape[:2] == (2, teacher.patch_dim)


def test_a_tower_without_patches_says_so() -> None:
    teacher = build_teacher(TeacherSource("open_clip:RN50", checkpoint="unused"), device="meta")
    assert teacher.patch_dim is None
    with pytest.raises(KtrayError, match="no patch embeddings"):
        teacher.patch_embeddings(torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"))


def test_another_image_size_resamples_the_position_embeddings(
    tiny_clip: SimpleNamespace, tiny_vit: SimpleNamespace
) -> None:
    batch = torch.randint(0, 256, (2, 3, 50, 50), dtype=torch.uint8)
    clip = clip_teacher(tiny_clip, image_size=48)
    assert clip.image_tower.positional_embedding.shape[0] == 1 + 6 * 6
    vit = load_teacher("timm:test_vit", checkpoint=tiny_vit.checkpoint, image_size=64)
    for teacher in (clip, vit):
        assert teacher.preprocess.size in {(48, 48), (64, 64)}
        assert torch.isfinite(teacher.embed(batch)).all()
    with pytest.raises(KtrayError, match=r"Teacher 'timm:test_vit' cannot"):
        load_teacher("timm:test_vit", checkpoint=tiny_vit.checkpoint, image_size=50)


def test_timm_towers_inside_open_clip_load_and_resize(tmp_path: Path) -> None:
    config = json.loads(json.dumps({**tiny_timm_config()}))
    (tmp_path / "hybrid.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "hybrid.json")
    model = open_clip.create_model("hybrid", load_weights=False)
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    for size in (None, 96):
        teacher = load_teacher(
            "open_clip:hybrid", str(tmp_path / "w.safetensors"), str(tmp_path / "hybrid.json"), image_size=size
        )
        batch = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        assert teacher.embed(batch).shape == (1, 16)
        assert teacher.preprocess.size == (size or 160,) * 2
        count = sum(p.numel() for p in teacher.image_tower.parameters())
        assert sum(p.numel() for layer in teacher.blocks() for _, p in layer) == count


def tiny_timm_config() -> dict:
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}


def test_a_published_folders_config_brings_its_preprocessing(tiny_clip: SimpleNamespace, tmp_path: Path) -> None:
    both = {
        "model_cfg": json.loads(Path(tiny_clip.config).read_text()),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    }
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(both))
    p = load_teacher("open_clip:mine", tiny_clip.checkpoint, str(path)).preprocess
    assert (p.mean, p.std, p.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


def test_a_config_does_not_shadow_a_built_in_model(tiny_clip: SimpleNamespace) -> None:
    load_teacher("open_clip:ViT-B-32", tiny_clip.checkpoint, tiny_clip.config)
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512


def test_miniverse_is_the_open_clip_path(
    tiny_clip: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "miniverse.json").write_text(Path(tiny_clip.config).read_text())
    (tmp_path / "model.safetensors").write_bytes(Path(tiny_clip.checkpoint).read_bytes())
    monkeypatch.setattr(miniverse, "FOLDER", tmp_path)
    short = load_teacher("miniverse")
    long = load_teacher("open_clip:miniverse", str(tmp_path / "model.safetensors"), str(tmp_path / "miniverse.json"))
    assert short.fingerprint == long.fingerprint
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(short.embed(batch), long.embed(batch))


def test_fingerprint_follows_weights_config_and_size(tiny_clip: SimpleNamespace, tmp_path: Path) -> None:
    base = teacher_fingerprint("open_clip:a", tiny_clip.checkpoint, tiny_clip.config)
    assert clip_teacher(tiny_clip).fingerprint == base
    state = load_file(tiny_clip.checkpoint)
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(Path(tiny_clip.checkpoint).read_bytes())
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, str(other))
    config = json.loads(Path(tiny_clip.config).read_text())
    assert teacher_fingerprint("open_clip:a", str(copy), config) == base
    config["text_cfg"]["heads"] = 4
    changed = [
        teacher_fingerprint("open_clip:a", str(other), tiny_clip.config),
        teacher_fingerprint("open_clip:a", str(copy), config),
        teacher_fingerprint("open_clip:a", str(copy), tiny_clip.config, image_size=64),
    ]
    assert len({base, *changed}) == 4


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("open_clip:ViT-B-23", "ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b_b97k", "laion2b_s34b_b79k"),
        ("timm:vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("timm:vit_small_patch14_dinov2.lvd124m", "lvd142m"),
        ("clip", "open_clip:<model>"),
        ("open_clip:", "open_clip:<model>"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(KtrayError) as caught:
        load_teacher(name, checkpoint="w.pt")
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "timm:test_vit4"])
def test_random_weights_are_never_used_silently(name: str) -> None:
    with pytest.raises(KtrayError, match=r"teacher.checkpoint=FILE.*miniverse"):
        load_teacher(name)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    monkeypatch.setattr("open_clip.factory.CLIP", None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    for name in ("open_clip:ViT-B-32/laion2b_s34b_b79k", "timm:test_vit"):
        with pytest.raises(
            KtrayError, match=r"network or hub is not available.*teacher.checkpoint=FILE.*teacher.name=miniverse"
        ):
            load_teacher(name)


def test_files_that_are_missing_or_do_not_fit(tiny_clip: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match="no file"):
        load_teacher("open_clip:mine", str(tmp_path / "none.pt"), tiny_clip.config)
    with pytest.raises(KtrayError, match=r"no file.*teacher.config"):
        load_teacher("open_clip:mine", tiny_clip.checkpoint, str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"embed_dim": 3}')
    with pytest.raises(KtrayError, match="not an open_clip model config"):
        load_teacher("open_clip:mine", tiny_clip.checkpoint, str(tmp_path / "bad.json"))

    state = load_file(tiny_clip.checkpoint)
    lacking = {k: v for k, v in state.items() if "ln_post" not in k} | {"extra.weight": torch.zeros(1)}
    save_file(lacking, str(tmp_path / "lacking.safetensors"))
    with pytest.raises(KtrayError, match=r"2 missing \(visual.ln_post.weight, visual.ln_post.bias\).*extra.weight"):
        load_teacher("open_clip:mine", str(tmp_path / "lacking.safetensors"), tiny_clip.config)
    wrong = {**state, "visual.proj": torch.zeros(32, 25)}
    save_file(wrong, str(tmp_path / "wrong.safetensors"))
    with pytest.raises(KtrayError, match=r"different shapes.*visual.proj"):
        load_teacher("open_clip:mine", str(tmp_path / "wrong.safetensors"), tiny_clip.config)
    (tmp_path / "cut.safetensors").write_bytes(Path(tiny_clip.checkpoint).read_bytes()[:500])
    with pytest.raises(KtrayError, match="cannot be read as weights"):
        load_teacher("open_clip:mine", str(tmp_path / "cut.safetensors"), tiny_clip.config)


def test_timm_weights_that_do_not_fit(tiny_vit: SimpleNamespace, tmp_path: Path) -> None:
    state = tiny_vit.model.state_dict()
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in state.items() if "blocks.0" not in k}, path)
    with pytest.raises(KtrayError, match=r"missing \(blocks.0") as caught:
        load_teacher("timm:test_vit", str(path))
    assert caught.value.what.count("blocks.0") == 3
    torch.save({**state, "cls_token": torch.zeros(1, 1, 7)}, path)
    with pytest.raises(KtrayError, match=r"cls_token \(1, 1, 7\) instead of"):
        load_teacher("timm:test_vit", str(path))
    torch.save([1, 2], path)
    with pytest.raises(KtrayError, match="not contain a state dict"):
        load_teacher("timm:test_vit", str(path))


def test_checkpoints_of_training_scripts_are_unwrapped(tiny_vit: SimpleNamespace, tmp_path: Path) -> None:
    wrapped = {f"module.{k}": v for k, v in tiny_vit.model.state_dict().items()}
    path = tmp_path / "w.pt"
    torch.save({"epoch": 3, "model": wrapped}, path)
    teacher = load_teacher("timm:test_vit", str(path))
    assert torch.equal(teacher.image_tower.cls_token, tiny_vit.model.cls_token)


def test_a_checkpoint_on_s3_is_fetched_through_a_store_that_is_busy(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = bytes(range(256)) * 100_000
    Dir(s3.home).write("weights.pt", data)
    s3.first(3, "503", "GET")
    got = fetch(f"{s3.home}/weights.pt")
    assert got.read_bytes() == data
    assert list(got.parent.iterdir()) == [got], "it left something half"


def test_uris_are_fetched_once(tiny_vit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = Path(tiny_vit.checkpoint).as_uri()
    first = load_teacher("timm:test_vit", uri)
    [copy] = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    before = copy.stat().st_mtime_ns
    assert load_teacher("timm:test_vit", uri).fingerprint == first.fingerprint
    assert first.fingerprint == teacher_fingerprint("timm:test_vit", tiny_vit.checkpoint)
    assert copy.stat().st_mtime_ns == before
    with pytest.raises(KtrayError, match="no file"):
        load_teacher("timm:test_vit", uri + ".gone")
    with pytest.raises(KtrayError, match="cannot be fetched"):
        load_teacher("timm:test_vit", "nowhere://bucket/key")
