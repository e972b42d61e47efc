"""Objectives through a whole pretraining in this process: what the student becomes, and what a restart changes."""

import contextlib
import gc
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from ktray.data.views import ViewPolicy
from ktray.models.compilation import Compilation
from ktray.recipe.choice import chosen
from ktray.recipe.schema import TrainConfig
from ktray.storage.columns import write_rows
from ktray.storage.store import Store
from ktray.tasks.base import task_kind
from ktray.training.inputs import Labels, StudentSpec, TargetSet
from ktray.training.loop import State, Trainer, TrainerCallbacks, TrainerSettings
from ktray.training.programs import TransferSpec
from ktray.training.worker import WorkerContext

C, D, SIZE, ROWS, STEPS = 3, 7, 32, 24, 8
SECTIONS = {
    "oriented_features": {"mixup": 0.2},
    "oriented_features alone": {"name": "oriented_features", "predictions": 0},
    "mtkd": {"mixup": 0.2},
    "specmatch": {"warmup": 0.25},
    "consistency": {"threshold": 0.4},
    "dual balanced": {"name": "dual", "balance": "gradients"},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Stored rows with every target, and labelled images of three brightnesses."""
    store, rng = Store(str(tmp_path_factory.mktemp("stored"))), np.random.default_rng(0)
    taught, labels = store.stage("teach", "0" * 16), store.stage("labels", "0" * 16)
    for shard in range(2):
        rows = {
            "pixels": rng.integers(0, 256, (ROWS // 2, 3, SIZE, SIZE), dtype=np.uint8),
            "view_id": np.arange(ROWS // 2) + shard * ROWS,
            "embedding": rng.normal(size=(ROWS // 2, D)).astype(np.float16),
            "logits": rng.normal(size=(ROWS // 2, C)).astype(np.float16),
        }
        write_rows(taught, f"shard-{shard}.parquet", rows)
    for split, column in (("train", "canvas"), ("val", "pixels")):
        label = np.arange(9) % C
        pixels = np.clip(60 * label[:, None, None, None] + rng.integers(0, 99, (9, 3, SIZE, SIZE)), 0, 255)
        write_rows(labels, f"{split}-0.parquet", {column: pixels.astype(np.uint8), "label": label})
    return store, taught, labels


def spec(stored, name):
    store, taught, labels = stored
    section = chosen({"name": name, **SECTIONS[name]})
    targets = tuple(sorted(section.traits.targets_needed))
    kind = task_kind("classification")
    shards = (("shard-0.parquet", ROWS // 2), ("shard-1.parquet", ROWS // 2))
    settings = TrainerSettings(STEPS, 1e-2, 0.05, 0.1, 0.9, 1.0, 3, evals=2, checkpoint_seconds=1e-6)
    return TransferSpec(
        settings,
        StudentSpec(kind, "test_resnet", {}, C, SIZE),
        TargetSet(taught, shards, 3 * SIZE**2, targets, embed_dim=D),
        Labels(labels, kind),
        ViewPolicy(),
        6 if section.traits.labelled else 0,
        section,
        TrainConfig(batch_size=8, precision="fp32"),
        "top1",
        store.sub("precision"),
    )


def train(job, root: Path, resume=None, stop=None, device=None):
    """Run to the end, or until the checkpoint number ``stop``; returns its folder."""
    saved = []

    def folder():
        path = root / f"{len(list(root.iterdir()))}"
        path.mkdir()
        return path

    def save(made, metrics, last):
        saved.append(Path(shutil.copytree(made, root / f"kept-{len(saved)}")))
        if stop is not None and len(saved) == stop:
            raise InterruptedError

    root.mkdir(parents=True, exist_ok=True)
    program = job.build(WorkerContext(device or torch.device("cpu"), 0, 1, 1.0))
    with contextlib.suppress(InterruptedError):
        Trainer(program, job.settings, TrainerCallbacks(save, lambda message: None, folder), resume).run()
    return saved[-1]


def test_a_training_may_go_on_with_or_without_compiling_and_validates_uncompiled(stored, tmp_path, monkeypatch):
    """The objective calls the student twice a step, with and without gradients."""
    sizes = []

    def seen(graph, inputs):
        sizes.extend(
            value.shape[0] for value in inputs if torch.is_tensor(value) and value.shape[1:] == (3, SIZE, SIZE)
        )
        return graph.forward

    def apply(self, model, forgiving=False):
        if self.mode:
            model.compile(backend=seen)

    monkeypatch.setattr(Compilation, "apply", apply)
    plain = spec(stored, "consistency")
    modes = {mode: replace(plain, part=plain.part.model_copy(update={"compile": mode})) for mode in (True, "graphs")}
    whole = load_file(str(train(plain, tmp_path / "plain") / "weights.safetensors"))
    for first, second in ((modes[True], plain), (plain, modes["graphs"])):
        sizes.clear()
        torch.compiler.reset()  # otherwise the code of the round before is used again
        half = train(first, tmp_path / f"half-{len(list(tmp_path.iterdir()))}", stop=1)
        ended = train(second, tmp_path / f"rest-{len(list(tmp_path.iterdir()))}", resume=half)
        assert sizes, "nothing was compiled"
        assert 9 not in sizes, "the nine images of validation were compiled"
        for key, value in load_file(str(ended / "weights.safetensors")).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-3, atol=1e-4, msg=key)


# On a CPU, the test of waits and memory shows only that it runs.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["oriented_features", "consistency", "dual balanced"])
def test_bfloat16_has_the_losses_and_the_flops_of_float32_on_a_cpu(stored, tmp_path, device, name):
    plain = spec(stored, name)
    # Steps that move would drift apart, and mixup and a threshold decide otherwise on another device.
    steady = {key: 0.0 for key in ("mixup", "threshold") if hasattr(plain.objective, key)}
    section = plain.objective.model_copy(update=steady)
    plain = replace(plain, settings=replace(plain.settings, lr=1e-8), objective=section)
    rounded = replace(plain, part=plain.part.model_copy(update={"precision": "bf16"}))
    found = []
    for job, where in ((plain, "cpu"), (rounded, device)):
        program = job.build(WorkerContext(torch.device(where), 0, 1, 1.0))
        state = State.load(train(job, tmp_path / f"{len(found)}", device=torch.device(where)))
        found.append((program.flops_per_step, [row["loss"] for row in state.curve if "loss" in row]))
    (flops, losses), (rounded_flops, rounded_losses) = found
    assert rounded_flops == flops
    assert len(losses) == 2
    assert rounded_losses == pytest.approx(losses, rel=0.05)
    assert rounded_losses != losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SECTIONS)
def test_a_step_does_not_wait_for_the_device_and_memory_is_given_back(stored, tmp_path, device, name):
    def used():
        gc.collect()
        return torch.cuda.memory_allocated() if device == "cuda" else 0

    def steps():
        program = spec(stored, name).build(WorkerContext(torch.device(device), 0, 1, 1.0))
        trainer = Trainer(program, spec(stored, name).settings, TrainerCallbacks(None, None, None))
        stream = program.batches(0, STEPS)
        # The first epoch of three steps brings the rows to the device; the first step makes kernels and state.
        losses = [trainer._step(next(stream), step) for step in range(4)]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses += [trainer._step(next(stream), step) for step in range(4, STEPS)]
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert torch.stack(losses).isfinite().all()

    if device == "cuda":
        steps()  # libraries keep their workspaces
    before = used()
    steps()
    assert used() - before < 1_000_000


@pytest.mark.gpu
def test_cuda_graphs_train_as_steps_do(stored, tmp_path):
    """The objective calls the student twice a step, with and without gradients."""
    plain, device = spec(stored, "consistency"), torch.device("cuda")
    graphs = replace(plain, part=plain.part.model_copy(update={"compile": "graphs"}))
    found = [
        load_file(str(train(job, tmp_path / name, device=device) / "weights.safetensors"))
        for name, job in (("plain", plain), ("graphs", graphs))
    ]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-2, atol=1e-2, msg=key)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_restart_changes_nothing_and_the_student_is_plain_timm(stored, name, tmp_path):
    job = spec(stored, name)
    whole = load_file(str(train(job, tmp_path / "whole") / "weights.safetensors"))
    for stop in (1, 3):
        half = train(job, tmp_path / f"half-{stop}", stop=stop)
        assert (half / "state.pt").exists()
        resumed = load_file(str(train(job, tmp_path / f"rest-{stop}", resume=half) / "weights.safetensors"))
        for key, value in whole.items():
            torch.testing.assert_close(resumed[key], value, msg=f"{key} after checkpoint {stop}")
    plain = timm.create_model("test_resnet", num_classes=C)
    start = {
        k: v.clone()
        for k, v in job.student.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0), 3)[0].state_dict().items()
    }
    plain.load_state_dict(whole)
    assert any(not torch.equal(whole[k], start[k]) for k in whole if k.endswith("conv1.weight"))
    moved = any(not torch.equal(whole[k], start[k]) for k in whole if k.startswith("fc"))
    assert moved == (name not in ("oriented_features alone", "specmatch"))


def test_the_student_of_specmatch_rests_in_the_warm_up(stored, tmp_path):
    """At the first checkpoint, within the first two of eight steps, its weights are those of the start."""
    job = spec(stored, "specmatch")
    state = torch.load(train(job, tmp_path / "early", stop=1) / "state.pt", weights_only=True)["module"]
    start = dict(job.student.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0), 3)[0].named_parameters())
    for key, value in start.items():
        assert torch.equal(state[f"student.model.{key}"], value), key
    program = job.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0))
    objective = program.module.objective
    assert not torch.equal(state["objective.project.1.weight"], objective.project[1].weight)
    later = torch.load(train(job, tmp_path / "late", stop=4) / "state.pt", weights_only=True)["module"]
    assert any(not torch.equal(later[f"student.model.{key}"], value) for key, value in start.items())
