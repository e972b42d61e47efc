"""What Ray Train's controller tells of itself, and whether a failure is worth another try.

Its process need not import torch, so this module does not.
"""

from __future__ import annotations

from typing import Any

from ktray.distributed.ray_internals import (
    CheckpointManagerInitializationError,
    ControllerCallback,
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
)
from ktray.errors import KtrayError, first_failed
from ktray.training.messages import ControllerState


class ControllerWatcher(ControllerCallback):
    """Posts each new `ControllerState` to the mailbox, and hands it the controller itself, so that the driver can end
    what hangs.

    Args:
        limit: set-ups of workers that may fail; -1: any number. Ray Train itself bounds those together with waits for
            machines that took too long, which are no failures.
    """

    def __init__(self, board: Any, limit: int) -> None:
        self.board, self.limit = board, limit
        self.known, self.failures = "", 0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        state = type(current_state).__name__.removesuffix("State").lower()
        if state == self.known:
            return
        error = getattr(current_state, "training_failed_error", None)
        if self.board is not None:
            self._tell(state, error)
        self.known = state
        cause = getattr(error, "controller_failure", None)
        if state == "rescheduling" and not isinstance(cause, WorkerGroupStartupTimeoutError):
            self.failures += 1
            if self.failures > self.limit != -1:
                raise KtrayError(
                    f"Training workers could not be set up {self.failures} times: {reason(error)}",
                    "See cluster.max_failures, and the nodes' logs under /tmp/ray/session_latest/logs.",
                )

    def _tell(self, state: str, error: BaseException | None) -> None:
        import ray

        if not self.known:
            self.board.set_controller.remote(ray.get_runtime_context().current_actor)
        self.board.post.remote(ControllerState(state, reason(error) if error is not None else ""))


def reason(error: BaseException | None) -> str:
    """A failure in one short line: of a worker, or the controller's."""
    failures = getattr(error, "worker_failures", None) or {}
    rank = first_failed(failures) if failures else 0
    who = f"worker {rank}: " if failures else ""
    inner: Any = failures[rank] if failures else error
    for name in ("controller_failure", "health_check_failure", "__cause__"):
        inner = getattr(inner, name, None) or inner
    return f"{who}{type(inner).__name__}: {' '.join(str(inner).split())[:160]}"


def should_restart(error: BaseException, failures: int, limit: int) -> bool:
    """Whether to set up workers once more after the controller has given up, as it does where they cannot meet.

    Args:
        failures: that were before.
        limit: of them; -1: any number.
    """
    if isinstance(error, CheckpointManagerInitializationError | InsufficientClusterResourcesError | KtrayError):
        return False
    return limit == -1 or failures < limit
