"""The shipped preprocessing is ktray's, pixel by pixel, and the shipped file needs nothing of ktray."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_zoo import write_zoo
from PIL import Image

from ktray.data.decode import decode_rgb
from ktray.data.preprocess import Preprocess
from ktray.errors import BadImage
from ktray.jobs.export import predict
from ktray.jobs.export.predict import Classifier

BASE = Preprocess((32, 32), (0.48, 0.45, 0.4), (0.22, 0.23, 0.24), fill=(120, 115, 102))
KINDS = [
    BASE,
    replace(BASE, interpolation="bilinear", crop_pct=0.875),
    replace(BASE, resize_mode="squash", crop_pct=0.9),
    replace(BASE, resize_mode="longest"),
    replace(BASE, resize_mode="longest", size=(24, 40)),
    replace(BASE, size=(24, 40), crop_pct=0.95),
]


@pytest.mark.parametrize("preprocess", KINDS, ids=lambda p: f"{p.resize_mode} {p.size} {p.crop_pct}")
def test_pixels_are_those_that_the_student_was_trained_on(preprocess: Preprocess) -> None:
    rng = np.random.default_rng(0)
    for height, width in [(32, 32), (41, 67), (200, 33), (9, 14), (31, 33), (77, 76), (2, 60)]:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        ours = preprocess.eval_transform(image)
        shipped = predict.geometry(Image.fromarray(image), preprocess.to_dict())
        assert shipped.shape == (3, *preprocess.size)
        assert np.array_equal(ours, shipped), (height, width)


def test_normalised_pixels_are_equal_within_rounding() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    ours = BASE.normalise(torch.from_numpy(pixels)).numpy()
    shipped = predict.normalise(pixels, BASE.to_dict())
    assert shipped.dtype == np.float32
    np.testing.assert_allclose(shipped, ours, rtol=0, atol=5e-7)


def test_every_kind_of_image_is_decoded_as_ktray_does_or_refused(tmp_path: Path) -> None:
    refused = 0
    for name in write_zoo(tmp_path):
        data = (tmp_path / name).read_bytes()
        try:
            ours = decode_rgb(data)
        except BadImage:
            refused += 1
            with pytest.raises(ValueError, match="not a usable image"):
                predict.decode(data)
            continue
        assert np.array_equal(np.asarray(predict.decode(data)), ours), name
    assert refused > 3


def test_predictions_are_those_of_the_student(student, stripes: Path, onnx_file: Path) -> None:
    images = [path.read_bytes() for path in sorted((stripes / "test").glob("*/*"))]
    ours, shipped = student.predict(images), Classifier(onnx_file).predict(images)
    assert [p.label for p in ours] == [p["label"] for p in shipped]
    for mine, theirs in zip(ours, shipped, strict=True):
        assert theirs["probability"] == pytest.approx(mine.probability, abs=1e-5)
        assert theirs["probabilities"] == pytest.approx(mine.probabilities, abs=1e-5)
        assert sum(theirs["probabilities"].values()) == pytest.approx(1)
    assert len({p["label"] for p in shipped}) == 3  # it does not always say the same
    assert Classifier(onnx_file).predict([]) == []


def test_it_runs_on_numpy_pillow_and_onnxruntime_alone(student, stripes: Path, onnx_file: Path, tmp_path: Path) -> None:
    shutil.copy(predict.__file__, tmp_path / "predict.py")
    shutil.copy(onnx_file, tmp_path / "student.onnx")
    image, broken = next((stripes / "test").glob("*/*")), tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    # A machine where it is deployed has no others.
    code = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ktray', 'torch', 'timm', 'onnx', 'mlflow', 'pandas', 'ray'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "predict.py"), str(image), str(broken), str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one of the images is broken, and it is told
    assert "broken.png: not a usable image" in done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert first["label"] == student.predict([image])[0].label


def test_a_file_of_another_origin_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(onnx_file))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="contains no class names; it was not exported by ktray"):
        Classifier(tmp_path / "other.onnx")


def test_a_grey_jpeg_from_memory(onnx_file: Path) -> None:
    encoded = io.BytesIO()
    Image.new("L", (50, 40), 128).save(encoded, "JPEG")
    assert Classifier(onnx_file).probabilities([encoded.getvalue()] * 3, batch=2).shape == (3, 3)
