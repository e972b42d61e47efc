"""Images are read in order, unusable ones are counted, and both preprocessings are beside each other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktray.data.labelled.labelled_set import LabelledExample
from ktray.errors import KtrayError
from ktray.jobs.export import images
from ktray.jobs.export.images import Split


def test_order_labels_and_unusable_ones(student, stripes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "BATCH", 8)
    files = sorted((stripes / "test").glob("*/*"))[::3]
    (tmp_path / "bad.png").write_bytes(b"no image")
    examples = [LabelledExample(str(path), i % 3) for i, path in enumerate(files)]
    examples[5:5] = [LabelledExample(str(tmp_path / "bad.png"), 0), LabelledExample(str(tmp_path / "gone.png"), 1)]
    split = Split("test", examples, student.preprocess, 10**6)
    batches = list(split.batches())
    assert split.unusable == 2
    assert [len(b.labels) for b in batches] == [6, 8, 6]
    assert np.concatenate([b.labels for b in batches]).tolist() == [i % 3 for i in range(len(files))]
    expected = np.stack([student.preprocess.eval_transform(Image.open(path)) for path in files])
    for name in ("pixels", "shipped"):
        assert np.array_equal(np.concatenate([getattr(b, name) for b in batches]), expected)
    held = split.held(tmp_path / "held.npy")
    assert np.array_equal(held.pixels, expected)
    parts = list(held.batches())
    assert np.array_equal(np.concatenate([pixels for pixels, _ in parts]), expected)
    assert np.concatenate([columns["label"] for _, columns in parts]).tolist() == [i % 3 for i in range(len(files))]


def test_no_usable_image_at_all(student, tmp_path: Path) -> None:
    (tmp_path / "large.png").touch()
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    split = Split("val", [LabelledExample(str(tmp_path / "large.png"), 0)], student.preprocess, max_pixels=100)
    with pytest.raises(KtrayError, match="No image of the val split"):
        list(split.batches())
