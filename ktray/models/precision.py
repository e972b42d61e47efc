"""The number format and memory layout of a model on a device, from a safe rule or a short measurement.

The decision is recorded and passed on, because a second measurement may give another decision and thereby change the
last digits of a resumed run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ktray.accounting.device import waited_seconds
from ktray.models.features import is_convolutional

logger = logging.getLogger("ktray")

DType = Literal["bf16"]
Candidate = tuple[DType | None, bool, bool]  # autocast, channels-last, cuDNN's search for the fastest algorithm
Steps = dict[Candidate, Callable[[], None]]
# A format must be clearly faster, because it rounds. A layout has no cost, but a tie should have a stable result.
_CLEARLY, _LAYOUT = 0.9, 0.97
# Beside busy programs a measurement is wrong by a large factor now and then, and the decision is kept: a default job
# once took emulated bfloat16, which is 3 to 8 times as slow, for 0.94 of the time of float32. To keep float32 where
# bfloat16 is somewhat faster costs less than that.
_CLEARLY_IN_ONE_THREAD = 0.5
# A candidate that is slower than the fastest by this factor (after one round; after more rounds) is not timed again.
_HOPELESS = (4.0, 1.5)
_BUDGET_S = 2.0
# Cores for which this process waited, from which on the candidates are compared in one thread, and for how many seconds
# this is measured.
_CROWDED, _CROWDED_S = 0.25, 0.1
_FIRST_CHANNELS = 32


@dataclass(frozen=True)
class Precision:
    """The number format and memory layout of a model.

    Attributes:
        autocast: "bf16", or None for float32 everywhere.
        channels_last: whether convolutions and images have the channels-last layout.
        reason: the reason of the decision, one line for the log.
        benchmark: whether cuDNN times the algorithms of each convolution and takes the fastest one, on a GPU. With
            channels-last, this can make a step more than twice as fast. It does not suit varying shapes.
    """

    autocast: DType | None
    channels_last: bool
    reason: str
    benchmark: bool = False

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The argument of ``torch.autocast(dtype=)``; None: no autocast."""
        return torch.bfloat16 if self.autocast else None

    @property
    def memory_format(self) -> torch.memory_format:
        return _layout(self.channels_last)

    def apply(self, model: nn.Module) -> None:
        """Set the layout of the model, and the search of cuDNN for this process."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = self.benchmark

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Precision:
        return cls(**value)


def fp32_channels_last_is_safe(model: nn.Module) -> bool:
    """Whether a float32 channels-last backward pass on CPU is known to be safe for memory.

    In torch 2.15 (oneDNN, x86) the backward pass of a 1x1 convolution with a stride and fewer than 16 input channels,
    such as FastViT's stem, writes outside of its buffers and crashes the process at 112 px and above. With fewer than
    32 input channels this layout is therefore never used.
    """
    return not any(
        isinstance(m, nn.Conv2d)
        and max(m.kernel_size) == 1
        and max(m.stride) > 1
        and m.in_channels // m.groups < _FIRST_CHANNELS
        for m in model.modules()
    )


def choose_precision(
    model: nn.Module,
    device: str | torch.device,
    image_size: int | tuple[int, int],
    batch: int,
    *,
    train: bool,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Precision:
    """Choose the format and layout of a model.

    The fastest of the safe candidates in a measurement of about two seconds on a copy (at most ten seconds for slow
    models). On CUDA with ``auto``, the format is bf16, and layout and algorithm of convolutions are measured. On other
    devices than these and CPUs: float32.

    Args:
        model: takes normalised float images (N, 3, h, w); it is not changed.
        device: where the model will run.
        image_size: image size of the measurement, in pixels.
        batch: images per step; the measurement uses fewer for slow models.
        train: measure forward and backward pass; otherwise only the forward pass.
        precision: force a number format; the layout is still chosen.
    """
    kind = torch.device(device).type
    convolves = is_convolutional(model)
    if kind not in ("cpu", "cuda"):
        return Precision("bf16" if precision == "bf16" else None, False, f"the rule on {kind}")
    candidates = _cuda(convolves, precision) if kind == "cuda" else _cpu(model, convolves, train, precision)
    if len(candidates) == 1:
        dtype, channels_last, benchmark = candidates[0]
        return Precision(dtype, channels_last, "the only safe choice", benchmark)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    seconds, crowded = _measure(model, candidates, size, batch, train, torch.device(device))
    return _fastest(seconds, kind, _CLEARLY_IN_ONE_THREAD if crowded else _CLEARLY)


def _cuda(convolves: bool, precision: str) -> list[Candidate]:
    dtype: DType | None = None if precision == "fp32" else "bf16"
    # The more likely candidate is first, because the measurement of a slow model may not reach the last one.
    if convolves:
        return [(dtype, True, True), (dtype, False, True), (dtype, True, False), (dtype, False, False)]
    return [(dtype, False, False)]


def _cpu(model: nn.Module, convolves: bool, train: bool, precision: str) -> list[Candidate]:
    candidates: list[Candidate] = []
    if precision != "bf16":
        candidates.append((None, False, False))
        # The crash is in the backward pass; the forward pass is safe.
        if convolves and (not train or fp32_channels_last_is_safe(model)):
            candidates.append((None, True, False))
    if precision != "fp32":
        candidates += [("bf16", True, False), ("bf16", False, False)] if convolves else [("bf16", False, False)]
    return candidates


def _fastest(seconds: dict[Candidate, float], kind: str = "cpu", clearly: float = _CLEARLY) -> Precision:
    """The first candidate, unless another layout is faster or another format is clearly faster."""
    chosen = first = next(iter(seconds))
    for candidate in sorted(seconds, key=lambda c: seconds[c]):
        if seconds[candidate] < (_LAYOUT if candidate[0] == first[0] else clearly) * seconds[first]:
            chosen = candidate
            break
    table = ", ".join(f"{_name(c)} {1000 * s:.3g} ms" for c, s in seconds.items())
    dtype, channels_last, benchmark = chosen
    return Precision(dtype, channels_last, f"measured on {'a GPU' if kind == 'cuda' else 'CPU'}: {table}", benchmark)


def _measure(
    model: nn.Module,
    candidates: list[Candidate],
    size: tuple[int, int],
    batch: int,
    train: bool,
    device: torch.device,
) -> tuple[dict[Candidate, float], bool]:
    """Best time of a step, in seconds, per candidate, and whether a single thread was timed, because other programs use
    the cores. For slow models the last candidates are skipped.

    The random number generator of the caller is not changed.
    """
    before, threads, crowded = torch.backends.cudnn.benchmark, torch.get_num_threads(), False
    with torch.random.fork_rng(devices=[]):
        copies = {
            cl: deepcopy(model).to(device).to(memory_format=_layout(cl)).train(train)
            for cl in {c[1] for c in candidates}
        }

        def steps(images: int) -> Steps:
            return {
                c: one_step(copies[c[1]], c, torch.rand(images, 3, *size, device=device), train) for c in candidates
            }

        if device.type == "cuda":  # a small batch would measure how fast the host launches kernels
            ready = steps(max(2, batch))
            for step in ready.values():  # kernels are loaded, and cuDNN searches
                step()
            seconds = _rounds(ready, _timed)
        else:
            seconds, crowded = _on_cpu(steps, batch, _timed)
            if crowded:
                # Threads that wait for each other beside another program make formats look slow by chance, and a run
                # keeps the decision. The CPU time of a single thread depends much less on other programs.
                logger.info("precision other programs use the cores: number formats are compared in one thread")
                torch.set_num_threads(1)
                seconds, _ = _on_cpu(steps, batch, _timed_thread)
    torch.backends.cudnn.benchmark = before
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return seconds, crowded


def _on_cpu(
    steps: Callable[[int], Steps], batch: int, timed: Callable[[Callable[[], None]], float]
) -> tuple[dict[Candidate, float], bool]:
    """Best time of a step per candidate, and whether the threads meanwhile waited for cores. If wall time was to be
    measured and they waited from the beginning, nothing is compared."""
    began, waited = time.perf_counter(), waited_seconds()

    def crowded() -> bool:
        return waited_seconds() - waited > _CROWDED * (time.perf_counter() - began)

    probe = next(iter(steps(2).values()))
    times = [timed(probe) for _ in range(4)]  # the first run compiles the kernels
    while time.perf_counter() - began < _CROWDED_S:
        times.append(timed(probe))
    if timed is _timed and crowded():
        return {}, True
    # About five rounds of the two most relevant candidates fit into the budget.
    images = int(2 * _BUDGET_S / (5 * 2) / max(min(times), 1e-6))
    seconds = _rounds(steps(max(2, min(batch, 64, images))), timed)
    return seconds, crowded()  # other programs may have started since the probe


def _rounds(ready: Steps, timed: Callable[[Callable[[], None]], float]) -> dict[Candidate, float]:
    """Best time of a step per candidate, in seconds."""
    start = time.perf_counter()
    seconds: dict[Candidate, float] = {}
    # Candidates alternate, so that other processes slow down all of them; the minimum excludes disturbances.
    for round_number in range(8):
        for candidate, step in ready.items():
            # The first round may be slow for other reasons, such as kernel compilation or other processes.
            if round_number and seconds[candidate] > _HOPELESS[min(round_number, 2) - 1] * min(seconds.values()):
                continue
            elapsed = time.perf_counter() - start
            if seconds and elapsed > (5 if round_number == 0 else 1) * _BUDGET_S:
                break
            seconds[candidate] = min(timed(step), seconds.get(candidate, math.inf))
    return seconds


def one_step(model: nn.Module, candidate: Candidate, x: torch.Tensor, train: bool) -> Callable[[], None]:
    """A function that makes a forward pass, and with ``train`` a backward pass, and returns when they are done."""
    autocast, channels_last, benchmark = candidate
    images = x.to(memory_format=_layout(channels_last))

    def step() -> None:
        torch.backends.cudnn.benchmark = benchmark
        with torch.set_grad_enabled(train):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast is not None):
                out = model(images)
            if train:
                model.zero_grad(set_to_none=True)
                (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return step


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _timed_thread(step: Callable[[], None]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def _name(candidate: Candidate) -> str:
    searched = " with cuDNN's search" if candidate[2] else ""
    return f"{candidate[0] or 'fp32'} {'channels-last' if candidate[1] else 'contiguous'}{searched}"
