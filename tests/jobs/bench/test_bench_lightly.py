"""The comparison with lightly-train: how it is called, and what is measured; where it is installed, for real."""

import importlib.util
import json
import os

import pytest
import torch

from ktray.jobs.bench.lesson import Case
from ktray.jobs.bench.lightly import PACKAGE, StepClock, lightly_rate

CASE = Case("test_resnet", 64, "timm:test_vit", 8, 24)

# A package with the function that is called. It trains as lightly-train does: by the model's methods, not its call.
STAND_IN = """
import json, os, pathlib, torch

def pretrain(**given):
    model = given.pop("model")
    model.eval()
    model.forward_features(torch.zeros(1, 3, 64, 64))  # e.g. to learn the size of the features
    model.train()
    side, batch = given["transform_args"]["image_size"][0], given["batch_size"]
    for _ in range(given["epochs"] * len(os.listdir(given["data"])) // batch):
        model.forward_features(torch.zeros(batch, 3, side, side))
    given["told"] = os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"]
    given["files"] = sorted(os.listdir(given["data"]))
    pathlib.Path(given["data"]).with_name("given.json").write_text(json.dumps(given))
"""


def test_it_is_called_with_the_pair_of_the_case(tmp_path, monkeypatch):
    package = tmp_path / "packages"
    package.mkdir()
    (package / f"{PACKAGE}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package)
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), *before]))
    assert lightly_rate(CASE, tmp_path, 5) > 0
    given = json.loads((tmp_path / "given.json").read_text())
    assert given["method_args"] == {"teacher": "timm/test_vit"}
    assert given["epochs"] == 1, "another one would start with new processes that read"
    assert given["batch_size"] == 8
    assert given["told"] == "1", "it would report its use over the network"
    assert given["files"] == [f"{number:08d}.jpg" for number in range(40)]
    assert not (tmp_path / "lightly-train").exists()


def test_without_it_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lightly_rate(CASE, tmp_path, 5) is None
    assert not list(tmp_path.iterdir())


def test_its_failure_costs_no_more_than_its_row(tmp_path, monkeypatch, caplog):
    package = tmp_path / "packages"
    package.mkdir()
    (package / f"{PACKAGE}.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", str(package))
    assert lightly_rate(CASE, tmp_path, 5) is None
    assert "lightly-train has no row, because it ended with exit code 1" in caplog.text


def test_steps_of_training_are_counted_from_the_half():
    clock, layer = StepClock(6), torch.nn.Identity()
    layer.register_forward_pre_hook(clock)
    for training in (False, True, True, False, True, True, True, True):
        layer.train(training)(torch.zeros(1))
    assert clock.seen == 6
    assert list(clock.times) == [3, 5]
    clock.times = {3: 10.0, 5: 14.0}
    assert clock.rate(8) == 2 * 8 / 4.0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="lightly-train is not installed")
def test_the_real_one_trains(tmp_path):
    assert lightly_rate(CASE, tmp_path, 8) > 0
