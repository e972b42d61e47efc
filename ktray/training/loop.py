"""The training loop in plain torch, without Ray. It can run in a worker, in a notebook or in a test.

A restart changes no result: every random number is a function of the seed and the step, and a checkpoint holds all
other state.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from ktray.models.lean_calls import AdamW
from ktray.recipe.section import Section
from ktray.training.average import Average
from ktray.training.checkpoint_interval import CheckpointInterval
from ktray.training.cpu_share import CpuShare
from ktray.training.messages import CurvePoint, LoopMessage, Started, StepProgress
from ktray.training.optimisation import learning_rate

Batch = dict[str, torch.Tensor]
STATE = "outcome.json"  # name of the file in a checkpoint


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of the optimisation. ``checkpoint_seconds`` is converted to steps once the speed is known
    (`ktray.training.checkpoint_interval`)."""

    steps: int
    lr: float
    weight_decay: float
    warmup: float
    ema: float
    clip: float
    seed: int
    evals: int = 5
    checkpoint_seconds: float = 15.0
    keep: str = "last"  # or "best": the weights with the best validation score, including the initial weights
    accumulate: int = 1  # number of parts of a step's batch, which are processed one after the other
    patience: int = 0  # number of evaluations without a better score after which training stops; 0: never

    @classmethod
    def of(cls, part: Section, **others: Any) -> TrainerSettings:
        """The settings in a section of a recipe, by their names there. ``others`` are added, and override them."""
        names = {field.name for field in fields(cls)}
        return cls(**{**{name: value for name, value in part if name in names}, **others})


@dataclass
class TrainingProgram:
    """A program that the `Trainer` runs: the model with its loss, its data and its evaluation.

    Attributes:
        module: called with (batch, generator), returns ``{"loss": ...}``; contains ``model``.
        model: the model that is evaluated and saved.
        groups: groups of the optimizer (``params``, ``lr_scale``, optional ``weight_decay`` and ``frozen``).
        batches: (start, stop) -> this rank's batches, on the device.
        evaluate: model -> (score, metrics) on validation, the same on every rank; a higher score is better.
        flops_per_step, images_per_step: FLOPs and images of a step, over all ranks.
        device: the device of this rank.
        flops_per_evaluation, flops_before: FLOPs of a validation, and of what `build` computed before the first step,
            over all ranks.
        autocast: number format of the matrix products; None: no autocast.
        weight: weight of this rank's loss in the mean over ranks: above 1 if it has more rows than other ranks.
        averaged: the module whose weights are averaged, which contains the model; None: the model itself.
        after_step: called after each optimizer step with the fraction of the steps that are done.
        finish: copies into the model what other modules have learnt for it; called before the model is evaluated or
            saved.
        tolerance: scores that differ by less are equally good. Only evaluations that are worse than the best one by
            more count for `TrainerSettings.patience`, and the best weights are only kept if the last ones are worse by
            more.
        compiled: how the model is compiled, and why, in words; empty: this training is never compiled.
        teach: adds the targets of a teacher in this process to a batch. Its time counts as part of the step, not as
            waiting for data.
    """

    module: nn.Module
    model: nn.Module
    groups: list[dict[str, Any]]
    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[nn.Module], tuple[float, dict[str, float]]] | None
    flops_per_step: float
    images_per_step: int
    device: torch.device
    flops_per_evaluation: float = 0.0
    flops_before: float = 0.0
    autocast: torch.dtype | None = None
    weight: float = 1.0
    averaged: nn.Module | None = None
    after_step: Callable[[float], None] | None = None
    finish: Callable[[nn.Module], None] | None = None
    teach: Callable[[Batch], Batch] | None = None
    tolerance: float = 0.0
    compiled: str = ""


