"""Whether ``torch.compile`` pays for a training on a GPU: arithmetic says whether to look, a measurement decides.

Compiling takes a minute or more and saves a part of each step. The decision is recorded and passed on, because compiled
kernels round in another way.
"""

from __future__ import annotations

import gc
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ktray.models.messages import cause
from ktray.models.precision import Precision, one_step
from ktray.reporting.heartbeat import beat

Mode = Literal["default", "reduce-overhead"]  # the latter also puts the kernels into CUDA graphs
# Compiling FastViT-S12 took 70 s on an H200; a training that is compiled does it twice, once to measure. A step is
# hardly ever made faster by more than this share.
COMPILE_S, MOST_SAVED = 70.0, 0.3
_STEPS = 8  # of a measurement


@dataclass(frozen=True)
class Compilation:
    """How the student of a training is compiled.

    Attributes:
        mode: the mode of ``torch.compile``; None: not compiled.
        reason: the reason of the decision, one line.
        failed: whether the measurement failed. The next training measures again, because the cause may be gone.
    """

    mode: Mode | None
    reason: str
    failed: bool = False

    def apply(self, model: nn.Module, forgiving: bool = False) -> None:
        """Compile the model in place: the names in checkpoints stay the same.

        Args:
            forgiving: whether what cannot be compiled runs uncompiled. Otherwise, it is an error in the first step.
        """
        if self.mode is None:
            return
        import torch._dynamo  # slow to import

        torch._dynamo.config.suppress_errors = forgiving
        forget_compiled()  # a limit on recompilations counts those of earlier trainings in this process
        model.compile(mode=self.mode)

    @property
    def graphs(self) -> bool:
        """Whether the model's kernels are in CUDA graphs: the outputs of a step are overwritten by the next one."""
        return self.mode == "reduce-overhead"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Compilation:
        return cls(**value)


def forget_compiled() -> None:
    """Drop what this process has compiled, with its memory. Nothing happens if it has compiled nothing."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()  # a compiled model is part of cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def may_pay(steps: int, seconds: float) -> bool:
    """Whether compiling, and the measurement of it, could take less time than it saves in a training of ``steps`` steps
    of ``seconds`` each."""
    return steps * seconds * MOST_SAVED > 2 * COMPILE_S


def choose_compilation(
    model: nn.Module,
    precision: Precision,
    device: torch.device,
    image_size: int,
    batch: int,
    steps: int,
) -> Compilation:
    """Compile a copy of the model and time its steps, if `may_pay`. The training is compiled if its steps together save
    more time than it took to compile the copy.

    The copy has one input size. An objective with several (crops, or a pass without gradients) compiles once for each.

    Args:
        model: takes normalised float images (N, 3, h, w); it is not changed.
        precision: the number format and layout of the training.
        image_size: image size of the training, in pixels.
        batch: images of this worker that are in one pass.
        steps: passes of the training.
    """
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            images = torch.rand(batch, 3, image_size, image_size, device=device)
            return _measured(model, precision, images, steps)
    except Exception as error:  # compilers refuse models and machines in many ways, and the training can do without
        return Compilation(None, f"torch.compile failed: {cause(getattr(error, 'inner_exception', error))}", True)
    finally:
        forget_compiled()


def _measured(model: nn.Module, precision: Precision, images: torch.Tensor, steps: int) -> Compilation:
    beat("timing the student's steps")
    eager = _seconds(deepcopy(model).to(images.device), precision, images)
    if not may_pay(steps, eager):
        text = f"{steps:,} steps of {_ms(eager)} are too few: compiling takes about {COMPILE_S:.0f} s"
        return Compilation(None, text)
    beat("measuring whether torch.compile pays, which takes a minute or two")
    began = time.perf_counter()
    copy = deepcopy(model).to(images.device)
    copy.compile()
    compiled = _seconds(copy, precision, images)
    spent = time.perf_counter() - began
    text = f"measured: eager {_ms(eager)}, compiled {_ms(compiled)} a step, compiling {spent:.0f} s"
    return Compilation("default" if steps * (eager - compiled) > spent else None, text)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _seconds(model: nn.Module, precision: Precision, images: torch.Tensor) -> float:
    """Mean time of a forward and a backward pass in seconds, after those in which kernels are made."""
    candidate = precision.autocast, precision.channels_last, precision.benchmark
    model.train().to(memory_format=precision.memory_format)
    step = one_step(model, candidate, images, train=True)
    for _ in range(3):
        step()
        beat()
    began = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - began) / _STEPS
