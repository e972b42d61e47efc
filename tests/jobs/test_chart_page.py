"""MLflow's page as a browser draws it: the chart's form is no public interface, so only this shows that it holds."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from ktray.jobs import chart
from ktray.tracking.tracker import Tracker

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
# Way, seed, its comparison, and what the charts show: accuracy, FLOPs, device-seconds.
RUNS = [
    ("oriented", 0, "c1", 0.80, 9.0e12, 95.0),
    ("oriented", 1, "c1", 0.84, 9.4e12, 93.0),
    ("agnostic", 0, "c1", 0.55, 5.0e12, 40.0),
    ("agnostic", 1, "c1", 0.51, 5.2e12, 44.0),
    ("scratch", 0, "c1", 0.25, 1.0e12, 12.0),
    ("scratch", 1, "c1", 0.23, 1.1e12, 10.0),
    ("scratch", 9, "c0", 0.30, 2.0e12, 20.0),
]


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    """A server with runs of a comparison and one other, all with a stage, logged as jobs log them."""
    home = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{shutil.copy(database, home)}"
    for way, seed, comparison, accuracy, flops, seconds in RUNS:
        name = f"{way}, seed {seed}"
        files = home / name
        tracker = Tracker(uri, "ktray", files / "log.jsonl", files / "mlflow.json", home)
        tracker.start(name, tags={"compare": comparison, "way": way, "mlflow.runName": name})
        tracker.stage("transfer").finish({"flops": 1.0})
        cost = {"cost.without_cache_flops": flops, "cost.without_cache_device_seconds": seconds}
        tracker.final({"test.top1": accuracy, **cost})
        tracker.finish()
        assert tracker.close(60) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "server.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 90
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            assert process.poll() is None, (home / "server.txt").read_text()
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.3)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(30)


def page(url, folder):
    """What the page holds once it has come to rest; a picture of it is left in ``folder``."""
    picture = folder / "chart.png"
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    command = [BROWSER, "--headless=new", *(f"--{word}" for word in quiet.split()), "--window-size=1900,1000"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", f"--screenshot={picture}"]
    found = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=90, check=True)
    return found.stdout, Image.open(picture)


def points(dom):
    """(n, 2) pixels of each scatter chart's points."""
    charts = [part.split("</svg>")[0] for part in dom.split('class="scatterlayer')[1:]]
    pattern = r'<path class="point[^"]*" transform="translate\(([\d.]+),([\d.]+)\)"'
    return [np.array(re.findall(pattern, chart), float) for chart in charts]


@pytest.mark.parametrize("comparison", [None, "c1"])
def test_the_page_draws_runs_or_the_means_of_ways_at_cost_and_accuracy(server, tmp_path, comparison):
    dom, picture = page(chart.preset(server, "ktray", comparison), tmp_path)
    assert "Cost against accuracy" in dom
    assert 'aria-label="Sort: test.top1"' in dom
    assert re.findall(r'<text class="([xy])title"[^>]*>([^<]*)<', dom) == [
        ("x", "cost.without_cache_flops"),
        ("y", "test.top1"),
        ("x", "cost.without_cache_device_seconds"),
        ("y", "test.top1"),
    ]
    shown = [np.array(run[3:]) for run in RUNS]
    if comparison:
        ways = ["oriented", "agnostic", "scratch"]
        shown = [np.mean([run[3:] for run in RUNS if run[0] == way and run[2] == comparison], 0) for way in ways]
        # The list of runs beside the charts, under the names of the ways, best first.
        rows = re.findall(r'row-index="(\d+)" row-id="tag\.way\.([^".]+)"', dom)
        assert [way for _, way in sorted(set(rows), key=lambda row: int(row[0]))] == ways
    accuracy, *costs = np.array(shown).T
    drawn = points(dom)
    assert [len(chart) for chart in drawn] == [len(shown)] * 2
    for pixels, cost in zip(drawn, costs, strict=True):
        pixels = pixels[pixels[:, 0].argsort()]
        order = cost.argsort()
        for at, value, direction in ((pixels[:, 0], cost[order], 1), (pixels[:, 1], accuracy[order], -1)):
            slope, start = np.polyfit(value, at, 1)
            assert np.sign(slope) == direction
            assert np.allclose(start + slope * value, at, atol=1.0)  # pixels
    assert len(set(picture.convert("RGB").resize((190, 100)).getdata())) > 50  # not blank
