"""Batches at the counts of a large task are as mixed as those of a uniform shuffle."""

import numpy as np
import pytest

from ktray.jobs.bench.order import CASES, Mix, OrderCase, mix, trained_order, uniform_order
from ktray.stages.teach.items import images_per_shard
from ktray.training.window_size import FEWEST_BYTES

STEPS = 60
BY_NAME = {case.name: case for case in CASES}


def test_a_mix_is_counted_as_by_hand():
    labels = np.array([0, 0, 0, 1, 2])
    batches = [np.array([0, 1, 2, 3, 4]), np.array([3, 3, 0, 4, 0])]
    assert mix(batches, labels) == Mix(images=4.0, classes=3.0, run=2.5)


@pytest.mark.parametrize("name", ["retrieved", "target", "supervised", "own photos", "retrieved, 4 workers"])
def test_batches_are_as_mixed_as_those_of_a_uniform_shuffle(name):
    case = BY_NAME[name]
    uniform, trained = (mix(batches(case, STEPS), case.labels) for batches in (uniform_order, trained_order))
    assert trained.images >= 0.9 * uniform.images
    assert trained.classes >= 0.9 * uniform.classes
    assert trained.run <= uniform.run / 0.9


def test_the_counts_show_shards_of_neighbours():
    """As it was: shards of consecutive images, in windows of some of them."""
    case = OrderCase("retrieved", 153_600, 1000, 4, 1024, window=FEWEST_BYTES)
    per_shard = images_per_shard(case.images, case.views, case.size)
    sorted_shards = [np.arange(i, min(i + per_shard, case.images)) for i in range(0, case.images, per_shard)]
    trained = mix(trained_order(case, STEPS, sorted_shards), case.labels)
    uniform = mix(uniform_order(case, STEPS), case.labels)
    assert trained.classes < 0.1 * uniform.classes
    assert trained.images < 0.7 * uniform.images
    assert trained.run > 2 * uniform.run


def test_an_epoch_has_every_view_of_every_image_once():
    case = OrderCase("small", 20 * 106, 10, 4, 80, ranks=2, window=FEWEST_BYTES // 8)
    images = np.concatenate(trained_order(case, 106))
    assert np.bincount(images, minlength=case.images).tolist() == [4] * case.images
