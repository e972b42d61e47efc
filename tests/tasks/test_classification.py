import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, recall_score

from ktray.tasks import calibration, classification
from ktray.tasks.base import task_kind


def test_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 7)).astype(np.float32), rng.integers(0, 6, 500)  # class 6 never occurs
    names = list("abcdefg")
    found = classification.metrics(logits.argmax(1), labels, names)
    predicted = logits.argmax(1)
    assert found["top1"] == pytest.approx(accuracy_score(labels, predicted))
    recall = recall_score(labels, predicted, labels=range(6), average=None, zero_division=0)
    np.testing.assert_allclose([found["per_class"][n] for n in names[:6]], recall)
    assert found["per_class"]["g"] is None
    assert found["mean_class_accuracy"] == pytest.approx(recall.mean())
    seen = predicted < 6
    both = classification.metrics(predicted[seen], labels[seen], names)
    assert both["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels[seen], predicted[seen]))
    np.testing.assert_array_equal(
        classification.confusion_matrix(predicted, labels, 7), confusion_matrix(labels, predicted, labels=range(7))
    )


def test_no_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        classification.metrics(np.zeros(0, int), np.zeros(0, int), list("abc"))


def test_softmax_is_stable():
    p = calibration.probabilities(np.array([[1000.0, 1000.0], [-1000.0, 0.0]]))
    np.testing.assert_allclose(p, [[0.5, 0.5], [0.0, 1.0]], atol=1e-12)


def test_label_loss_of_images_is_cross_entropy():
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    assert torch.equal(task_kind("classification").loss(logits, labels), F.cross_entropy(logits, labels))


def test_tallies_of_parts_add_up_to_the_scores_of_the_whole():
    torch.manual_seed(0)
    out, labels = torch.randn(50, 7), torch.randint(0, 6, (50,))
    kind = task_kind("classification")
    total = sum(kind.tally(out[part], labels[part]) for part in (slice(17), slice(17, 50)))
    found, expected = (
        kind.scores(total[:-2].numpy()),
        classification.metrics(out.argmax(1).numpy(), labels.numpy(), list("abcdefg")),
    )
    assert found == {name: expected[name] for name in kind.metrics}
    assert total[-2:].tolist() == pytest.approx([F.cross_entropy(out, labels, reduction="sum").item(), 50])


def test_compact_rows_have_what_the_metrics_need_of_the_logits():
    """In pieces, as EVALUATE has them, against scipy's softmax over all rows."""
    rng, kind = np.random.default_rng(1), task_kind("classification")
    uris, labels = np.array([f"{i}.jpg" for i in range(90)]), rng.integers(0, 7, 90)
    logits = {name: rng.normal(0, 3, (90, 7)).astype(np.float32) for name in ("student", "teacher")}
    parts = [
        kind.compact({"uri": uris[p], "label": labels[p], **{n: v[p] for n, v in logits.items()}})
        for p in (slice(0, 0), slice(0, 40), slice(40, 90))
    ]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert all(values.shape == (90,) for values in rows.values())
    assert rows["uri"].tolist() == uris.tolist()
    for name, values in logits.items():
        p = softmax(values.astype(np.float64), axis=1)
        np.testing.assert_array_equal(rows[name], values.argmax(1))
        np.testing.assert_allclose(rows[f"{name}.confidence"], p.max(1))
        np.testing.assert_allclose(rows[f"{name}.likelihood"], p[np.arange(90), labels])
        assert kind.test_metrics(rows, name, list("abcdefg"))["top1"] == accuracy_score(labels, values.argmax(1))
    assert kind.calibration(rows) == calibration.calibration(logits["student"], labels)
    assert kind.scores(kind.image_counts(rows, "student").sum(0))["top1"] == pytest.approx(
        accuracy_score(labels, logits["student"].argmax(1))
    )
