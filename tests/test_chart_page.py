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

import pytest
from PIL import Image

from ktray import chart
from ktray.tracking import Tracker

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
WAYS = {"oriented": (0.8, 9e12), "agnostic": (0.55, 5e12), "scratch": (0.25, 1e12)}
SEEDS = 2


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    """A server with runs of a comparison and one other, all with a stage, logged as jobs log them."""
    home = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{shutil.copy(database, home)}"
    runs = [(way, seed, {"compare": "c1", "way": way}) for way in WAYS for seed in range(SEEDS)]
    for way, seed, tags in [*runs, ("scratch", 9, {})]:
        name = f"{way}, seed {seed}"
        files = home / name
        tracker = Tracker(uri, "ktray", files / "log.jsonl", files / "mlflow.json", home)
        tracker.start(name, tags=tags)
        tracker.stage("transfer").finish({"flops": 1.0})
        accuracy, flops = WAYS[way]
        tracker.final(
            {
                "test.top1": accuracy + 0.02 * seed,
                "cost.without_cache_flops": flops * (1 + 0.05 * seed),
                "cost.without_cache_device_seconds": 10.0 + flops / 1e11,
            }
        )
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


@pytest.mark.parametrize(("comparison", "points"), [(None, len(WAYS) * SEEDS + 1), ("c1", len(WAYS))])
def test_the_page_draws_each_run_or_way_at_its_cost_and_accuracy(server, tmp_path, comparison, points):
    dom, picture = page(chart.preset(server, "ktray", comparison), tmp_path)
    assert "Cost against accuracy" in dom
    titles = re.findall(r'<text class="([xy])title"[^>]*>([^<]*)<', dom)
    assert titles == [
        ("x", "cost.without_cache_flops"),
        ("y", "test.top1"),
        ("x", "cost.without_cache_device_seconds"),
        ("y", "test.top1"),
    ]
    assert len(re.findall(r'<path class="point"', dom)) == 2 * points
    # The table beside the charts, best first; a way's runs stand under its name.
    names = ["oriented", "agnostic", "scratch"]
    assert [dom.index(name) for name in names] == sorted(dom.index(name) for name in names)
    assert len(set(picture.convert("RGB").resize((190, 100)).getdata())) > 50  # not blank
