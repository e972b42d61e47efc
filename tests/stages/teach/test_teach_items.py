"""Shards of a transfer set: every image once, in random order, with what belongs to it."""

import numpy as np

from ktray.stages.teach.items import images_per_shard, shard_items, shard_numbers


def test_shards_are_random_samples_with_every_image_once():
    numbers = shard_numbers(1000, 106, seed=3)
    assert [len(n) for n in numbers] == [106] * 9 + [46]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(1000))
    # 106 of 1000 images: the mean of a random sample is within 4 standard errors of that of all.
    assert all(abs(n.mean() - 499.5) < 4 * 289 / np.sqrt(len(n)) for n in numbers)
    assert [n.tolist() for n in shard_numbers(1000, 106, seed=3)] == [n.tolist() for n in numbers]
    assert [n.tolist() for n in shard_numbers(1000, 106, seed=4)] != [n.tolist() for n in numbers]


def test_columns_stay_with_their_images():
    uris = [f"image {i}" for i in range(20)]
    beside = {"label": np.arange(20) * 10, "text": np.stack([np.arange(20), -np.arange(20)], 1), "caption": None}
    items = shard_items(uris, beside, 6, seed=0)
    assert [item["name"] for item in items] == [f"shard-{i:06d}.parquet" for i in range(4)]
    assert sorted(uri for item in items for uri in item["uris"]) == sorted(uris)
    assert items[0]["uris"] != uris[:6]
    for item in items:
        assert item["beside"].keys() == {"label", "text"}
        number = [int(uri.split()[1]) for uri in item["uris"]]
        assert item["beside"]["label"] == [10 * i for i in number]
        assert item["beside"]["text"] == [[i, -i] for i in number]


def test_a_shard_has_64_megabytes_and_a_small_set_several_shards():
    assert images_per_shard(153_600, 4, 224) == 106
    assert images_per_shard(10, 4, 224) == 2
    assert images_per_shard(10**6, 1, 32) == 512
    assert images_per_shard(100, 4, 4000) == 1
