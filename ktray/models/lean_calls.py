"""Optimizers and a counter of FLOPs that do not import ``torch._dynamo``.

torch keeps some of their methods out of compilation, and therefore imports the compiler at their first call. This takes
more than a second in every process that trains, fits a head or counts. While nobody has imported the compiler, nothing
can be compiled, and the plain methods do the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.utils import flop_counter

Kind = TypeVar("Kind", bound=type[Optimizer])

_EXCLUDED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def without_compiler(method: Any, plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A method of torch's, called without the part that excludes it from compilation unless ``torch._dynamo`` is
    imported.

    Args:
        plain: does the same as the method; None: what the method wraps.
    """
    bare = inspect.unwrap(method) if plain is None else plain

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else bare)(*args, **kwargs)

    return call


def _lean(kind: Kind) -> Kind:
    """A subclass of an optimizer with the same behaviour.

    Without the compiler, ``step`` computes without gradients, which is the optimizers' default
    (``differentiable=False``).
    """
    methods = {name: without_compiler(getattr(kind, name)) for name in _EXCLUDED}
    # The first optimizer of a class wraps its step for hooks and the profiler, and marks it. Without the mark, ours is
    # wrapped, too.
    step: Any = kind.step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    methods["step"] = without_compiler(step, torch.no_grad()(inspect.unwrap(step)))
    made: Any = type(kind.__name__, (kind,), methods)
    return made


AdamW = _lean(torch.optim.AdamW)
LBFGS = _lean(torch.optim.LBFGS)

FlopCounterMode = flop_counter.FlopCounterMode
# Other versions of torch may name it otherwise.
_counting: Any = getattr(flop_counter, "_FlopCounterMode", None)  # the mode that it enters
if _counting is not None:
    _counting.__torch_dispatch__ = without_compiler(_counting.__torch_dispatch__)
