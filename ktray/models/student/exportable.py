"""Whether a student can be exported, found before it is trained."""

from __future__ import annotations

import contextlib
import logging
import warnings

import torch
from torch import nn

from ktray.models.messages import cause


def export_problem(model: nn.Module, size: tuple[int, int]) -> str:
    """Why torch cannot trace a model for any batch size, in one line; empty if it can.

    Every format to which a student is exported begins with this trace. It runs no kernel, so the model may be on the
    meta device.

    Args:
        size: height and width of the input in pixels.
    """
    device = next(model.parameters()).device
    example = torch.zeros(2, 3, *size, device=device)
    training = model.training
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.export.export(
                model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
    except Exception as error:  # torch's exporter has many exception types of its own
        return cause(error)
    finally:
        model.train(training)
        logger.setLevel(level)
    return ""
