from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from ktray.errors import KtrayError
from ktray.models.teacher import heads
from ktray.models.teacher.heads import LinearHead, Link, fit_temperature, probe_head, text_head
from ktray.models.teacher.load import load_teacher


def blobs(n: int, classes: int = 4, dim: int = 12, noise: float = 1.2, seed: int = 0) -> tuple:
    """Overlapping Gaussian classes, of lengths that differ (the head must not see the length)."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = centres[y] + noise * torch.randn(n, dim, generator=g)
    return x * (0.5 + torch.rand(n, 1, generator=g)), y


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_probe_equals_scikit_learn(l2: float) -> None:
    x, y = blobs(80)
    head = probe_head(x, y, 4, l2=[l2])
    unit = F.normalize(x.double(), dim=-1).numpy()
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=20_000).fit(unit, y.numpy())
    expected = torch.from_numpy(reference.coef_).float()
    torch.testing.assert_close(head.weight.detach(), expected, atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        probabilities = head(x).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(unit), atol=1e-4)
    assert head.l2 == l2


def test_strength_is_chosen_on_validation() -> None:
    x, y = blobs(24, noise=2.0)
    val = blobs(200, noise=2.0, seed=1)
    head = probe_head(x, y, 4, val=val)
    assert len(head.scores) > 5
    assert head.l2 == min(head.scores, key=lambda s: head.scores[s])
    # The scores are those of separate fits: the warm starts along the path change nothing.
    for l2 in (1e-3, 1e-1):
        nearest = min(head.scores, key=lambda s: abs(np.log(s / l2)))
        with torch.no_grad():
            logits = probe_head(x, y, 4, l2=[nearest])(val[0])
        loss = F.cross_entropy(logits / fit_temperature(logits, val[1]), val[1])
        assert float(loss) == pytest.approx(head.scores[nearest], rel=1e-3)
    assert len({round(s, 4) for s in head.scores.values()}) > 3


def test_many_classes_are_fitted_in_pieces_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(24, noise=2.0)
    val = blobs(50, noise=2.0, seed=1)
    whole = probe_head(x, y, 4, val=val)
    temperature = fit_temperature(whole(val[0]), val[1])
    monkeypatch.setitem(heads._LOGITS, "cpu", 4 * 7)
    rows: list[int] = []
    link = Link(lambda z, y: (rows.append(len(z)), F.cross_entropy(z, y))[1], fit_temperature)
    found = probe_head(x, y, 4, val=val, link=link)
    assert max(rows) == 7
    assert found.l2 == whole.l2
    torch.testing.assert_close(found.weight, whole.weight, atol=1e-4, rtol=1e-4)
    assert list(found.scores.values()) == pytest.approx(list(whole.scores.values()), rel=1e-3)
    assert fit_temperature(whole(val[0]), val[1]) == pytest.approx(temperature, rel=1e-5)


def test_without_validation_it_cross_validates() -> None:
    x, y = blobs(40, noise=2.0)
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    head = probe_head(x, y, 4, l2=grid)
    assert head.scores
    assert torch.equal(probe_head(x, y, 4, l2=grid).weight, head.weight)
    single = probe_head(x[:4], y[:4], 4)
    assert not single.scores
    assert torch.isfinite(single.weight).all()


def test_decay_is_towards_the_start() -> None:
    x, y = blobs(40)
    start = LinearHead(10 * torch.randn(4, 12))
    strong = probe_head(x, y, 4, l2=[1e6], start=start)
    torch.testing.assert_close(strong.weight, start.weight, atol=1e-3, rtol=1e-3)
    zero = probe_head(x, y, 4, l2=[1e6])
    assert zero.weight.abs().max() < 1e-3
    # The optimum: cross-entropy's gradient is balanced by l2 * (W - W0).
    middle = probe_head(x, y, 4, l2=[0.05], start=start)
    middle.zero_grad()
    F.cross_entropy(middle(x), y).backward()
    torch.testing.assert_close(
        middle.weight.grad, -0.05 * (middle.weight - start.weight).detach(), atol=1e-5, rtol=0.01
    )
    assert middle.bias.grad.abs().max() < 1e-5


def test_probe_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(KtrayError, match="no labelled"):
        probe_head(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 2)
    with pytest.raises(KtrayError, match="not finite"):
        probe_head(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), 2)


def test_text_head_is_the_prompt_ensemble(tiny_clip: SimpleNamespace) -> None:
    teacher = load_teacher("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    head = text_head(teacher, ["red_fox", "owl"], ["a {}.", "the {} here"])
    rows = []
    with torch.inference_mode():
        for name in ("red fox", "owl"):
            tokens = tiny_clip.tokenizer([f"a {name}.", f"the {name} here"])
            each = F.normalize(tiny_clip.model.encode_text(tokens), dim=-1)
            rows.append(F.normalize(each.mean(0), dim=0) * tiny_clip.model.logit_scale.exp())
    torch.testing.assert_close(head.weight.detach(), torch.stack(rows).clone(), atol=1e-5, rtol=1e-5)
    assert not head.bias.any()
    with pytest.raises(KtrayError, match=r"has no \{\}"):
        text_head(teacher, ["a", "b"], ["a thing"])


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_temperature_equals_a_grid_search(scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    true = torch.randn(400, 5, generator=g) * 2
    y = torch.multinomial(true.softmax(1), 1, generator=g)[:, 0]
    logits = true * scale
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 4001))
    losses = [float(F.cross_entropy(logits.double() / t, y)) for t in grid]
    found = fit_temperature(logits, y)
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=5e-3)
    assert found == pytest.approx(scale, rel=0.3)


def test_temperature_of_a_faultless_validation_is_not_nil() -> None:
    y = torch.arange(30) % 3
    logits = F.one_hot(y, 3).float() * 4
    found = fit_temperature(logits, y)
    # As if one of 32 were wrong: p(right) = 1 - 1/32 at the optimum.
    right = (logits / found).softmax(1).gather(1, y[:, None])
    assert float(right.mean()) == pytest.approx(1 - 1 / 32, abs=1e-3)
    assert fit_temperature(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) == 1.0
