"""Several teachers as one, against the definition and a search over all weights."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.ensemble import Ensemble, EnsembleSpec, largest, mix, mixture_weights
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.spec import AdaptedSpec, tower_flops
from ktray.storage.store import Dir


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator(5))


@pytest.fixture
def pair(tiny_clip: SimpleNamespace) -> list[AdaptedTeacher]:
    """Two adapted teachers with towers of different sizes, for the same classes."""
    small = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    large = load_teacher("miniverse", image_size=48)
    heads = [
        LinearHead(torch.randn(3, t.embed_dim, generator=generator(1)), torch.randn(3, generator=generator(2)))
        for t in (small, large)
    ]
    return [AdaptedTeacher(t, head, ["a", "b", "c"], 0.5).eval() for t, head in zip((small, large), heads, strict=True)]


def test_weights_maximise_the_likelihood_with_one_pseudo_count_each() -> None:
    p = torch.rand(3, 40, generator=generator()) ** 2
    p[1] = 0.9 * p[1] + 0.1 * p.max(0).values

    def objective(w: torch.Tensor) -> float:
        return float((w @ p.double()).log().sum() + w.log().sum())

    found = mixture_weights(p)
    assert float(found.sum()) == pytest.approx(1, abs=1e-9)
    grid = torch.linspace(0.005, 0.99, 198, dtype=torch.float64)
    every = [torch.stack([a, b, 1 - a - b]) for a, b in itertools.product(grid, grid) if a + b < 0.999]
    best = max(every, key=objective)
    assert objective(found) >= objective(best)
    torch.testing.assert_close(found, best, atol=0.006, rtol=0)


def test_equal_teachers_have_equal_weights_and_a_useless_one_is_not_excluded() -> None:
    same = torch.rand(1, 10, generator=generator()).expand(2, 10)
    torch.testing.assert_close(mixture_weights(same), torch.full((2,), 0.5, dtype=torch.float64))
    right, wrong = torch.full((10,), 0.99), torch.full((10,), 1e-9)
    # One pseudo-count among 10 images and 2 teachers.
    assert mixture_weights(torch.stack([right, wrong])).tolist() == pytest.approx([11 / 12, 1 / 12], abs=1e-6)


def test_the_mix_is_the_mean_of_probabilities() -> None:
    logits = [torch.randn(4, 6, generator=generator(i)) for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    expected = sum(w * part.softmax(1) for w, part in zip(weights, logits, strict=True))
    torch.testing.assert_close(mix(logits, weights).exp(), expected)
    torch.testing.assert_close(mix(logits, weights).exp().sum(1), torch.ones(4))


def test_an_ensemble_is_its_members_in_their_own_sizes(pair: list[AdaptedTeacher]) -> None:
    both = Ensemble(pair, [0.75, 0.25], temperature=0.8)
    with torch.no_grad():
        probabilities = 0.75 * pair[0].logits(images()).softmax(1) + 0.25 * pair[1].logits(images()).softmax(1)
        torch.testing.assert_close(both.logits(images()), probabilities.log() / 0.8)
        known = pair[0].embed(images())
        torch.testing.assert_close(both.embed(images()), known)
        torch.testing.assert_close(both.logits(images(), known), both.logits(images()))
    assert both.preprocess == pair[1].preprocess == largest([t.preprocess for t in pair])
    assert tower_flops(both) == sum(tower_flops(t) for t in pair)


def test_an_ensemble_is_loaded_from_the_store(pair: list[AdaptedTeacher], tmp_path) -> None:
    folders = []
    for number, teacher in enumerate(pair):
        teacher.save(tmp_path / str(number))
        folders.append(AdaptedSpec(Dir(str(tmp_path / str(number))), teacher.preprocess))
    Dir(str(tmp_path)).write_json("ensemble.json", {"weights": [0.4, 0.6], "temperature": 1.5})
    loaded = EnsembleSpec(Dir(str(tmp_path)), tuple(folders)).load()
    with torch.no_grad():
        expected = Ensemble(pair, [0.4, 0.6], 1.5).logits(images())
        torch.testing.assert_close(loaded.logits(images()), expected)
