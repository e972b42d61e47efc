"""Summaries of shards: their stored keys stay, so that a stage which an older version began goes on."""

import json
import threading
from dataclasses import dataclass

import pytest

from ktray.stages.shard_summary import ShardSummary, finish_shard, finished_shards, pairs
from ktray.stages.teach.shards import list_images
from ktray.storage.concurrent import AT_ONCE
from ktray.storage.store import Stage

STORED = {
    "name": "shard-000000.parquet",
    "rows": 8,
    "read": 5,
    "bad": [["a.png", "truncated"]],
    "images": 8,
    "flops": 1.5e12,
}


@dataclass(frozen=True)
class Counted(ShardSummary):
    counts: tuple[int, ...] = ()


def test_a_stored_summary_is_read_resumed_and_written_with_the_same_keys(tmp_path):
    stage = Stage(str(tmp_path))
    stage.write_json("shard-000000.parquet.json", STORED)
    (found,) = finished_shards(stage).values()
    assert found.bad == (("a.png", "truncated"),)
    assert (found.resumed().images, found.resumed().flops, found.resumed().read) == (0, 0, 5)
    told = finish_shard(stage, found)
    assert json.loads(json.dumps(told)) == stage.read_json("shard-000000.parquet.json") == STORED


@pytest.mark.parametrize("more", [{}, {"peak": 7}])
def test_fields_that_a_version_lacks_or_has_beside_do_not_matter(more):
    found = ShardSummary.from_json({"name": "images-00000.parquet", "rows": 2, "read": 2, "images": 2, **more})
    assert found == ShardSummary("images-00000.parquet", rows=2, read=2, images=2)


def test_a_stage_can_say_more():
    told = json.loads(json.dumps(Counted("train-00000.parquet", read=3, counts=(1, 2)).to_json()))
    (found,) = Counted.each([told])
    assert list(found.counts) == [1, 2]
    assert (found.name, found.read, found.rows) == ("train-00000.parquet", 3, 0)


def test_reasons_come_as_plain_text_from_an_array():
    import numpy as np

    found = pairs(np.array([["a.png", "empty"]], dtype=str))
    assert found == (("a.png", "empty"),)
    assert type(found[0][0]) is str


def test_the_summaries_of_a_stage_on_s3_are_read_together(s3):
    stage = Stage(f"{s3.home}/t")
    made = [ShardSummary(f"shard-{i:06d}.parquet", rows=i, bad=((f"{i}.png", "empty"),)) for i in range(AT_ONCE)]
    for summary in made:
        finish_shard(stage, summary)
    together = threading.Barrier(AT_ONCE, timeout=30)  # broken, so an error, unless so many are under way

    def meet(method, path):
        if method == "GET" and path.endswith(".json"):
            together.wait()
        return ""

    s3.fault = meet
    assert finished_shards(stage) == {summary.name: summary for summary in made}


def test_the_lists_of_images_are_stored_on_s3_together(s3):
    stage = Stage(f"{s3.home}/t")
    items = [{"name": f"s{i}.parquet", "uris": [f"{i}.png"] * i, "beside": {"label": [i] * i}} for i in range(AT_ONCE)]
    together = threading.Barrier(8, timeout=30)  # pyarrow has eight threads that write

    def meet(method, path):
        if method == "PUT":
            together.wait()
        return ""

    s3.fault = meet
    assert list_images(stage, items, 3) == {item["name"]: 3 * len(item["uris"]) for item in items}
    for item in items:
        assert stage.read_json(f"{item['name']}.images") == {"uris": item["uris"], "beside": item["beside"]}
