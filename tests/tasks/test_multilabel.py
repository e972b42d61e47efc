"""Sets of classes: metrics equal scikit-learn's, thresholds are the best ones, parts of a split make the whole."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from ktray.errors import KtrayError
from ktray.recipe.schema import TaskConfig, TeacherConfig
from ktray.tasks.base import task_kind
from ktray.tasks.label_metrics import average_precision, best_thresholds, mean_over_classes
from ktray.tasks.multilabel import metrics, sigmoid
from ktray.training.evaluation import evaluator

CLASSES = list("abcde")


@pytest.fixture
def given() -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties and labels of 90 images; no image has the last class, and some images have no class."""
    rng = np.random.default_rng(0)
    labels = (rng.random((90, 5)) < [0.5, 0.2, 0.05, 0.3, 0.0]).astype(np.uint8)
    scores = np.round(rng.normal(0.8 * labels, 1.0), 1).astype(np.float32)
    assert len(np.unique(scores[:, 0])) < 60
    assert (labels.sum(1) == 0).any()
    return scores, labels


def test_metrics_equal_scikit_learn(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    decided = scores > [0.5, 0.2, 3.5, 9.0, 9.0]  # nothing is predicted for the last two
    found = metrics(scores, decided, labels, CLASSES)
    each = [average_precision_score(labels[:, c], scores[:, c]) for c in range(4)]
    assert [found["per_class"][name] for name in CLASSES[:4]] == pytest.approx(each)
    assert found["per_class"]["e"] is None
    assert found["map"] == pytest.approx(average_precision_score(labels[:, :4], scores[:, :4], average="macro"))
    assert found["micro_f1"] == pytest.approx(f1_score(labels, decided, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, decided, average="macro", zero_division=np.nan))
    for figure, reference in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = reference(labels, decided, average=None, zero_division=np.nan)
        ours = [np.nan if (v := found["details"][name][figure]) is None else v for name in CLASSES]
        np.testing.assert_allclose(ours, expected)
    assert [found["details"][name]["images"] for name in CLASSES] == labels.sum(0).tolist()
    assert found["n"] == 90


def test_weighted_average_precision_equals_scikit_learn(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    weights = np.random.default_rng(1).integers(0, 4, (4, 90)) + (labels[:, 2] > 0).astype(float)  # 0 for some images
    found = average_precision(scores, labels, weights)
    for b, c in np.ndindex(4, 4):
        expected = average_precision_score(labels[:, c], scores[:, c], sample_weight=weights[b])
        assert found[b, c] == pytest.approx(expected)
    assert np.isnan(found[:, 4]).all()
    seeds = [{"student": scores, "label": labels}, {"student": -scores, "label": labels}]
    judged = task_kind("multilabel").weighted_scores("map", seeds)
    assert judged.shape == (2, 90)
    np.testing.assert_allclose(judged.score(weights)[:, 0], mean_over_classes(found))


def test_f1_under_weights_is_that_of_repeated_images(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    decided = scores > 0.4
    rows = {"student": scores, "student_decided": decided.astype(np.uint8), "label": labels}
    times = np.random.default_rng(2).integers(0, 3, 90)
    again = np.repeat(np.arange(90), times)
    for metric in ("micro_f1", "macro_f1"):
        found = task_kind("multilabel").weighted_scores(metric, [rows]).score(times[None].astype(float))
        assert found[0, 0] == pytest.approx(metrics(scores[again], decided[again], labels[again], CLASSES)[metric])


def test_no_images_score_nothing() -> None:
    assert np.isnan(average_precision(np.zeros((0, 2)), np.zeros((0, 2)))).all()
    assert mean_over_classes(np.array([np.nan, np.nan])) == 0


def test_thresholds_are_the_best_of_all(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    probabilities = sigmoid(scores)
    found = best_thresholds(probabilities, labels)
    for c in range(4):
        best = max(f1_score(labels[:, c], probabilities[:, c] >= t) for t in np.unique(probabilities[:, c]))
        assert f1_score(labels[:, c], probabilities[:, c] >= found[c]) == pytest.approx(best)
    assert found[4] == 0.5
    # Between two groups that are apart, the threshold lies in the middle; of equally good ones, the nearest to 0.5.
    assert best_thresholds(np.array([[0.9], [0.8], [0.2]]), np.array([[1], [1], [0]])) == pytest.approx(0.5)
    assert best_thresholds(np.array([[0.9], [0.1]]), np.array([[1], [1]])) == pytest.approx(0.05)


def test_a_tally_makes_scores_and_loss_of_a_whole_split(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    kind = pickle.loads(pickle.dumps(task_kind("multilabel")))
    out, targets = torch.from_numpy(scores), kind.targets(labels)
    total = kind.tally(out, targets)
    decided = sigmoid(scores) >= best_thresholds(sigmoid(scores), labels)
    expected = metrics(scores, decided, labels, CLASSES)
    assert kind.scores(total[:-2].numpy()) == pytest.approx({name: expected[name] for name in kind.metrics})
    loss = F.binary_cross_entropy_with_logits(out, targets)
    assert (total[-2] / total[-1]).item() == pytest.approx(loss.item())
    assert kind.loss(out, targets).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_does_not_depend_on_the_number_of_ranks(
    world: int, given: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, labels = (rows[:5] for rows in given)  # with 7 ranks, two have no image
    kind, pixels = task_kind("multilabel"), torch.arange(5).view(5, 1)
    sent: list[list[torch.Tensor]] = [[] for _ in range(world)]

    def score(rank: int) -> float:
        env = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        predict = lambda model, x: torch.from_numpy(scores)[x[:, 0]]  # noqa: E731
        run = evaluator(kind, pixels, kind.targets(labels), predict, env, "map", batch=2)
        return run(torch.nn.Identity())[1]["val_map"]

    def collect(rank: int) -> None:
        def send(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
            sent[rank].append(mine)
            for part in parts:
                part.zero_()

        monkeypatch.setattr(dist, "all_gather", send)
        score(rank)

    def receive(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        for part, theirs in zip(parts, [of[len(seen)] for of in sent], strict=True):
            part.copy_(theirs)
        seen.append(1)

    whole = metrics(scores, scores > 0, labels, CLASSES)["map"]
    if world > 1:
        for rank in range(world):
            collect(rank)
        monkeypatch.setattr(dist, "all_gather", receive)
    for rank in range(world):
        seen: list[int] = []
        assert score(rank) == pytest.approx(whole)


def test_calibration_divides_by_the_temperature(given: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = given
    kind = task_kind("multilabel")
    out, targets = 6 * torch.from_numpy(scores), kind.targets(labels)
    temperature, judged = kind.calibrate(out, targets)
    losses = {t: F.binary_cross_entropy_with_logits(out / t, targets).item() for t in np.geomspace(0.5, 50, 400)}
    assert temperature == pytest.approx(min(losses, key=losses.get), rel=0.02)
    assert judged["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_candidates_with_and_without_text() -> None:
    kind = task_kind("multilabel")
    assert kind.candidates(TeacherConfig(), has_text=True) == ["text", "probe", "finetune"]
    assert kind.candidates(TeacherConfig(), has_text=False) == ["probe", "finetune"]
    with pytest.raises(KtrayError, match="'timm:x' has no text tower"):
        kind.candidates(TeacherConfig(name="timm:x", adapt="text"), has_text=False)


@pytest.mark.parametrize("keys", [{"splits": "lists"}, {"train_list": "train"}, {"layout": "eurosat"}])
def test_keys_for_one_class_per_image_are_refused(keys: dict[str, str]) -> None:
    with pytest.raises(KtrayError, match=rf"task\.{next(iter(keys))} is for images with one class each"):
        task_kind("multilabel").read("data", TaskConfig(kind="multilabel", **keys))
