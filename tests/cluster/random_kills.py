"""Ten runs of a small job, with SIGKILL at random moments to a random process: driver, worker, raylet or GCS (Linux).

    python tests/cluster/random_kills.py [RUNS] [SEED]

Whatever ends the job, the same command is given again. Each run must end with the accuracy of an undisturbed one, its
stages whole, one run folder, no less compute in its accounts, and no process left. Some 10 minutes on 2 cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from small_task import SMALL, write_gallery, write_task  # noqa: E402

from ktray.pipeline.run_folder import RUNNING  # noqa: E402
from ktray.storage.store import Store  # noqa: E402

MARK = "KTRAY_KILLS"
KINDS = ("driver", "worker", "worker", "raylet", "gcs")
MOST_KILLS = 3
LIMIT = 420.0  # seconds that an attempt may take; more is a hang


def command(root: Path, store: Path) -> list[str]:
    keys = [f"store={store}", *SMALL, f"task.data={root / 'task'}", f"gallery.data={root / 'gallery'}"]
    keys += ["train.steps=120", "train.checkpoint_seconds=1", "baselines.scratch=false"]
    # One thread: beside a busy program a training takes fewer threads, which changes the last digits.
    keys += ["cluster.jobs=2"]
    return [sys.executable, str(ROOT / "jobs/distill.py"), *keys]


def ours(mark: str) -> dict[int, str]:
    """Command lines of the live processes that were started under this mark, whoever their parent is now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # A zombie has neither.
            settings, words = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in settings.split(b"\0"):
            found[int(folder.name)] = words.replace(b"\0", b" ").decode(errors="replace")
    return found


def victims(driver: int, mark: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {"driver": [driver], "worker": [], "raylet": [], "gcs": []}
    for pid, words in sorted(ours(mark).items()):
        program = words.split(" ")[0].rpartition("/")[2]
        if program in ("raylet", "gcs_server"):
            groups[program.partition("_")[0]].append(pid)
        elif words.startswith("ray::") or "default_worker.py" in words:
            groups["worker"].append(pid)
    return groups


def attempt(
    words: list[str], environment: dict[str, str], log: Path, wait: float, rng: random.Random
) -> tuple[int, str]:
    """One start of the job, with a kill after ``wait`` seconds (0: none); its return code and who was killed."""
    mark = environment[MARK]
    with open(log, "a") as stream:
        job = subprocess.Popen(words, env=environment, stdout=stream, stderr=stream)
        killed = ""
        began = time.monotonic()
        while job.poll() is None:
            gone = time.monotonic() - began
            if gone > LIMIT:
                job.kill()
                raise AssertionError(f"a silent hang: no end after {gone:.0f} s (killed: {killed or 'nobody'}); {log}")
            if wait and not killed and gone > wait:
                groups = victims(job.pid, mark)
                kind = rng.choice([k for k in KINDS if groups[k]])
                os.kill(rng.choice(groups[kind]), signal.SIGKILL)
                killed = f"{kind} at {gone:.0f} s"
            time.sleep(0.1)
    return job.returncode, killed


def left(mark: str, seconds: float = 120.0) -> list[str]:
    """Processes that do not end by themselves."""
    until = time.monotonic() + seconds
    while (found := ours(mark)) and time.monotonic() < until:
        time.sleep(0.5)
    return [f"{words.strip()[:80]} ({_about(pid)})" for pid, words in found.items()]


def _about(pid: int) -> str:
    """State and parent of a process, and what it waits for."""
    with contextlib.suppress(OSError):
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        told = [" ".join(line.split()) for line in lines if line.startswith(("State:", "PPid:", "Threads:"))]
        return ", ".join([f"pid {pid}", *told, "in " + (Path("/proc") / str(pid) / "wchan").read_text()])
    return "has ended by now"


def finished(store: Path) -> bool:
    """Whether a run came to its end here, though its process may have been killed while it said goodbye."""
    return any(not (file.parent / RUNNING).exists() for file in (store / "runs").glob("*/result.json"))


def check(store: Path, plain: dict) -> dict:
    """The result of a run, after all that must be true of it was seen to be."""
    (file,) = (store / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["metric"] == plain["metric"], (result["metric"], plain["metric"])
    assert len(list((store / "runs").iterdir())) == 1, "the run was begun anew"
    opened = Store(str(store))
    for manifest in (store / "stages").glob("*/*/manifest.json"):
        assert opened.stage(manifest.parents[1].name, manifest.parent.name).manifest() is not None
    assert {s["name"] for s in result["stages"]} == {s["name"] for s in plain["stages"]}
    assert result["cost"]["flops"]["transfer"] >= 0.99 * plain["cost"]["flops"]["transfer"]
    return result


def main(runs: int, seed: int) -> None:
    root = Path(tempfile.mkdtemp(prefix="kt-kills-"))  # stays where a check fails
    write_task(root / "task")
    write_gallery(root / "gallery")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"  # a minute by default, for each GCS that is killed
    began = time.monotonic()
    words = command(root, root / "plain")
    code, _ = attempt(words, environment | {MARK: uuid.uuid4().hex}, root / "plain.log", 0.0, random.Random())
    assert code == 0, (root / "plain.log").read_text()[-2000:]
    took = time.monotonic() - began
    (file,) = (root / "plain" / "runs").glob("*/result.json")
    plain = json.loads(file.read_text())
    print(f"undisturbed: {took:.0f} s, test {plain['metric']['test']:.3f}", flush=True)
    hit: Counter[str] = Counter()
    for number in range(runs):
        rng = random.Random(f"{seed}-{number}")
        store, mark, log = root / f"store-{number}", uuid.uuid4().hex, root / f"{number}.log"
        # The number format is measured once a store, and may end otherwise in another.
        shutil.copytree(root / "plain" / "precision", store / "precision")
        told, kills, starts = [], rng.randint(1, MOST_KILLS), 0
        while True:
            starts += 1
            wait = rng.uniform(1.0, 0.9 * took) if kills else 0.0
            kills = max(0, kills - 1)
            code, killed = attempt(command(root, store), environment | {MARK: mark}, log, wait, rng)
            if killed:
                hit[killed.split()[0]] += 1
                told.append(killed)
            remains = left(mark)
            assert not remains, f"processes stay after {killed}: {remains}"
            if code == 0 or (killed and finished(store)):
                break  # finished: the same command would be a second run, which finds all of its stages
            assert killed, f"the job failed by itself: {log.read_text()[-2000:]}"
        result = check(store, plain)
        attempts = sum(s["attempts"] for s in result["stages"])
        print(f"run {number}: {starts} starts, killed {', '.join(told) or 'nobody'}; {attempts} attempts", flush=True)
        shutil.rmtree(store)
    print(f"{runs} runs finished with the undisturbed result; killed: {dict(hit)}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
