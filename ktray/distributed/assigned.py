"""Tell a process which devices Ray assigned to it."""

from __future__ import annotations

from ktray.models import device


def use_assigned_device() -> None:
    """Let this worker use a GPU only if Ray assigned one to its task or actor. A driver has none."""
    import ray

    context = ray.get_runtime_context()
    driver = context.worker.mode == ray.SCRIPT_MODE
    device.assign(not driver and bool(context.get_accelerator_ids().get("GPU")))
