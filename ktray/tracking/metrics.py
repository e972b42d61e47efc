"""Numbers of a result that stay the same from version to version, for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def stable_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The final metrics of a run under names that stay, from its ``result.json``.

    ``cost.total_flops``, ``cost.total_device_seconds`` (and ``cost.device_seconds``), ``cost.<stage>_flops``, ...,
    ``cost.usd``, ``cost.wall_seconds``, ``cost.without_cache_flops``, ...; ``test.<metric>``, ``val.<metric>``;
    ``teacher.test``, ``teacher.val``, ``scratch.test``, ``scratch.val``. What is null or absent is left out.
    """
    cost, metric = result.get("cost") or {}, result.get("metric") or {}
    found: dict[str, Any] = {
        f"cost.{name}": cost.get(name) for name in ("usd", "kwh", "wall_seconds", "images_seen", "peak_memory_bytes")
    }
    for what in ("flops", "device_seconds"):
        found |= {f"cost.{stage}_{what}": value for stage, value in (cost.get(what) or {}).items()}
    found["cost.device_seconds"] = found.get("cost.total_device_seconds")
    found |= {f"cost.without_cache_{k}": v for k, v in (cost.get("without_cache") or {}).items()}
    found |= {f"{split}.{metric.get('name')}": metric.get(split) for split in ("test", "val")}
    for who in ("teacher", "scratch"):
        found |= {f"{who}.{split}": (result.get(f"{who}_metric") or {}).get(split) for split in ("test", "val")}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
