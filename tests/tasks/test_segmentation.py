import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from ktray.data.labelled.masks import IGNORE
from ktray.models.maps import resize_map
from ktray.tasks.base import task_kind
from ktray.tasks.segmentation import metrics, pixel_counts

label_loss = task_kind("segmentation").loss
CLASSES = [f"c{i}" for i in range(7)]


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    """Predictions and masks: class 2 is predicted but never true, 4 is true but never predicted, 6 is in neither."""
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 1, 3, 4, 5, IGNORE], (9, 11, 13)).astype(np.uint8)
    guesses = rng.choice([0, 1, 2, 3, 5], masks.shape).astype(np.uint8)
    return np.where((rng.random(masks.shape) < 0.4) & ~np.isin(masks, [4, IGNORE]), masks, guesses), masks


def test_equals_scikit_learn_with_ignored_pixels_and_absent_classes(maps):
    predicted, masks = maps
    found = metrics(*pixel_counts(predicted, masks, 7), CLASSES)
    true, guess = masks[masks != IGNORE], predicted[masks != IGNORE]
    present = sorted(set(true) | set(guess))
    assert present == [0, 1, 2, 3, 4, 5]
    assert found["miou"] == pytest.approx(jaccard_score(true, guess, labels=present, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(true, guess))
    assert found["mean_class_accuracy"] == pytest.approx(
        np.mean([(guess[true == c] == c).mean() for c in sorted(set(true))])
    )
    each = jaccard_score(true, guess, labels=present, average=None)
    assert [found["per_class"][f"c{c}"] for c in present] == pytest.approx(list(each))
    assert found["per_class"]["c2"] == 0
    assert found["per_class"]["c4"] == 0
    assert found["per_class"]["c6"] is None
    assert found["n"] == 9


def test_mean_class_accuracy_is_balanced_accuracy():
    rng = np.random.default_rng(1)
    masks, predicted = rng.integers(0, 4, (2, 3, 8, 8)).astype(np.uint8)
    found = metrics(*pixel_counts(predicted, masks, 4), list("abcd"))
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(masks.ravel(), predicted.ravel()))


def test_counts_of_each_image_equal_its_confusion_matrix(maps):
    predicted, masks = maps
    tp, fp, fn = pixel_counts(predicted, masks, 7)
    assert tp.shape == fp.shape == fn.shape == (9, 7)
    assert tp.dtype == np.int64
    for i in range(9):
        keep = masks[i] != IGNORE
        matrix = confusion_matrix(masks[i][keep], predicted[i][keep], labels=range(7))
        assert np.array_equal(tp[i], np.diag(matrix))
        assert np.array_equal(fp[i], matrix.sum(0) - np.diag(matrix))
        assert np.array_equal(fn[i], matrix.sum(1) - np.diag(matrix))


def test_sums_over_images_before_it_divides(maps):
    predicted, masks = maps
    tp, fp, fn = pixel_counts(predicted, masks, 7)
    whole = metrics(tp, fp, fn, CLASSES)
    one = metrics(tp.sum(0), fp.sum(0), fn.sum(0), CLASSES)
    assert whole["miou"] == one["miou"]
    images = [metrics(tp[i], fp[i], fn[i], CLASSES)["miou"] for i in range(9)]
    assert whole["miou"] != pytest.approx(np.mean(images))


def test_predictions_on_ignored_pixels_do_not_matter(maps):
    predicted, masks = maps
    other = np.where(masks == IGNORE, 250, predicted)
    for a, b in zip(pixel_counts(predicted, masks, 7), pixel_counts(other, masks, 7), strict=True):
        assert np.array_equal(a, b)


def test_an_image_without_labels_counts_nothing():
    masks = np.full((2, 3, 3), IGNORE, np.uint8)
    masks[1] = 1
    tp, fp, fn = pixel_counts(np.ones_like(masks), masks, 3)
    assert tp.tolist() == [[0, 0, 0], [0, 9, 0]]
    assert not fp.any()
    assert not fn.any()
    with pytest.raises(ValueError, match="no pixels"):
        metrics(tp[:1], fp[:1], fn[:1], ["a", "b", "c"])


@pytest.mark.parametrize(("predicted", "mask"), [(0, 7), (9, 0)])
def test_a_class_that_is_not_there_is_an_error(predicted, mask):
    with pytest.raises(ValueError, match="outside"):
        pixel_counts(np.full((1, 2, 2), predicted), np.full((1, 2, 2), mask), 7)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="both"):
        pixel_counts(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)), 2)


def test_label_loss_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, 6, requires_grad=True)
    labels = torch.randint(0, 5, (3, 8, 12), dtype=torch.uint8)
    labels[0, :4] = IGNORE
    loss = label_loss(logits, labels)
    wide = resize_map(logits, (8, 12)).log_softmax(1).detach()
    each = [
        -wide[n, labels[n, y, x].long(), y, x]
        for n in range(3)
        for y in range(8)
        for x in range(12)
        if labels[n, y, x] != IGNORE
    ]
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    loss.backward()
    assert logits.grad[0, :, 0].abs().max() == 0
    assert logits.grad[1].abs().max() > 0


def test_label_loss_of_nothing_but_ignored_pixels_is_zero():
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    loss = label_loss(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_a_tally_of_maps_makes_the_scores_of_the_whole_masks(maps):
    _, masks = maps
    torch.manual_seed(0)
    out = 3 * torch.randn(9, 7, 5, 6)
    kind, labels = task_kind("segmentation"), torch.from_numpy(masks)
    total = sum(kind.tally(out[part], labels[part]) for part in (slice(4), slice(4, 9)))
    wide = resize_map(out, (11, 13))
    expected = metrics(*pixel_counts(wide.argmax(1).numpy(), masks, 7), CLASSES)
    assert kind.scores(total[:-2].numpy()) == {name: expected[name] for name in kind.scores(total[:-2].numpy())}
    counted = labels != IGNORE
    loss = F.cross_entropy(wide.permute(0, 2, 3, 1)[counted], labels[counted].long(), reduction="sum")
    assert total[-2:].tolist() == pytest.approx([loss.item(), counted.sum().item()], rel=1e-5)
