"""Two jobs that come to the same stage."""

import json
import multiprocessing
import time
from dataclasses import dataclass
from types import SimpleNamespace

from heard import heard

from ktray.accounting.attempts import DirLog, attempts
from ktray.accounting.device import describe_device
from ktray.accounting.ledger import Ledger
from ktray.data.quarantine import BadLimit
from ktray.recipe.cluster import ClusterConfig
from ktray.stages.base import Runtime, run_stage
from ktray.stages.inputs import StageInputs
from ktray.storage import lease
from ktray.storage.store import Store


@dataclass(frozen=True)
class Tiny(StageInputs):
    stage = "tiny"
    version = 1

    value: int = 1


def runtime(store, run):
    """As little of a run as a stage needs."""
    tracker = SimpleNamespace(stage=lambda name: SimpleNamespace(finish=lambda values, status: None))
    plan = SimpleNamespace(least=1, workers=1, worker_gpus=0.0)
    return Runtime(
        store=store, plan=plan, ledger=Ledger(describe_device(), run), tracker=tracker, run_id=run,
        cluster=ClusterConfig(), bad_limit=BadLimit(0.1),
    )  # fmt: skip


def _job(uris, run, ready, out):
    lease._POLL_S = 0.05
    for uri in uris:
        store = Store(uri)

        def work(inputs, services, stage, reporter):
            stage.write("made", run.encode())
            time.sleep(1.0)
            return {"by": run}

        ready.wait(120)
        done = run_stage(runtime(store, run), Tiny(), work)
        out.put((uri, run, done.cached, done.manifest["by"]))


def test_of_two_jobs_at_once_one_makes_the_stage_and_both_have_it(tmp_path, s3):
    places = [str(tmp_path), s3.home]
    spawn = multiprocessing.get_context("spawn")
    ready, out = spawn.Barrier(2), spawn.Queue()
    jobs = [spawn.Process(target=_job, args=(places, run, ready, out)) for run in ("a", "b")]
    for job in jobs:
        job.start()
    found = [out.get(timeout=120) for _ in range(4)]
    for job in jobs:
        job.join()
    for place in places:
        ended = sorted(rest for uri, *rest in found if uri == place)
        assert [run for run, _, _ in ended] == ["a", "b"]
        assert sorted(cached for _, cached, _ in ended) == [False, True]
        (maker,) = [run for run, cached, _ in ended if not cached]
        assert {by for _, _, by in ended} == {maker}
        (key,) = Store(place).sub("stages/tiny").children()
        stage = Store(place).stage("tiny", key)
        assert stage.read("made").decode() == maker
        assert [entry.run for entry in attempts(DirLog(stage).read())] == [maker]


def test_a_job_that_lost_its_stage_goes_on_with_what_the_other_made(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    store, told, tries = Store(str(tmp_path)), [], []

    def work(inputs, services, stage, reporter):
        tries.append(1)
        # Another job thought this one dead, took over, made the stage and is gone.
        folder = stage.sub("lease")
        assert folder.create("00000002.json", json.dumps({"owner": "other", "pid": 0}).encode())
        stage.write_json("manifest.json", {"by": "other", "key": stage.uri.rsplit("/", 1)[1], "files": {}})
        assert folder.create("00000003.json", json.dumps({"free": True, "by": "other"}).encode())
        return {"by": "me"}

    done = heard(told, run_stage, runtime(store, "mine"), Tiny(), work)
    assert done.cached
    assert done.manifest["by"] == "other"
    assert len(tries) == 1
    assert any("taken over" in text for text in told)
