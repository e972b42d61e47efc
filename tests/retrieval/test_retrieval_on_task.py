"""The figures about a transfer set against sums by hand and another library's entropy."""

import numpy as np
import pytest
import torch

from ktray.retrieval.on_task import Judged, confidence, seen


def test_confidence_is_one_minus_the_entropy_as_a_share():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3
    categorical = torch.distributions.Categorical(logits=logits)
    expected = 1 - categorical.entropy() / np.log(5)
    assert confidence(logits.softmax(1).numpy()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert confidence(np.eye(4)) == pytest.approx([1] * 4)
    assert confidence(np.full((2, 4), 0.25)) == pytest.approx([0, 0], abs=1e-6)


def test_the_curve_has_every_image_of_a_small_set():
    agrees = np.array([True, True, False, True])
    curve = Judged(np.array([0.9, 0.8, 0.5, 0.1], np.float32), None, agrees, None, 4).curve()
    assert curve["rank"] == [1, 2, 3, 4]
    assert curve["similarity"] == pytest.approx([0.9, 0.8, 0.5, 0.1])
    assert curve["agree"] == [1, 1, 0, 1]


def test_the_curve_of_a_large_set_is_sampled_and_its_shares_add_up():
    rng = np.random.default_rng(0)
    similarity, agrees = -np.sort(-rng.random(1_003).astype(np.float32)), rng.random(1_003) < 0.3
    curve = Judged(similarity, None, agrees, None, 1_003).curve()
    assert len(curve["rank"]) == 60
    assert curve["rank"][-1] == 1_003
    assert curve["similarity"][-1] == similarity[-1]
    counts = np.diff([0, *curve["rank"]])
    assert (counts * curve["agree"]).sum() == pytest.approx(agrees.sum())


def test_a_row_of_the_table_has_shares_and_leaves_out_what_is_unknown():
    near, certain = np.array([True, True, False]), np.array([1, 0.5, 0], np.float32)
    row = Judged(np.array([0.9, 0.6, 0.2], np.float32), near, near, certain, 300).figures("diverse", 0.25)
    assert row == {
        "name": "diverse", "images": 300, "similarity": pytest.approx(0.6), "near": pytest.approx(2 / 3),
        "agree": pytest.approx(2 / 3), "confidence": pytest.approx(0.5), "shared": 0.25,
    }  # fmt: skip
    bare = Judged(np.array([0.9], np.float32), None, None, None, 1).figures("diverse", None)
    assert (bare["near"], bare["agree"], bare["confidence"]) == (None, None, None)


def test_a_large_set_is_judged_by_images_in_equal_steps():
    key = np.array([3.0, 1.0, 2.0, 0.0])
    assert seen(key).tolist() == [3, 1, 2, 0]
    large = np.random.default_rng(1).permutation(1_000).astype(float)
    found = large[seen(large, 12)]
    assert (found[0], found[-1], len(found)) == (0, 999, 12)
    assert set(np.diff(found)) <= {90, 91}