@dataclass
class State:
    """The state of a training, which is saved in each checkpoint as ``outcome.json``.

    Attributes:
        step: number of steps that are done.
        seconds: time that they took, over all attempts.
        best_score, best_step: the best score on validation, and the step after which it was reached; at the end, those
            of the kept weights.
        last_score: the last score on validation.
        stale: number of evaluations in a row that count for `TrainerSettings.patience`.
        finished: whether the training has ended.
        curve: a row for each evaluation: ``step``, ``seconds``, ``loss`` and the metrics on validation.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = -math.inf
    best_step: int = 0
    last_score: float = -math.inf
    stale: int = 0
    finished: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def load(cls, checkpoint: Path) -> State:
        """Read the state from the folder of a checkpoint."""
        return cls(**json.loads((checkpoint / STATE).read_text()))

    def save(self, checkpoint: Path) -> None:
        """Write the state into the folder of a checkpoint."""
        (checkpoint / STATE).write_text(json.dumps(asdict(self)))


@dataclass
class TrainerCallbacks:
    """The functions with which the loop reports to its caller.

    Attributes:
        save: (folder, metrics, last) -> None; called on every rank to save a checkpoint, with the folder of its files
            on rank 0 and None on other ranks. It may save the folder in the background, because the loop does not use
            the folder again; the last checkpoint must be saved when the call returns.
        progress: receives a `Started` when the loop starts, then a `StepProgress` every half second, and a `CurvePoint`
            for each evaluation.
        folder: returns a new, empty folder.
    """

    save: Callable[[Path | None, dict[str, Any], bool], None]
    progress: Callable[[LoopMessage], None]
    folder: Callable[[], Path]


def _parts(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into ``count`` equal parts.

    Raises:
        ValueError: the number of rows is not a multiple of ``count``.
    """
    if count == 1:
        return [batch]
    if any(len(value) % count for value in batch.values()):
        sizes = {name: len(value) for name, value in batch.items()}
        raise ValueError(f"batches of {sizes} rows cannot be split into {count} equal parts: see train.accumulate")
    split = {name: value.tensor_split(count) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(count)]


