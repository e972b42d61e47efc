"""The counts of the paper with tiny images: one job after the other, and for each stage its time, the driver's share of
it, and the memory of every process. On two cores and 24 GB within 90 minutes:

    python tests/scale/rehearse.py FOLDER [--share 1.0] [--s3 s3://BUCKET/PREFIX]

1,000 classes; 13 labels of each class, from a list of 1,281,167 names; 10,000 validation and 50,000 test images; a
gallery of 1,000,000 images in 1,000 tars; a transfer set of 153,600 images with 4 views. The images have 32 pixels and
are drawn by the miniverse, whose teacher embeds them. Everything runs at a tenth of these counts first, and then whole,
so that memory which grows with the counts is seen:

1. the job on disk, with one training worker;
2. TRANSFER again with four workers, one of which is killed;
3. the plan of a comparison of four methods;
4. the work of the driver without any image at 15 million gallery images and 100 epochs;
5. with ``--s3`` (an S3 server whose address and keys are in the environment): the tenth on S3, through a proxy that
   counts requests.

``FOLDER/rehearsal.md`` and ``.json`` contain what was seen. ``--share`` makes everything smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(Path(__file__).resolve().parent)]

from rehearsal import draw, dry, report, upload, watch  # noqa: E402

STAGES = {"labels", "adapt", "index", "curate", "hygiene", "teach", "transfer", "finetune", "evaluate"}
TENTH = 0.1
VIEWS, BATCH = 4, 512
LIMIT = 5400.0
METHODS = "[oriented retrieved, agnostic retrieved, oriented generic, scratch]"


@dataclass
class Job:
    """What was seen of a job.

    Attributes:
        seconds: from the command to its end.
        stages: by name, what `watch.Watch` saw.
        result: the content of ``result.json``.
        first_batch: seconds from the start of TRANSFER to its first step, or None.
        requests: requests to S3 by kind.
    """

    name: str
    code: int
    seconds: float
    stages: dict[str, watch.StageSeen]
    result: dict[str, Any] = field(default_factory=dict)
    first_batch: float | None = None
    requests: dict[str, int] = field(default_factory=dict)


def keys(labels: Path, gallery: str, store: str, counts: draw.Counts) -> list[str]:
    # Every view once: all windows are read.
    steps = counts.transfer * VIEWS // BATCH
    return [
        f"store={store}",
        f"task.data={labels}",
        f"task.labels_per_class={counts.labels_per_class}",
        f"gallery.data={gallery}",
        "teacher.name=miniverse",
        "teacher.adapt=probe",
        f"image_size={draw.SIDE}",
        "student.name=test_resnet",
        "student.kwargs={output_stride: 8}",
        f"transfer.size={counts.transfer}",
        f"teach.views={VIEWS}",
        "teach.mode=cached",
        "train.resident_bytes=0",
        f"train.batch_size={BATCH}",
        f"train.steps={steps}",
        "finetune.steps=60",
        "baselines.scratch=false",
    ]


def run(name: str, folder: Path, words: list[str], job: str = "distill", during: Callable[[str], None] = print) -> Job:
    """Run a job and watch it. ``during`` gets the mark of its processes when TRANSFER makes progress."""
    mark = uuid.uuid4().hex
    log = folder / f"{name}.log"
    began = time.monotonic()
    environment = {**os.environ, watch.MARK: mark, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / f"jobs/{job}.py"), *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = watch.Watch(mark, process.pid, STAGES)
    limit = threading.Timer(LIMIT, process.send_signal, [signal.SIGINT])
    limit.start()
    told, started, first = False, None, None
    with open(log, "w", buffering=1) as out:
        assert process.stdout is not None
        for line in process.stdout:
            out.write(f"{time.monotonic() - began:8.1f} {line}")
            seen.line(line)
            if line.startswith("transfer: "):
                started = started or time.monotonic()
                if first is None and not line.startswith("transfer: 0/"):
                    first = time.monotonic() - started
                if first is not None and not told:
                    told = True
                    during(mark)
    code = process.wait()
    limit.cancel()
    found = Job(name, code, time.monotonic() - began, seen.stop(), first_batch=first)
    for line in log.read_text().splitlines():
        if "result.json" in line:
            path = Path(line.split()[-1].strip("'."))
            found.result = json.loads(path.read_text()) if path.exists() else found.result
    print(f"{name}: exit {code}, {found.seconds:.0f} s", flush=True)
    return found


def kill_one(mark: str) -> None:
    """Kill one training worker."""
    several = watch.workers(mark, b"RayTrainWorker")
    if len(several) < 2:
        print(f"only {len(several)} training worker is found: none is killed", flush=True)
        return
    os.kill(several[-1], signal.SIGKILL)


def turn(folder: Path, counts: draw.Counts, cores: int) -> list[Job]:
    """The jobs on disk at these counts."""
    labels = draw.labelled(folder / "labels", counts, cores)
    gallery = draw.gallery(folder / "gallery", counts.gallery, cores)
    common = keys(labels, str(gallery), str(folder / "store"), counts)
    jobs = [run("disk", folder, common)]
    four = [*common, "cluster.workers=4", "seed=1", "finetune.steps=0", "train.checkpoint_seconds=5"]
    jobs.append(run("four-workers", folder, four, during=kill_one))
    jobs.append(run("compare-plan", folder, ["--plan", *common, f"compare.ways={METHODS}"], job="compare"))
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--s3", default="")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    folder = given.folder.resolve()
    whole = draw.Counts().share(given.share)
    tenth = draw.Counts().share(given.share * TENTH)
    found: dict[str, list[Job]] = {"tenth": turn(folder / "tenth", tenth, cores)}
    if given.s3:
        found["s3"] = [upload.on_s3(given.s3, folder / "tenth", tenth, run, keys)]
    found["whole"] = turn(folder / "whole", whole, cores)
    counted = dry.driver(whole.transfer, whole.labels_per_class * draw.CLASSES)
    text = report.text(tenth, whole, found, counted)
    (folder / "rehearsal.md").write_text(text)
    everything = {name: [asdict(job) for job in jobs] for name, jobs in found.items()}
    (folder / "rehearsal.json").write_text(json.dumps(everything | {"dry": counted}, indent=1))
    print(text)
    return max(job.code for jobs in found.values() for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
