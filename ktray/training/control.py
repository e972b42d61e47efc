"""What Ray Train's controller tells of itself, and whether a failure is worth another try.

Its process need not import torch, so this module does not.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback


class Told(ControllerCallback):
    """Posts the controller's states to the board (``state``, and ``why`` after a failure), and hands it the controller
    itself, so that the driver can end what hangs."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.known = ""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        import ray

        if not self.known:
            self.board.hold.remote(ray.get_runtime_context().current_actor)
        state = type(current_state).__name__.removesuffix("State").lower()
        if state == self.known:
            return
        self.known = state
        error = getattr(current_state, "training_failed_error", None)
        why = " ".join(str(error).split())[:2000] if error is not None else ""
        self.board.post.remote({"state": state, "why": why})


def again(error: BaseException, failures: int, limit: int) -> bool | None:
    """Whether to set up workers once more after the controller has failed.

    Args:
        failures: that were counted before.
        limit: of those that count; -1: any number.

    Returns:
        True or False; None: machines were not there in time, which counts for nothing: the watchdog ends the waiting.
    """
    from ray.train.v2._internal.exceptions import (
        CheckpointManagerInitializationError,
        InsufficientClusterResourcesError,
        WorkerGroupStartupTimeoutError,
    )

    from ktray.errors import KtrayError

    if isinstance(error, WorkerGroupStartupTimeoutError):
        return None
    if isinstance(error, CheckpointManagerInitializationError | InsufficientClusterResourcesError | KtrayError):
        return False
    return limit == -1 or failures < limit
