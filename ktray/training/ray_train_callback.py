"""The callback that reports the states of Ray Train's controller, and the decision whether to restart after a failure.

This module does not import torch, because the controller's process does not need it.
"""

from __future__ import annotations

from typing import Any

from ktray.distributed.ray_internals import (
    CheckpointManagerInitializationError,
    ControllerCallback,
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
)
from ktray.errors import KtrayError, ResourceError, first_failed
from ktray.training.messages import ControllerState


class ControllerWatcher(ControllerCallback):
    """Posts each new `ControllerState` to the mailbox, together with the controller's handle, so that the driver can
    end a training that hangs.

    Args:
        mailbox: handle of the `ktray.distributed.mailbox.ProgressActor`; None: no messages.
        limit: number of times that the set-up of the workers may fail; -1: any number. Ray Train's own limit also
            counts waits for machines that took too long, which are not failures.
    """

    def __init__(self, mailbox: Any, limit: int) -> None:
        self.mailbox, self.limit = mailbox, limit
        self.last_state, self.failures = "", 0
        self.introduced: Any = None  # the future of the call that gives this controller's handle to the mailbox

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        state = type(current_state).__name__.removesuffix("State").lower()
        if state == self.last_state:
            return
        error = getattr(current_state, "training_failed_error", None)
        if self.mailbox is not None:
            self._report(state, error)
        self.last_state = state
        cause = getattr(error, "controller_failure", None)
        if state == "rescheduling" and not isinstance(cause, WorkerGroupStartupTimeoutError):
            self.failures += 1
            if self.failures > self.limit != -1:
                raise ResourceError(
                    f"Training workers could not be set up {self.failures} times: {reason(error)}",
                    "Look for the cause in the nodes' logs under /tmp/ray/session_latest/logs; cluster.max_failures "
                    "sets the limit.",
                )

    def _report(self, state: str, error: BaseException | None) -> None:
        import ray

        if not self.last_state:
            call = self.mailbox.set_controller.remote(ray.get_runtime_context().current_actor)
            self.introduced = call.future()
        elif self.introduced.done() and isinstance(self.introduced.exception(), ray.exceptions.ActorDiedError):
            # The driver has died, or has ended this training before this controller had started. A training that nobody
            # hears would hold its workers.
            raise self.introduced.exception()
        self.mailbox.post.remote(ControllerState(state, reason(error) if error is not None else ""))


def reason(error: BaseException | None) -> str:
    """One short line that describes a failure of a worker or of the controller."""
    failures = getattr(error, "worker_failures", None) or {}
    rank = first_failed(failures) if failures else 0
    who = f"worker {rank}: " if failures else ""
    inner: Any = failures[rank] if failures else error
    for name in ("controller_failure", "health_check_failure", "__cause__"):
        inner = getattr(inner, name, None) or inner
    return f"{who}{type(inner).__name__}: {' '.join(str(inner).split())[:160]}"


def should_restart(error: BaseException, failures: int, limit: int) -> bool:
    """Whether to start the training again after the controller failed, as it does if workers cannot connect.

    Args:
        error: the error of the controller.
        failures: number of earlier failures.
        limit: maximum number of failures; -1: any number.
    """
    if isinstance(error, CheckpointManagerInitializationError | InsufficientClusterResourcesError | KtrayError):
        return False
    return limit == -1 or failures < limit
