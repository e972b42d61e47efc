"""The doctor: a healthy cluster is told as such, and each thing that can be wrong is named with its remedy."""

import http.server
import threading

import pytest
import ray
from heard import heard

from ktray import recipe as recipes
from ktray.accounting.device import versions
from ktray.distributed.doctor import checks, pairs, run
from ktray.distributed.doctor.probe import ProbeRequest, probe
from ktray.distributed.nodes import on_node
from ktray.errors import KtrayError

NAMES = ["versions", "store", "checkpoints", "GPUs", "clocks", "plan", "decoding", "network", "token", "MLflow"]


def a_probe(**changed):
    made = {"host": "a", "versions": {"ray": "2.60.0", "python": "3.12.1"}, "gpus": 0, "store": None, "files": {}}
    return {**made, "decode": 900.0, **changed}


def test_a_healthy_cluster_passes_every_check(cluster, tmp_path):
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(b"x")
    recipe = recipes.load(None, [f"store={tmp_path / 'store'}", f"teacher.checkpoint={checkpoint}"])
    found = list(run.examine(recipe))
    assert [check.name for check in found] == NAMES
    assert {check.state for check in found if check.name != "decoding"} == {"ok"}  # a busy machine decodes slowly
    assert "2 CPUs" in next(check.found for check in found if check.name == "plan")
    assert list((tmp_path / "store").glob(".doctor-*")) == []


def test_the_quick_form_and_a_single_node(cluster, tmp_path):
    recipe = recipes.load(None, [f"store={tmp_path}", "teacher.checkpoint=/nowhere/x.pt", "cluster.workers=500"])
    found = {check.name: check for check in run.examine(recipe, quick=True)}
    assert list(found) == NAMES[:6]
    assert "'/nowhere/x.pt' does not exist" in found["checkpoints"].found
    assert "500 training workers do not fit" in found["plan"].found
    assert "cluster.workers" in found["plan"].remedy
    told = []
    heard(told, run.require, recipe)  # one node: nothing to compare, and the job itself says the rest
    assert told == []
    with pytest.raises(KtrayError, match=r"2 check\(s\) failed: checkpoints, plan"):
        heard(told, run.show, recipe)
    assert told[2].startswith("FAIL  checkpoints")


def test_a_node_that_sees_another_store_is_told(tmp_path):
    found = probe(ProbeRequest(str(tmp_path), "token", decode=False), "node")
    assert "not the same place" in found["store"]
    (tmp_path / "token").mkdir()
    (tmp_path / "token" / "driver").write_text("driver")
    assert probe(ProbeRequest(str(tmp_path), "token", decode=False), "node")["store"] is None
    assert (tmp_path / "token" / "node").read_text() == "node"


def test_other_versions_are_named():
    here = {"ray": "2.60.0", "python": "3.12.1"}
    assert checks.versions_alike(here, {"1": a_probe()}).state == "ok"
    found = checks.versions_alike(here, {"1": a_probe(), "2": a_probe(host="b", versions={"ray": "2.59.0"})})
    assert found.state == "FAIL"
    assert "b has ray 2.59.0, the driver 2.60.0" in found.found
    assert "b has python none" in found.found
    assert checks.versions_alike(versions(), {}).state == "ok"


def test_a_store_that_is_each_nodes_own_is_told():
    assert checks.store_shared("/data", {"1": a_probe()}, []).state == "ok"
    assert "b: the driver cannot see" in checks.store_shared("/data", {"1": a_probe()}, ["b"]).found
    assert "a: denied" in checks.store_shared("/data", {"1": a_probe(store="denied")}, []).found


def test_gpus_that_torch_does_not_see_are_told():
    assert checks.gpus_seen({"1": a_probe(gpus=2)}, {"1": 2.0}).state == "ok"
    found = checks.gpus_seen({"1": a_probe(gpus=0)}, {"1": 2.0})
    assert (found.state, found.found) == ("FAIL", "a: Ray counts 2, torch sees 0")


@pytest.mark.parametrize(
    ("skew", "state"),
    [((0.5, 0.01), "ok"), ((-20.0, 0.1), "warn"), ((90.0, 0.1), "FAIL"), ((90.0, 88.0), "ok")],
)
def test_clocks(skew, state):
    found = checks.clocks_agree({"1": (0.0, 0.0), "2": skew}, {"1": "a", "2": "b"})
    assert found.state == state
    assert state == "ok" or found.found.startswith("b differs by")


def test_a_slow_node_is_named():
    assert checks.decodes_fast({"1": a_probe()}).state == "ok"
    found = checks.decodes_fast({"1": a_probe(), "2": a_probe(host="b", decode=40.0)})
    assert found.state == "warn"
    assert "on b" in found.found


def test_nodes_that_cannot_meet_are_told(cluster, monkeypatch):
    node = ray.nodes()[0]["NodeID"]
    assert pairs.meet(node, node, on_node, gpus=False) is None
    monkeypatch.setattr(pairs, "_SECONDS", 3)
    monkeypatch.setattr(pairs, "meeting_place", lambda: ("127.0.0.1", "no port"))
    assert pairs.meet(node, node, on_node, gpus=False)
    found = checks.network([("a", "b", "refused")], 3)
    assert found.state == "FAIL"
    assert "GLOO_SOCKET_IFNAME" in found.line
    assert pairs.pairs(["a", "b", "c"], every=True) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs.pairs(["a", "b", "c"], every=False) == [("a", "b"), ("b", "c")]


def test_those_meet_who_would_train_together():
    nodes = {
        "head": {"Resources": {}},
        "a": {"Resources": {"CPU": 16.0}},
        "b": {"Resources": {"CPU": 16.0, "GPU": 1.0}},
        "c": {"Resources": {"CPU": 16.0, "GPU": 1.0}},
    }
    seen = {name: a_probe(gpus=1 if name in "bc" else 0) for name in nodes}
    assert run.trainers(nodes, seen, "auto") == (["b", "c"], True)
    assert run.trainers(nodes, seen, False) == (["a", "b", "c"], False)
    blind = {**seen, "b": a_probe(gpus=0), "c": a_probe(gpus=0)}
    assert run.trainers(nodes, blind, "auto") == (["a", "b", "c"], False)


@pytest.mark.parametrize(("code", "state"), [(200, "warn"), (401, "ok"), (500, "warn")])
def test_a_dashboard_without_a_token_is_told(code, state):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = checks.guarded(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert found.state == state
    assert checks.guarded(None).state == "ok"
    assert "cannot be reached" in checks.guarded(f"http://127.0.0.1:{server.server_port}").found  # it is closed by now


def test_an_mlflow_server_that_is_away_is_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter22@127.0.0.1:9")
    found = run._mlflow(recipes.load(None, []))
    assert found.state == "FAIL"
    assert "hunter22" not in found.line
