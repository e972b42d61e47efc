"""The three ways to the same rows: stored, made by teachers beside the training, or by a teacher in it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ktray.data.views import ViewPolicy
from ktray.distributed.device_work import in_this_process
from ktray.errors import KtrayError
from ktray.models.student.classifier import build_student
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.spec import AdaptedSpec
from ktray.objectives.oriented import Oriented
from ktray.recipe.schema import TrainConfig
from ktray.stages.teach.shards import CheckTargets, ListImages, WithTeacher, sample
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Dir, Store
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Predict
from ktray.training.card_rows import CardRows, fits
from ktray.training.inputs import TargetSet
from ktray.training.messages import BadImages, TeacherFlops
from ktray.training.worker import WorkerContext

CLASSES, VIEWS, SIDE, BATCH = ["a", "b", "c"], 2, 24, 6
TARGETS = ("embedding", "logits")
MODES = ("cached", "streamed", "live")


def both(work):
    """Both parts of a device's work, in this process."""
    return in_this_process(work, work.model.load())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, an adapted teacher, and a directory of TEACH with both stored rows and lists."""
    root = tmp_path_factory.mktemp("taught")
    uris = []
    for i in range(10):
        y, x = np.mgrid[:40, :48]
        rng = np.random.default_rng(i)
        pixels = 128 + 90 * np.sin(x[..., None] / rng.uniform(2, 9, 3) + y[..., None] / rng.uniform(2, 9, 3))
        path = root / f"{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        uris.append(str(path))
    teacher = load_teacher("miniverse")
    torch.manual_seed(0)
    head = LinearHead(torch.randn(len(CLASSES), teacher.embed_dim), torch.zeros(len(CLASSES)))
    AdaptedTeacher(teacher, head, CLASSES, temperature=0.1).save(root / "adapted")
    stage = Store(str(root / "store")).stage("teach", "0123456789abcdef")
    spec = AdaptedSpec(Dir(str(root / "adapted")), teacher.preprocess)
    cut = MakeViews(ViewPolicy(), VIEWS, 0, 32, 10**6, None)
    predict = Predict(spec, TARGETS, SIDE, 0, batch=4)
    items = [
        {"name": f"shard-{i}.parquet", "uris": uris[a:b], "beside": {}}
        for i, (a, b) in enumerate([(0, 4), (4, 5), (5, 10)])
    ]
    finish = both(WithTeacher(stage, predict))
    rows = {}
    for item in items:
        rows[item["name"]] = finish(item, cut(item))["rows"]
        assert ListImages(stage, VIEWS)(item) == rows[item["name"]]
    return stage, items, rows, cut, predict


def taught(world, mode, stage=None):
    made, _, rows, cut, predict = world
    known = {} if mode == "cached" else {"cut": cut, "predict": predict}
    size = 3 * SIDE**2
    return TargetSet(stage or made, tuple(rows.items()), size, TARGETS, mode, views=VIEWS, **known)


def batches(source, part, rank=0, of=1, start=0, stop=9, report=lambda values: None):
    env = WorkerContext(torch.device("cpu"), rank, of, 0.5, report=report)
    teacher = source.teacher()
    for batch in source.batches(part, env, BATCH, 7, start, stop):
        yield {**batch, **teacher(batch["pixels"])} if teacher else batch


RESIDENT = TrainConfig(resident_bytes=1 << 30)
STREAMING = TrainConfig(resident_bytes=0, window_bytes=8 * 3 * SIDE**2)


def test_a_sample_of_the_targets_is_spread_over_the_set_and_always_the_same(world, monkeypatch):
    stage, items, _, _, _ = world
    source = taught(world, "cached")
    every = np.concatenate([read_rows(stage, item["name"], ["embedding"])["embedding"] for item in items])
    assert every.shape[0] == 20
    assert torch.equal(source.sample("embedding"), torch.from_numpy(every.astype(np.float32)))
    assert torch.equal(source.sample("embedding", rows=7), torch.from_numpy(every[::3].astype(np.float32)))
    monkeypatch.setattr("ktray.training.inputs._SAMPLED_SHARDS", 2)
    ends = np.concatenate([every[:8], every[10:]])  # the first and the last of three shards
    assert torch.equal(source.sample("embedding"), torch.from_numpy(ends.astype(np.float32)))


@pytest.mark.parametrize("mode", ["streamed", "live"])
def test_a_sample_needs_stored_targets(world, mode):
    with pytest.raises(KtrayError, match=f"teach.mode={mode} stores none") as caught:
        taught(world, mode).sample("embedding")
    assert "teach.mode=cached" in caught.value.remedy


@pytest.mark.parametrize(("mode", "weight", "of"), [("cached", "confidence", 2), ("streamed", "none", 1)])
def test_batches_that_a_device_gathers_are_those_of_the_host(cluster, world, monkeypatch, mode, weight, of):
    """As on a GPU, where the set stays on the card."""
    source = replace(taught(world, mode), weight=weight)
    made = []

    class Seen(CardRows):
        def __init__(self, device):
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr("ktray.training.inputs.CardRows", Seen)
    for rank in range(of):
        expected = list(batches(source, RESIDENT, rank, of))
        assert not made, "nothing stays on a CPU"
        with monkeypatch.context() as patch:
            patch.setattr("ktray.training.inputs.fits", lambda device, size: True)
            found = list(batches(source, RESIDENT, rank, of))
        (card,) = made
        made.clear()
        assert {len(column) for column in card.columns.values()} == {20 // of}
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys()
            for name, value in b.items():
                assert torch.equal(a[name], value), name


@pytest.mark.gpu
def test_a_real_gpu_gathers_the_batches_of_the_host(cluster, world):
    source, found = taught(world, "cached"), []
    expected = list(batches(source, RESIDENT))
    env = WorkerContext(torch.device("cuda"), 0, 1, 0.5)
    for batch in source.batches(RESIDENT, env, BATCH, 7, 0, 9):
        assert batch["pixels"].is_cuda
        found.append({name: value.cpu() for name, value in batch.items()})
    for a, b in zip(found, expected, strict=True):
        for name, value in b.items():
            assert torch.equal(a[name], value), name


def test_a_set_that_is_streamed_or_too_large_does_not_stay_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 80))
    assert fits(torch.device("cuda"), 2)
    assert not fits(torch.device("cuda"), 3)
    assert not fits(torch.device("cpu"), 10)


@pytest.mark.parametrize("mode", ["streamed", "live"])
@pytest.mark.parametrize(("part", "of"), [(RESIDENT, 1), (STREAMING, 2)])
def test_all_modes_give_the_same_loss_on_the_same_views(cluster, world, mode, part, of):
    student = build_student("test_resnet", {}, len(CLASSES), SIDE)
    student.model.eval()
    objective, generator = Oriented(), torch.Generator().manual_seed(0)
    for rank in range(of):
        stored = list(batches(taught(world, "cached"), part, rank, of))
        made = list(batches(taught(world, mode), part, rank, of))
        assert len(stored) == len(made) == 9
        for a, b in zip(stored, made, strict=True):
            assert a.keys() == b.keys()
            assert torch.equal(a["pixels"], b["pixels"])
            assert torch.equal(a["view_key"], b["view_key"])
            for name in TARGETS:
                assert a[name].dtype == torch.float16
                torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-3)
            with torch.no_grad():
                losses = [objective.step(student.model, student.preprocess.scale, x, generator)["loss"] for x in (a, b)]
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_all_modes_give_the_same_predictions_where_few_are_kept(cluster, world, tmp_path):
    """The largest of three logits, and one value for the other two."""
    _, items, rows, cut, dense = world
    few = replace(dense, targets=("logits",), top_k=1)
    made = Store(str(tmp_path)).stage("teach", "00000000000000aa")
    for item in items:
        both(WithTeacher(made, few))(item, cut(item))
        ListImages(made, VIEWS)(item)
        assert min(f["cosine"] for f in [both(CheckTargets(made, few))(item, cut(item))]) > 0.99999
        assert "logits" not in read_rows(made, item["name"])

    def source(mode):
        how = (None, None) if mode == "cached" else (cut, few)
        return TargetSet(
            made, tuple(rows.items()), 3 * SIDE**2, ("logits",), mode, *how, classes=len(CLASSES), views=VIEWS
        )

    full = list(batches(taught(world, "cached"), RESIDENT))
    for mode in MODES:
        for batch, whole in zip(batches(source(mode), RESIDENT), full, strict=True):
            assert torch.equal(batch["pixels"], whole["pixels"])
            assert batch["logits"].shape == whole["logits"].shape
            probabilities, expected = (x["logits"].float().softmax(1) for x in (batch, whole))
            torch.testing.assert_close(probabilities.amax(1), expected.amax(1), rtol=4e-3, atol=4e-3)
            others = probabilities.sort(1).values[:, :2]
            torch.testing.assert_close(others[:, 0], others[:, 1])


@pytest.mark.parametrize("part", [RESIDENT, STREAMING])
def test_views_that_are_stored_as_jpeg_have_the_same_targets(cluster, world, tmp_path, part):
    _, items, rows, cut, predict = world
    made = Store(str(tmp_path)).stage("teach", "00000000000000bb")
    for item in items:
        both(WithTeacher(made, predict, 95))(item, cut(item))
        assert both(CheckTargets(made, predict))(item, cut(item))["cosine"] > 0.99999
    source = TargetSet(made, tuple(rows.items()), 3 * SIDE**2, TARGETS, jpeg=True, views=VIEWS)
    for a, b in zip(batches(source, part), batches(taught(world, "cached"), part), strict=True):
        assert torch.equal(a["view_key"], b["view_key"])
        assert torch.equal(a["logits"], b["logits"])
        assert a["pixels"].shape == b["pixels"].shape
        assert 0 < (a["pixels"].float() - b["pixels"].float()).abs().mean() < 4


@pytest.mark.parametrize("mode", MODES)
def test_a_restart_goes_on_with_the_batches_that_were_next(cluster, world, mode):
    whole = list(batches(taught(world, mode), STREAMING))
    later = list(batches(taught(world, mode), STREAMING, start=5))
    for a, b in zip(whole[5:], later, strict=True):
        assert torch.equal(a["view_key"], b["view_key"])
        assert torch.equal(a["pixels"], b["pixels"])


@pytest.mark.parametrize("mode", ["streamed", "live"])
def test_an_image_that_is_gone_is_told_once_and_others_stand_in(cluster, world, tmp_path, mode):
    _, items, _, _, predict = world
    gone = str(tmp_path / "gone.png")
    other = Store(str(tmp_path)).stage("teach", "fedcba9876543210")
    for number, item in enumerate(items):
        uris = [*item["uris"][:-1], gone] if number == 2 else item["uris"]
        ListImages(other, VIEWS)({**item, "uris": uris})
    told = []
    found = list(batches(taught(world, mode, other), STREAMING, report=told.append))
    assert len(found) == 9
    bad = [pair for message in told if isinstance(message, BadImages) for pair in message.images]
    assert [uri for uri, _ in bad] == [gone]
    asked = sum(message.flops for message in told if isinstance(message, TeacherFlops))
    if mode == "streamed":  # two passes of 20 views and a part of the third are ahead of 54 that were used
        one = predict.load().flops
        assert 54 * one <= asked <= 80 * one
    else:
        assert asked == 0


def test_what_is_stored_is_compared_with_the_live_teacher(world, tmp_path):
    stage, items, rows, cut, predict = world
    finish = both(CheckTargets(stage, predict))
    some = sample(items, rows)
    assert [len(item["uris"]) for item in some] == [2, 2]  # four of ten, in the first and the last shard
    found = [finish(item, cut(item)) for item in some]
    assert sum(f["checked"] for f in found) == VIEWS * 4
    assert min(f["cosine"] for f in found) > 0.99999


def test_what_is_stored_in_bf16_is_also_compared_with_float32(world, tmp_path, monkeypatch):
    """As on a GPU."""
    _, items, rows, cut, predict = world
    (some, *_) = sample(items, rows)
    assert both(CheckTargets(world[0], predict))(some, cut(some))["to_float32"] is None
    monkeypatch.setattr("ktray.models.teacher.teacher.products_on", lambda gpu: "bf16")
    made = Store(str(tmp_path)).stage("teach", "00000000000000cc")
    both(WithTeacher(made, predict))(some, cut(some))
    found = both(CheckTargets(made, predict))(some, cut(some))
    assert found["cosine"] > 0.9999
    assert 0.99 < found["to_float32"] < found["cosine"]
    assert found["flops"] == 2 * predict.load().flops * found["checked"]


@pytest.mark.parametrize("what", ["another view", "nan", "lost"])
def test_a_wrong_cache_is_named(world, tmp_path, what):
    stage, items, _, cut, predict = world
    hurt = Store(str(tmp_path)).stage("teach", "00000000000000ff")
    name = items[0]["name"]
    columns = dict(read_rows(stage, name))
    if what == "another view":  # the outputs of an image's first view for its second
        columns["embedding"] = columns["embedding"][np.arange(len(columns["embedding"])) // VIEWS * VIEWS]
    elif what == "nan":
        columns["logits"] = np.full_like(columns["logits"], np.nan)
    else:
        columns = {k: v[VIEWS:] for k, v in columns.items()}
    write_rows(hurt, name, columns)
    expected = {
        "another view": "stored embedding of view 1 of",
        "nan": "stored logits of view 0",
        "lost": "view 0 of .* is missing in the stored targets",
    }
    with pytest.raises(KtrayError, match=expected[what]) as told:
        both(CheckTargets(hurt, predict))(items[0], cut(items[0]))
    assert name in str(told.value)
    assert hurt.uri in str(told.value)


def test_lists_hold_what_goes_along(world, tmp_path):
    stage = Store(str(tmp_path)).stage("teach", "00000000000000aa")
    item = {"name": "s.parquet", "uris": ["a", "b"], "beside": {"label": [3, 4]}}
    ListImages(stage, 3)(item)
    (path,) = tmp_path.rglob("*.images")
    assert json.loads(path.read_text()) == {"uris": ["a", "b"], "beside": {"label": [3, 4]}}
