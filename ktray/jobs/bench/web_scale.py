"""The costs of a gallery of any size, computed from what `jobs/bench.py` measured on one machine.

    python -m ktray.jobs.bench.web_scale STORE/runs/BENCH [STORE/runs/MORE ...] [IMAGES] [ENCODER] [SIDE]

prints a table in Markdown: each step, its constant, whether the constant was measured or assumed, and the result.
Several runs with different benchmarks can be combined; they must be from the same machine. GPUs have the speed of
ktray's table (`ktray.accounting.speeds`), or that of their roofline (`ktray.accounting.roofline`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ktray.accounting.prices import hourly_price
from ktray.accounting.speeds import SHIPPED, shipped
from ktray.errors import KtrayError
from ktray.models.flops import forward_flops
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource
from ktray.models.traffic import forward_traffic
from ktray.pipeline.estimate import PlannedDevice, estimate
from ktray.pipeline.plan_stages import Line
from ktray.retrieval.faiss_index import CODES, ID_BYTES

# LAION-scale: DataComp-1B has 1.28 billion images; the paper's largest task has 19,210 queries.
IMAGES = 1.28e9
ENCODER, SIDE = "timm:vit_large_patch14_dinov2", 224
QUERIES = 19_210
GPUS = ("L4", "A100", "H100", "H200")
# An encoded image at 256 px, the default of img2dataset; its documentation gives about 100 KB at full size.
IMAGE_BYTES = 25e3
MEASURED, SCALED, ASSUMED, ROOFLINE = "measured", "measured, scaled", "assumed", "roofline"


@dataclass(frozen=True)
class Encoder:
    """The encoder of the gallery.

    Attributes:
        side: side of its input, pixels.
        flops: FLOPs of a forward pass for one image.
        values: values that it reads and writes for one image (`ktray.models.traffic`).
        dimensions: dimensions of its embeddings.
    """

    name: str
    side: int
    flops: float
    values: float
    dimensions: int

    @classmethod
    def of(cls, name: str, side: int) -> Encoder:
        """Count a value of ``teacher.name`` on the graph of its model, without weights."""
        model = build_teacher(TeacherSource(name, image_size=side), device="meta")
        shape = (3, *model.preprocess.size)
        tower = model.image_tower
        return cls(name, side, forward_flops(tower, shape), forward_traffic(tower, shape), int(model.embed_dim))


@dataclass(frozen=True)
class Step:
    """A row of the table."""

    what: str
    constant: str
    source: str
    result: str


def steps(rows: Sequence[dict[str, Any]], cores: int, images: float, encoder: Encoder) -> list[Step]:
    """Compute the rows of the table.

    Args:
        rows: rows of ``result.json`` of jobs/bench.py: the benchmarks ``read``, ``embed`` and ``search``.
        cores: number of cores of the machine on which they were measured.
        images: number of images in the gallery.
        encoder: the encoder that embeds them.

    Raises:
        KtrayError: a benchmark is missing.
    """
    flops, dimensions = encoder.flops, encoder.dimensions
    read, *_ = _named(rows, "decode", "read")
    embed = max(_named(rows, "embed", "embed"), key=lambda r: float(r["facts"]["flops_per_image"]))
    exact, *_ = _named(rows, "exact search", "search")
    short, *_ = _named(rows, "compressed search", "search")
    core_hour = hourly_price({"cores": 1, "gpus": []}, {}) or 0.0
    decode = median(read["reached"]) / cores
    out = [
        Step("images, encoded", f"{IMAGE_BYTES / 1e3:.0f} kB each", ASSUMED, f"{images * IMAGE_BYTES / 1e12:,.0f} TB"),
        Step(
            "decode, crop, fingerprint",
            f"{decode:,.0f} images/s a core (500 x 375)",
            MEASURED,
            _hours(images / decode, core_hour, "core"),
        ),
    ]
    rate = median(embed["reached"]) * float(embed["facts"]["flops_per_image"])
    name = embed["name"].partition(", ")[2]
    out.append(
        Step(
            "embed on this machine",
            f"{rate / 1e9:,.0f} GFLOP/s with {name}",
            SCALED,
            _hours(images * flops / rate, core_hour * cores, "machine"),
        )
    )
    out += [_on_gpu(gpu, images, encoder) for gpu in GPUS]
    vectors = images * dimensions * 2
    out.append(Step("embeddings", f"{dimensions} x 2 bytes", "arithmetic", f"{vectors / 1e12:,.2f} TB"))
    bytes_per_row = float(exact["facts"]["table_bytes_per_row"])
    out.append(
        Step(
            "uris, hashes, captions",
            f"{bytes_per_row:.0f} bytes an image",
            MEASURED,
            f"{images * bytes_per_row / 1e9:,.0f} GB",
        )
    )
    products = median(exact["reached"]) * float(exact["facts"]["rows"]) * float(exact["facts"]["dimensions"]) * 2
    seconds = QUERIES * images * dimensions * 2 / products
    out.append(
        Step(
            f"exact search, {QUERIES:,} queries",
            f"{products / 1e9:,.0f} GFLOP/s with {exact['facts']['rows']:,} rows",
            SCALED,
            _hours(seconds, core_hour * cores, "machine"),
        )
    )
    best, least = CODES[0] + ID_BYTES, CODES[-1] + ID_BYTES
    out.append(
        Step(
            "compressed index in memory or mapped",
            f"{least} to {best} bytes a row; {float(short['facts']['bytes_per_row']):.0f} as built here",
            MEASURED,
            f"{images * least / 1e9:,.0f} to {images * best / 1e9:,.0f} GB",
        )
    )
    built = float(short["facts"]["build_seconds"]) / float(short["facts"]["rows"])
    out.append(
        Step(
            "build it (train, fill, merge, measure)",
            f"{built * 1e6:,.0f} us a row ({short['facts']['factory']})",
            SCALED,
            _hours(built * images, core_hour * cores, "machine"),
        )
    )
    recall = float(short["facts"]["recall_at_100"])
    out.append(
        Step(
            "compressed search, a query",
            f"{1e3 / median(short['reached']):,.1f} ms, {short['facts']['rows']:,} rows, recall {recall:.0%} at 100",
            MEASURED,
            "not extrapolated: it depends on the number of cells that the recall needs",
        )
    )
    return out


def _on_gpu(gpu: str, images: float, encoder: Encoder) -> Step:
    """The encoder on a GPU, without decoding."""
    device = PlannedDevice.named(gpu, {})
    speed = shipped({"stage": "index", "model": encoder.name, "size": encoder.side, "device": gpu})
    work = Line("index", images * encoder.flops, 0, "", images)
    found = estimate(work, images * encoder.values, speed, device)
    rates = f"{images / found.device_seconds:,.0f} images/s, {work.flops / found.device_seconds / 1e12:,.0f} TFLOP/s"
    source = MEASURED if found.source == SHIPPED else ROOFLINE
    return Step(f"embed on {gpu}", rates, source, _hours(found.device_seconds, device.hourly or 0.0, "GPU"))


def _named(rows: Sequence[dict[str, Any]], start: str, bench: str) -> list[dict[str, Any]]:
    rows_named = [row for row in rows if row["name"].startswith(start)]
    if not rows_named:
        raise KtrayError(
            f"The runs have no figure for '{start}'", f"Run jobs/bench.py bench.only=[{bench}] and add its run folder."
        )
    return rows_named


def table(steps_of_table: Sequence[Step], images: float) -> str:
    """Format the steps as a Markdown table."""
    lines = [f"| for {images:,.0f} images | constant | | takes |", "|---|---|---|---|"]
    lines += [f"| {s.what} | {s.constant} | {s.source} | {s.result} |" for s in steps_of_table]
    return "\n".join(lines) + "\n"


def _hours(seconds: float, price: float, unit: str) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} {unit}-hours, ${hours * price:,.0f}"


def main(arguments: Sequence[str]) -> None:
    """Print the table for run folders of jobs/bench.py.

    Raises:
        KtrayError: the runs are from different machines, or a benchmark is missing.
    """
    encoders = [text for text in arguments if ":" in text and "://" not in text]
    folders = [text for text in arguments if not _number(text) and text not in encoders]
    results = [json.loads((Path(folder) / "result.json").read_text()) for folder in folders]
    machines = {(r["device"]["cpu"], r["device"]["cores"]) for r in results}
    if len(machines) != 1:
        raise KtrayError(
            f"The runs are from {len(machines)} machines: {sorted(machines)}", "Name only runs from one machine."
        )
    rows = [row for result in results for row in result["rows"]]
    numbers: list[float] = [float(text) for text in arguments if _number(text)]
    images, side = [*numbers, *[IMAGES, float(SIDE)][len(numbers) :]]
    ((_, cores),) = machines
    encoder = Encoder.of(encoders[0] if encoders else ENCODER, int(side))
    print(table(steps(rows, int(cores), images, encoder), images))


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
