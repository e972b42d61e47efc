"""Every way of pretraining through the whole job on a small world: what it runs, stores, costs and leaves."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
from heard import heard
from safetensors.torch import load_file
from small_task import SMALL, write_captioned, write_generic, write_task

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.compare.costs import by_stage
from ktray.pipeline.plan import this_machine
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import run
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage, Store


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_task(root / "task")
    write_captioned(root / "gallery.tar")
    write_generic(root / "generic")
    return root


def keys(world, *overrides):
    data = [f"store={world / 'store'}", f"task.data={world / 'task'}", f"gallery.data={world / 'gallery.tar'}"]
    more = [f"supervised.data={world / 'generic'}", "train.steps=12", "baselines.scratch=false", *overrides]
    return recipes.load(None, [*SMALL, *data, *more])


WAYS = {
    "dual": ["objective.name=dual"],
    "agnostic with patches": ["objective.name=agnostic", "objective.patches=1", "transfer.source=generic"],
    "oriented features": ["objective.name=oriented_features", "objective.mixup=0.2"],
    "mtkd": ["objective.name=mtkd"],
    "specmatch": ["objective.name=specmatch", "objective.warmup=0.5"],
    "consistency": ["objective.name=consistency", "objective.threshold=0.5"],
    "dual, balanced": ["objective.name=dual", "objective.balance=gradients"],
    "agnostic, then oriented": ["objective.name=agnostic_then_oriented"],
    "clip": ["objective.name=clip"],
    "supervised": ["objective.name=supervised"],
    "dino": ["objective.name=dino", "objective.prototypes=64"],
    "dino on what the task has": ["objective.name=dino", "objective.prototypes=64", "transfer.source=target"],
}


@pytest.fixture(scope="module", params=WAYS)
def way(request, world):
    chosen = keys(world, *WAYS[request.param])
    lines: list[str] = []
    return request.param, chosen, heard(lines, run, chosen), lines


def manifest(world, result, name, which=0):
    found = [s["key"] for s in result["stages"] if s["name"] == name]
    return Stage(str(world / "store" / "stages" / name / found[which])).manifest()


def test_the_student_is_plain_timm_and_the_accounts_are_those_of_the_plan(way, world):
    _, chosen, result, _ = way
    folder = world / "store" / "runs" / result["run_id"] / "student"
    model = timm.create_model("test_resnet", num_classes=3, output_stride=16)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 3
    planned = {line.stage: line.flops for line in lines(resolve(chosen, this_machine(chosen)))}
    spent = by_stage(Store(chosen.store), result)
    assert spent["transfer"] == pytest.approx(planned["transfer"], rel=0.02)
    assert spent["teach"] == pytest.approx(planned["teach"], rel=0.05)
    for stage in ("adapt", "index", "teach"):
        assert (spent.get(stage, 0) > 0) == (planned.get(stage, 0) > 0), stage
    assert spent.get("finetune", 0) == pytest.approx(planned.get("finetune", 0.0), rel=0.02)
    assert sum(spent.values()) == pytest.approx(result["cost"]["without_cache"]["flops"])


def test_who_needs_no_teacher_pays_for_none(way):
    name, chosen, result, _ = way
    alone = name in ("clip", "supervised", "consistency") or name.startswith("dino")
    assert (result["teacher"] is None) == alone
    assert ("teacher_metric" in result) != alone
    spent = by_stage(Store(chosen.store), result)
    assert (sum(spent.get(stage, 0) for stage in ("adapt", "index", "teach")) == 0) == alone


def test_what_the_objective_needs_is_stored(way, world):
    name, _, result, lines = way
    taught = manifest(world, result, "teach")
    curated = manifest(world, result, "curate")
    stage = Stage(str(world / "store" / "stages" / "teach" / taught["key"]))
    rows = read_rows(stage, taught["shards"][0][0])
    if name.startswith("dual"):
        assert taught["targets"] == ["logits"]
        assert not any(s["name"] == "finetune" for s in result["stages"])
        assert any("finetune.steps=0" in line for line in lines)
    elif name == "clip":
        # The image without a caption is not drawn; the tokens of a caption end with the highest number.
        assert curated["kept"] == 60
        assert rows["text"].max() == taught["vocabulary"] - 1
        assert (rows["text"].max(1) == taught["vocabulary"] - 1).all()
        assert taught["text_length"] == rows["text"].shape[1]
    elif name == "supervised":
        assert taught["source_classes"] == 4
        named = {
            row["uri"]: row["label"]
            for row in pq.read_table(stage_file(world, curated, "transfer.parquet")).to_pylist()
        }
        order = ["cross", "disc", "noise", "plain"]
        assert all(order[label] in uri for uri, label in named.items())
        assert [named[uri] for uri in rows["uri"]] == rows["label"].tolist()
    elif name == "oriented features":
        assert taught["targets"] == ["embedding", "logits"]
        assert rows["embedding"].shape[1] == taught["embed_dim"]
    elif name in ("mtkd", "specmatch"):
        assert taught["targets"] == [{"mtkd": "logits", "specmatch": "embedding"}[name]]
    elif name == "consistency":
        assert taught["targets"] == []
        assert rows["view_index"].max() == 0
        assert not any(s["name"] == "finetune" for s in result["stages"])
    elif name.startswith("dino"):
        assert taught["targets"] == []
        assert rows["view_index"].max() == 0
        assert rows["pixels"].shape[2] >= 32
    elif name == "agnostic with patches":
        assert rows["patch_embedding"].shape[1:] == (taught["patch_dim"], 2, 2)
        assert len(set(rows["view_id"].tolist())) == len(rows["view_id"])
    else:
        phases = [s for s in result["stages"] if s["name"] == "transfer"]
        assert len(phases) == 2
        assert [manifest(world, result, "transfer", i)["steps"] for i in (0, 1)] == [6, 6]


def stage_file(world, found, name):
    return world / "store" / "stages" / found["stage"] / found["key"] / name


def test_a_way_that_the_data_cannot_feed_says_what_to_set(world):
    for overrides, word in (
        (["objective.name=supervised", "supervised.data=null"], "supervised.data"),
        (["objective.name=supervised", "transfer.source=retrieved"], "transfer.source"),
        (["objective.name=clip", "transfer.source=target"], "gallery.data"),
        (["objective.name=dino", "finetune.steps=0"], "finetune.steps"),
        (["objective.name=agnostic_then_oriented", "transfer.source=target"], "gallery.data"),
    ):
        with pytest.raises(KtrayError) as caught:
            resolve(keys(world, *overrides), this_machine(recipes.Recipe()))
        assert word in caught.value.remedy


def test_captions_are_asked_for_before_they_are_missed(world, tmp_path):
    from small_task import write_gallery

    bare = write_gallery(tmp_path / "bare", 30)
    with pytest.raises(KtrayError, match="caption"):
        run(keys(world, "objective.name=clip", f"gallery.data={bare}", "transfer.size=10"))


def test_a_copy_of_a_held_out_image_is_dropped_without_a_teacher_too(world, tmp_path):
    from shutil import copy

    from PIL import Image, ImageOps
    from small_task import write_gallery

    gallery = write_gallery(tmp_path / "gallery", 30)
    test = sorted((world / "task" / "test").rglob("*.png"))
    copy(test[0], gallery / "copy.png")
    Image.open(test[20]).convert("RGB").save(gallery / "again.jpg", quality=80)
    ImageOps.mirror(Image.open(test[40]).convert("RGB")).save(gallery / "mirror.jpg", quality=90)
    chosen = keys(
        world, "objective.name=dino", "objective.prototypes=64", f"gallery.data={gallery}", "transfer.size=25"
    )
    result = run(chosen)
    found = manifest(world, result, "curate")
    dropped = pq.read_table(stage_file(world, found, "dropped.parquet")).to_pylist()
    assert {"copy.png", "again.jpg", "mirror.jpg"} <= {row["uri"].rpartition("/")[2] for row in dropped}
    kept = {row["uri"] for row in pq.read_table(stage_file(world, found, "transfer.parquet")).to_pylist()}
    assert not kept & {row["uri"] for row in dropped}
    assert np.isnan([row["similarity"] for row in dropped]).all()
