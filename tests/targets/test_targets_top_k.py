"""Predictions with a rest: the mass is right, at every size and place."""

import pytest
import torch

from ktray.storage.columns import pack_rows
from ktray.targets.top_k import columns, dense_rows, densify, per_prediction, sparsify


def logits(*shape, spread=4.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 50), (3, 50, 4, 2)])
@pytest.mark.parametrize("top_k", [1, 7, 49])
def test_probabilities_of_the_kept_are_exact_and_the_rest_has_its_mass(shape, top_k):
    full = logits(*shape)
    found = sparsify(full, top_k)
    assert found["logits_top"].shape == found["logits_index"].shape == (shape[0], top_k, *shape[2:])
    assert found["logits_rest"].shape == (shape[0], 1, *shape[2:])
    back = densify({**found, "pixels": torch.zeros(1)}, 50)
    assert set(back) == {"pixels", "logits"}
    expected, got = (x.double().softmax(1) for x in (full, back["logits"]))
    order = expected.argsort(dim=1, descending=True)
    kept, others = order[:, :top_k], order[:, top_k:]
    torch.testing.assert_close(got.gather(1, kept), expected.gather(1, kept), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(got.gather(1, others).sum(1), expected.gather(1, others).sum(1), rtol=1e-2, atol=1e-7)
    even = got.gather(1, others)
    torch.testing.assert_close(even, even[:, :1].expand_as(even))


def test_the_rest_of_a_confident_prediction_keeps_its_digits():
    full = torch.tensor([[30.0, 0.0, -1.0, 1.0]])
    rest = sparsify(full, 1)["logits_rest"].double()
    expected = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64).exp().mean().log()
    torch.testing.assert_close(rest.squeeze(), expected, rtol=1e-3, atol=0)


def test_what_has_no_rest_is_left_alone():
    batch = {"logits": logits(2, 3)}
    assert densify(batch, 3)["logits"] is batch["logits"]
    for top_k in (0, 3, 4):
        with pytest.raises(ValueError, match="with 3 classes"):
            sparsify(batch["logits"], top_k)


def test_columns_and_sizes_are_those_that_are_stored():
    assert columns(("embedding", "logits"), 0) == ("embedding", "logits")
    assert columns(("embedding", "logits"), 9) == ("embedding", "logits_top", "logits_index", "logits_rest")
    rows = {name: value.numpy() for name, value in sparsify(logits(64, 5000), 200).items()}
    assert sum(value.nbytes for value in rows.values()) == 64 * 2 * per_prediction(5000, 200)
    assert per_prediction(5000, 0) == 5000
    assert len(pack_rows(rows)) < 64 * 5000  # less than half of all logits
    assert dense_rows(rows, columns(("logits",), 200), 5000)["logits"].shape == (64, 5000)
