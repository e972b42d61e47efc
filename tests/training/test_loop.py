import dataclasses
import itertools
import json
import math
import pickle
import shutil
import time

import pytest
import torch
from payloads import write_torch
from safetensors.torch import load_file
from torch import nn

from ktray.recipe.schema import FinetuneConfig
from ktray.training.average import Average
from ktray.training.loop import (
    Trainer,
    TrainerCallbacks,
    TrainerSettings,
    TrainingProgram,
)
from ktray.training.messages import Started, StepProgress
from ktray.training.optimisation import decay_groups, learning_rate

SETTINGS = TrainerSettings(steps=40, lr=0.05, weight_decay=0.01, warmup=0.1, ema=0.9, clip=1.0, seed=3, evals=4)


class Regression(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, generator):
        noise = torch.randn(batch["x"].shape, generator=generator) * 0.01
        return {"loss": ((self.model(batch["x"] + noise) - batch["y"]) ** 2).mean()}


def program(evaluate=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def batches(start, stop):
        for step in range(start, stop):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(16, 4, generator=g)
            yield {"x": x, "y": x.sum(1, keepdim=True)}

    return TrainingProgram(
        module=Regression(model),
        model=model,
        groups=decay_groups(model, 0.01),
        batches=batches,
        evaluate=evaluate,
        flops_per_step=10.0,
        images_per_step=16,
        device=torch.device("cpu"),
    )


class Recorder:
    """Keeps every save, and can stop the run after one as a kill would."""

    def __init__(self, root, stop_after=None):
        self.root, self.stop_after, self.saved, self.posts, self.n = root, stop_after, [], [], 0

    def folder(self):
        self.n += 1
        path = self.root / f"{self.n}"
        path.mkdir(parents=True)
        return path

    def save(self, folder, metrics, last):
        assert last == (folder / "weights.safetensors").exists()
        kept = self.root / f"kept-{len(self.saved)}"
        shutil.copytree(folder, kept)
        self.saved.append(kept)
        if self.stop_after and len(self.saved) == self.stop_after:
            raise InterruptedError

    @property
    def hooks(self):
        return TrainerCallbacks(save=self.save, progress=self.posts.append, folder=self.folder)


def test_settings_take_a_section_by_name_and_other_values_win():
    part = FinetuneConfig(steps=7, lr=0.25, evals=3)
    found = TrainerSettings.of(part, steps=9, clip=2.0, seed=4, keep="best")
    assert (found.steps, found.lr, found.evals, found.ema) == (9, 0.25, 3, part.ema)
    assert (found.clip, found.seed, found.keep) == (2.0, 4, "best")
    with pytest.raises(TypeError, match="clip"):
        TrainerSettings.of(part, seed=4)


def test_schedule_is_linear_then_half_cosine():
    s = TrainerSettings(steps=100, lr=1, weight_decay=0, warmup=0.1, ema=0, clip=1, seed=0)
    assert [learning_rate(i, s.steps, s.warmup) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(55, s.steps, s.warmup) == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert learning_rate(100, s.steps, s.warmup) == pytest.approx(0.0)


def test_average_equals_a_plain_loop():
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    expected = model.weight.detach().clone().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.state["weight"].double(), expected, rtol=1e-4, atol=1e-5)


class Fitting(nn.Module):
    """Rows do not see each other, so that the parts of a batch are worth as much as the whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rows = []

    def forward(self, batch, generator):
        self.rows.append(len(batch["x"]))
        return {"loss": ((self.model(batch["x"]) - batch["taught"]) ** 2).mean()}


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_trains_as_the_whole(tmp_path, parts):
    found = []
    for count in (1, parts):
        module, settings = Fitting(), TrainerSettings(**{**SETTINGS.__dict__, "accumulate": count})
        p = dataclasses.replace(program(), module=module, model=module.model, groups=decay_groups(module.model, 0.01))
        p.teach = lambda batch: {**batch, "taught": 2 * batch["x"].sum(1, keepdim=True)}
        recorder = Recorder(tmp_path / str(count))
        state = Trainer(p, settings, recorder.hooks).run()
        assert module.rows == [16 // count] * (count * settings.steps)
        found.append((load_file(recorder.saved[-1] / "weights.safetensors"), [row["loss"] for row in state.curve]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert found[0][1][-1] < found[0][1][0] / 2


def test_frozen_groups_rest_for_their_share_and_then_move(tmp_path):
    """The weights of the first layer are compared before, at and after the end of the share, 0.25 of 40 steps."""
    rests = program()
    first, last = rests.model[0], rests.model[2]
    rests.groups = [*decay_groups(first, 0.01, frozen=0.25), *decay_groups(last, 0.01)]
    weights = [(first.weight.detach().clone(), last.weight.detach().clone())]
    rests.after_step = lambda progress: weights.append((first.weight.detach().clone(), last.weight.detach().clone()))
    Trainer(rests, SETTINGS, Recorder(tmp_path).hooks).run()
    assert len(weights) == 41
    moved = [not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(weights)]
    assert moved[:10] == [False] * 10
    assert all(moved[10:39])
    assert all(not torch.equal(a[1], b[1]) for a, b in itertools.pairwise(weights[:40]))


def test_a_batch_that_cannot_be_cut_into_equal_parts_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"'x': 16.* 3 equal parts: see train.accumulate"):
        Trainer(program(), TrainerSettings(**{**SETTINGS.__dict__, "accumulate": 3}), Recorder(tmp_path).hooks).run()


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "checkpoint_seconds": 1e-9})
    whole = Recorder(tmp_path / "whole")
    Trainer(program(), settings, whole.hooks).run()
    broken = Recorder(tmp_path / "broken", stop_after=13)
    with pytest.raises(InterruptedError):
        Trainer(program(), settings, broken.hooks).run()
    half = json.loads((broken.saved[-1] / "outcome.json").read_text())["step"]
    assert 0 < half < settings.steps
    resumed = Recorder(tmp_path / "resumed")
    state = Trainer(program(), settings, resumed.hooks, resume=broken.saved[-1]).run()
    assert state.step == settings.steps
    assert state.finished
    a, b = load_file(whole.saved[-1] / "weights.safetensors"), load_file(resumed.saved[-1] / "weights.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    # A finished run is not trained again.
    again = Recorder(tmp_path / "again")
    assert Trainer(program(), settings, again.hooks, resume=resumed.saved[-1]).run().finished
    assert again.saved == []


def test_best_keeps_the_start_when_training_only_hurts(tmp_path):
    start = {}

    def evaluate(model):
        weight = model[0].weight.detach().clone()
        start.setdefault("w", weight)
        return (1.0 if torch.equal(weight, start["w"]) else 0.5), {"val_top1": 0.5}

    settings = TrainerSettings(**{**SETTINGS.__dict__, "keep": "best"})
    recorder = Recorder(tmp_path)
    state = Trainer(program(evaluate), settings, recorder.hooks).run()
    assert state.best_step == 0
    assert torch.equal(load_file(recorder.saved[-1] / "weights.safetensors")["0.weight"], start["w"])


def test_patience_stops_early_and_cost_counts_only_what_ran(tmp_path):
    scores = iter([0.1, 0.9] + [0.2] * 50)
    settings = TrainerSettings(**{**SETTINGS.__dict__, "steps": 400, "evals": 20, "patience": 3})
    recorder = Recorder(tmp_path)
    state = Trainer(program(lambda m: (next(scores), {})), settings, recorder.hooks).run()
    assert state.step == 20 * 4
    assert state.best_step == 20
    assert [post.step for post in recorder.posts if isinstance(post, StepProgress)][-1] == 80, (
        "the last steps are not accounted for"
    )


def test_flops_are_those_of_steps_validations_and_what_came_before(tmp_path):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "steps": 40, "evals": 4})
    p = program(lambda m: (0.5, {}))
    p.flops_per_evaluation, p.flops_before = 1_000.0, 50_000.0
    recorder = Recorder(tmp_path)
    state = Trainer(p, settings, recorder.hooks).run()
    totals = [post.flops for post in recorder.posts if isinstance(post, Started | StepProgress)]
    assert totals[0] == 50_000
    assert totals[-1] == 50_000 + 40 * 10 + 5 * 1_000  # the first of five validations is before the first step
    assert len(state.curve) == 5
    p.evaluate = None
    last = Trainer(p, settings, Recorder(tmp_path / "without").hooks)
    last.run()
    assert last._totals() == (40 * 16, 50_000 + 40 * 10)


def test_a_fall_within_the_tolerance_is_no_reason_to_stop(tmp_path):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "steps": 400, "evals": 20, "patience": 3})
    # 0.85 is a fall of chance; from the eighth evaluation on, three are below it in a row.
    scores = iter([0.1, 0.9, 0.7, 0.7, 0.85, 0.85, 0.85, 0.85, 0.7, 0.7, 0.7] + [0.95] * 50)
    p = program(lambda m: (next(scores), {}))
    p.tolerance = 0.1
    recorder = Recorder(tmp_path)
    state = Trainer(p, settings, recorder.hooks).run()
    assert state.step == 20 * 10
    assert (state.best_score, state.best_step) == (0.9, 20)


@pytest.mark.parametrize(("last", "kept"), [(0.85, "last"), (0.75, "best")])
def test_the_best_weights_are_kept_only_if_the_last_ones_are_worse_by_more_than_chance(tmp_path, last, kept):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "steps": 40, "evals": 4, "keep": "best"})
    seen, scores = [], iter([0.1, 0.9, 0.8, 0.8, last])

    def evaluate(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(scores), {"val_top1": 0.0}

    p, recorder = program(evaluate), Recorder(tmp_path)
    p.tolerance = 0.1
    state = Trainer(p, settings, recorder.hooks).run()
    assert (state.best_score, state.best_step) == ((last, 40) if kept == "last" else (0.9, 10))
    stored = load_file(recorder.saved[-1] / "weights.safetensors")
    for name, value in seen[4 if kept == "last" else 1].items():
        torch.testing.assert_close(stored[name], value)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    p = program()
    p.batches = lambda start, stop: iter([{"x": torch.full((4, 4), torch.nan), "y": torch.zeros(4, 1)}] * 40)
    with pytest.raises(FloatingPointError, match="step"):
        Trainer(p, SETTINGS, Recorder(tmp_path).hooks).run()


def test_slow_steps_are_saved_from_the_start(tmp_path):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "steps": 400, "checkpoint_seconds": 0.1})
    recorder = Recorder(tmp_path)
    p = program()
    stream = p.batches

    def slowly(start, stop):
        for step, batch in enumerate(stream(start, stop), start):
            if step >= 10:  # it was killed there
                raise InterruptedError
            time.sleep(0.05)
            yield batch

    p.batches = slowly
    with pytest.raises(InterruptedError):
        Trainer(p, settings, recorder.hooks).run()
    # A checkpoint each two steps of 0.05 s, or each step where the machine is slow.
    steps = [json.loads((folder / "outcome.json").read_text())["step"] for folder in recorder.saved]
    assert steps
    assert steps[0] <= 4
    assert steps[-1] >= 8


def test_a_resumed_checkpoint_runs_no_code(tmp_path):
    settings = TrainerSettings(**{**SETTINGS.__dict__, "checkpoint_seconds": 1e-9})
    recorder = Recorder(tmp_path / "one", stop_after=1)
    with pytest.raises(InterruptedError):
        Trainer(program(), settings, recorder.hooks).run()
    mark, saved = tmp_path / "mark", recorder.saved[0]
    write_torch(saved / "state.pt", mark)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        Trainer(program(), settings, Recorder(tmp_path / "two").hooks, resume=saved).run()
    assert not mark.exists()