class Trainer:
    """One training on this rank.

    Args:
        resume: the folder of a checkpoint to resume from; None: start at step 0.
    """

    def __init__(
        self,
        program: TrainingProgram,
        settings: TrainerSettings,
        callbacks: TrainerCallbacks,
        resume: Path | None = None,
    ) -> None:
        self.p, self.s, self.callbacks = program, settings, callbacks
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.state = State()
        fused = program.device.type in ("cuda", "cpu")
        self.optimizer = AdamW(program.groups, lr=settings.lr, betas=(0.9, 0.99), fused=fused)
        self.averaged = program.averaged if program.averaged is not None else program.model
        self.average = Average(self.averaged, settings.ema) if settings.ema else None
        self.best: dict[str, torch.Tensor] | None = None
        if resume is not None:
            self._restore(resume)
        self.module: nn.Module = program.module
        if dist.is_initialized() and dist.get_world_size() > 1:
            # With device_ids, it would copy the batch's keys, which the host uses, to the GPU and wait for them.
            self.module = nn.parallel.DistributedDataParallel(program.module)

    @contextlib.contextmanager
    def finished_model(self) -> Iterator[nn.Module]:
        """The model to evaluate and save, with averaged weights if averaging is on. Training then continues with the
        weights that are not averaged."""
        live = {k: v.clone() for k, v in self.averaged.state_dict().items()}
        if self.average:
            self.averaged.load_state_dict(self.average.state)
        if self.p.finish:
            self.p.finish(self.p.model)
        yield self.p.model
        self.averaged.load_state_dict(live)

    def run(self) -> State:
        """Train to the end. The last checkpoint contains ``weights.safetensors`` and ``outcome.json``.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        s, state = self.s, self.state
        if state.finished:
            return state
        self.callbacks.progress(Started(state.step, *self._totals()))
        eval_every = max(1, s.steps // s.evals)
        interval = CheckpointInterval(s.checkpoint_seconds, s.steps, self._agree)
        losses: list[torch.Tensor] = []
        if state.step == 0:
            self._evaluate()
        begun = since = time.perf_counter()
        waited, first = 0.0, state.step
        before = state.seconds
        stream = self.p.batches(state.step, s.steps)
        share = CpuShare() if self.p.device.type == "cpu" else None
        while state.step < s.steps and not (s.patience and state.stale >= s.patience):
            wait_began = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - wait_began
            losses.append(self._step(batch, state.step))
            state.step += 1
            if share is not None:
                share.stepped()
            state.seconds = before + time.perf_counter() - begun
            now = time.perf_counter()
            if now - since > 0.5:
                self._report(waited / (now - begun))
                since = now
            if state.step % eval_every == 0 or state.step == s.steps:
                loss = float(torch.stack(losses).mean())
                losses.clear()
                state.seconds = before + time.perf_counter() - begun  # reading the loss has waited for the GPU
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {state.step}: lower the learning rate")
                self._evaluate(loss)
            interval.stepped(state.step - first, now)
            if interval.due(state.step) and state.step < s.steps:
                saving = time.perf_counter()
                self._save()
                interval.saved(time.perf_counter() - saving)
        self._report(waited / (time.perf_counter() - begun))  # all steps, and the last validation
        if share is not None:
            share.end()
        self._keep_last_if_as_good()
        state.finished = True
        self._save()
        return state

    def _keep_last_if_as_good(self) -> None:
        """Keep the last weights instead of the best ones if only chance may separate them: the best of many evaluations
        is too good by chance, and later weights have seen more."""
        state = self.state
        if self.best is not None and state.best_score - state.last_score < self.p.tolerance:
            self.best, state.best_score, state.best_step = None, state.last_score, state.step

    def _report(self, data_wait: float) -> None:
        """Report the steps that are done, and the fraction of the time in which the loop waited for data."""
        self.callbacks.progress(StepProgress(self.state.step, *self._totals(), data_wait))

    def _totals(self) -> tuple[float, float]:
        """Images and FLOPs since the first step."""
        p, step = self.p, self.state.step
        validations = len(self.state.curve) if p.evaluate is not None else 0
        flops = p.flops_before + step * p.flops_per_step + validations * p.flops_per_evaluation
        return step * p.images_per_step, flops

    def _agree(self, value: int) -> int:
        # Saving is a barrier over all ranks, so all ranks must save at the same steps.
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return value
        shared = torch.tensor([value], device=self.p.device)
        dist.broadcast(shared, 0)
        return int(shared)

    def _step(self, batch: Batch, step: int) -> torch.Tensor:
        """Make one optimizer step. Returns the mean loss, on the device."""
        factor = learning_rate(step, self.s.steps, self.s.warmup)
        for group in self.optimizer.param_groups:
            moves = step / self.s.steps >= group.get("frozen", 0.0)
            group["lr"] = self.s.lr * factor * group.get("lr_scale", 1.0) * moves
        drawn = (self.s.seed * 1_000_003 + step) * 4099 + self.rank
        generator = torch.Generator(device=self.p.device).manual_seed(drawn)
        torch.manual_seed(drawn)  # for dropout in the student: the same after a restart, different on each rank
        self.module.train()
        total = torch.zeros((), device=self.p.device)
        parts = _parts(batch, self.s.accumulate)
        for number, part in enumerate(parts):
            if self.p.teach:
                part = self.p.teach(part)
            with self._gradients(number == len(parts) - 1):
                with torch.autocast(self.p.device.type, dtype=self.p.autocast, enabled=self.p.autocast is not None):
                    loss = self.module(part, generator)["loss"] / len(parts)
                (loss * self.p.weight).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group["params"]], self.s.clip, foreach=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.p.after_step:
            self.p.after_step((step + 1) / self.s.steps)
        if self.average:
            self.average.update(self.averaged, step)
        return total

    def _gradients(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context for the gradients of a part of the batch. Ranks exchange gradients only after the last part."""
        if last or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        unsynced: contextlib.AbstractContextManager[None] = self.module.no_sync()
        return unsynced

    def _evaluate(self, loss: float | None = None) -> None:
        state = self.state
        row: dict[str, float] = {"step": state.step, "seconds": round(state.seconds, 3)}
        if loss is not None:
            row["loss"] = loss
        if self.p.evaluate is not None:
            with self.finished_model() as model:
                score, metrics = self.p.evaluate(model)
                state.last_score = score
                if score > state.best_score:
                    state.best_score, state.best_step, state.stale = score, state.step, 0
                    if self.s.keep == "best":
                        self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
                else:
                    state.stale = state.stale + 1 if score <= state.best_score - self.p.tolerance else 0
            row.update(metrics)
        if loss is not None or self.p.evaluate is not None:
            state.curve.append(row)
            self.callbacks.progress(CurvePoint(state.step, {k: v for k, v in row.items() if k != "step"}))

    def _save(self) -> None:
        if self.rank:
            self.callbacks.save(None, {}, self.state.finished)
            return
        folder = self.callbacks.folder()
        if self.state.finished:
            with self.finished_model() as model:
                last = {k: v.detach().clone() for k, v in model.state_dict().items()}
            final = self.best if self.s.keep == "best" and self.best is not None else last
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in final.items()}
            save_file(tensors, str(folder / "weights.safetensors"))
        else:
            torch.save(
                {
                    "module": self.p.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": self.average.state if self.average else None,
                    "best": self.best,
                },
                folder / "state.pt",
            )
        self.state.save(folder)
        self.callbacks.save(folder, {"step": self.state.step}, self.state.finished)

    def _restore(self, folder: Path) -> None:
        self.state = State.load(folder)
        if self.state.finished:
            return
        saved = torch.load(folder / "state.pt", map_location=self.p.device, weights_only=True)
        self.p.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        if self.average and saved["average"]:
            self.average.state = saved["average"]
