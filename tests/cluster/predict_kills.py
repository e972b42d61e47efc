"""jobs/predict.py over many images, with SIGKILL of its driver at random moments: each image is predicted once.

    python tests/cluster/predict_kills.py [IMAGES] [KILLS] [SEED]

Afterwards the predictions are compared with those of an undisturbed job, whose rate is compared with that of a bare
forward pass on images that are decoded already. With 30,000 images and 5 kills it takes some 20 minutes on 2 cores.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "jobs")]

from archives import tar_bytes  # noqa: E402
from conftest import leave  # noqa: E402
from small_task import CLASSES, picture, write_task  # noqa: E402

from ktray.models.student.classifier import Student, build_student  # noqa: E402

A_TAR, SIDE, VARIANTS = 500, 128, 200


def write_images(folder: Path, count: int) -> None:
    """Tars of JPEGs; there are few different images, because only their number matters."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(VARIANTS):
        stream = io.BytesIO()
        picture(int(rng.integers(0, len(CLASSES))), rng, 160, 200).save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    folder.mkdir()
    for first in range(0, count, A_TAR):
        members = [(f"{i:06d}.jpg", encoded[i % VARIANTS]) for i in range(first, min(count, first + A_TAR))]
        (folder / f"{first:06d}.tar").write_bytes(tar_bytes(members))


def bare_rate(student: Student, seconds: float = 10.0) -> float:
    """Images per second of forward passes with all cores, in batches as jobs/predict.py has them."""
    from ktray.models.teacher.teacher import fitting_batch

    student.model.to(memory_format=torch.channels_last)
    batch = fitting_batch(student.preprocess, torch.device("cpu"), 256)
    pixels = torch.randint(0, 256, (batch, 3, *student.preprocess.size), dtype=torch.uint8)
    with torch.inference_mode():
        student.logits(pixels)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            student.logits(pixels)
            done += batch
    return done / (time.monotonic() - began)


def table(folder: Path) -> dict[str, str]:
    rows = pq.read_table(folder, columns=["uri", "class"])
    uris = rows.column("uri").to_pylist()
    assert len(uris) == len(set(uris)), f"{len(uris) - len(set(uris))} images are there twice"
    return dict(zip(uris, rows.column("class").to_pylist(), strict=True))


def written(folder: Path) -> list[Path]:
    return list(folder.glob("*.parquet"))


def main(images: int, kills: int, seed: int) -> None:
    root, rng = Path(tempfile.mkdtemp(prefix="kt-predict-")), random.Random(seed)
    data = write_task(root / "task")
    student = build_student("resnet18", {}, len(CLASSES), SIDE).eval()  # untrained: only the work matters
    student.classes = sorted(CLASSES)
    run = leave(root / "store", data, student)
    write_images(root / "images", images)
    words = [sys.executable, str(ROOT / "jobs/predict.py"), f"store={root / 'store'}", f"predict.run={run.name}"]
    words.append(f"predict.data={root / 'images'}")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}

    def start(out: str, log: Path) -> subprocess.Popen[bytes]:
        with open(log, "a") as stream:
            return subprocess.Popen(
                [*words, f"predict.out={root / out}"], env=environment, stdout=stream, stderr=stream
            )

    began = time.monotonic()
    assert start("plain", root / "plain.log").wait() == 0, (root / "plain.log").read_text()[-2000:]
    took = time.monotonic() - began
    (file,) = (root / "store" / "runs").glob("*predict*/result.json")
    rate, bare = json.loads(file.read_text())["images_per_second"], bare_rate(student)
    print(
        f"undisturbed: {took:.0f} s, {rate:.0f} images/s; bare forward {bare:.0f} images/s: {rate / bare:.0%}",
        flush=True,
    )
    # By the files that are written, so that each kill meets a job that has work left.
    whole, moments = len(written(root / "plain")), []
    for share in sorted(rng.uniform(0.0, 0.95) for _ in range(kills)):
        job = start("killed", root / "killed.log")
        while len(written(root / "killed")) < share * whole:
            assert job.poll() is None, (root / "killed.log").read_text()[-2000:]
            time.sleep(0.2)
        time.sleep(rng.uniform(0.0, 0.01 * took))
        assert job.poll() is None, "the job ended before it was killed"
        job.kill()
        job.wait()
        moments.append(f"{len(written(root / 'killed'))} of {whole} files")
    assert start("killed", root / "killed.log").wait() == 0, (root / "killed.log").read_text()[-2000:]
    found, plain = table(root / "killed"), table(root / "plain")
    assert len(plain) == images
    assert found == plain
    print(f"killed after {', '.join(moments)}: {len(found):,} images, each once, as undisturbed")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [30_000, 5, 0][len(numbers) :]))
