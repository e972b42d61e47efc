"""The costs of a gallery of any size, computed from what `jobs/bench.py` measured on one machine.

    python -m ktray.jobs.bench.web_scale STORE/runs/BENCH [STORE/runs/MORE ...] [IMAGES [FLOPS_PER_IMAGE [DIMENSIONS]]]

prints a table in Markdown: each step, its constant, whether the constant was measured or assumed, and the result.
Several runs with different benchmarks can be combined; they must be from the same machine.
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
from ktray.errors import KtrayError
from ktray.pipeline.plan import RATES
from ktray.retrieval.faiss_index import CODES, ID_BYTES

# LAION-scale: DataComp-1B has 1.28 billion images; ViT-L/14 at 224 px; the paper's largest task has 19,210 queries.
IMAGES = 1.28e9
FLOPS = 162e9
DIMENSIONS = 768
QUERIES = 19_210
# An encoded image at 256 px, the default of img2dataset; its documentation gives about 100 KB at full size.
IMAGE_BYTES = 25e3
MEASURED, SCALED, ASSUMED = "measured", "measured, scaled", "assumed"


@dataclass(frozen=True)
class Step:
    """A row of the table."""

    what: str
    constant: str
    source: str
    result: str


def steps(rows: Sequence[dict[str, Any]], cores: int, images: float, flops: float, dimensions: int) -> list[Step]:
    """Compute the rows of the table.

    Args:
        rows: rows of ``result.json`` of jobs/bench.py: the benchmarks ``read``, ``embed`` and ``search``.
        cores: number of cores of the machine on which they were measured.
        images: number of images in the gallery.
        flops: FLOPs of the encoder's forward pass for one image.
        dimensions: dimensions of the encoder's embeddings.

    Raises:
        KtrayError: a benchmark is missing.
    """
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
    for device in ("L4", "A100", "H100"):
        price = hourly_price({"cores": 1, "gpus": [{"name": device}]}, {}) or 0.0
        constant = f"{RATES[device] / 1e12:,.0f} TFLOP/s (35% of the bf16 peak)"
        out.append(Step(f"embed on {device}", constant, ASSUMED, _hours(images * flops / RATES[device], price, "GPU")))
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
    folders = [text for text in arguments if not _number(text)]
    results = [json.loads((Path(folder) / "result.json").read_text()) for folder in folders]
    machines = {(r["device"]["cpu"], r["device"]["cores"]) for r in results}
    if len(machines) != 1:
        raise KtrayError(
            f"The runs are from {len(machines)} machines: {sorted(machines)}", "Name only runs from one machine."
        )
    rows = [row for result in results for row in result["rows"]]
    numbers: list[float] = [float(text) for text in arguments if _number(text)]
    images, flops, dimensions = [*numbers, *[IMAGES, FLOPS, float(DIMENSIONS)][len(numbers) :]]
    ((_, cores),) = machines
    print(table(steps(rows, int(cores), images, flops, int(dimensions)), images))


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
