"""The metrics of a result for MLflow, under names that do not change between versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def stable_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The final metrics of a run, from its ``result.json``, under names that do not change between versions.

    ``cost.total_flops``, ``cost.total_device_seconds`` (and ``cost.device_seconds``), ``cost.<stage>_flops``, ...,
    ``cost.usd``, ``cost.wall_seconds``, ``cost.without_cache_flops``, ...; ``test.<metric>``, ``val.<metric>``;
    ``teacher.test``, ``teacher.val``, and the same for ``scratch``, ``start`` and ``distilled``. Null and missing
    values are left out.
    """
    cost, metric = result.get("cost") or {}, result.get("metric") or {}
    values: dict[str, Any] = {
        f"cost.{name}": cost.get(name) for name in ("usd", "kwh", "wall_seconds", "images_seen", "peak_memory_bytes")
    }
    for what in ("flops", "device_seconds"):
        values |= {f"cost.{stage}_{what}": value for stage, value in (cost.get(what) or {}).items()}
    values["cost.device_seconds"] = values.get("cost.total_device_seconds")
    values |= {f"cost.without_cache_{k}": v for k, v in (cost.get("without_cache") or {}).items()}
    values |= {f"{split}.{metric.get('name')}": metric.get(split) for split in ("test", "val")}
    for who in ("teacher", "scratch", "start", "distilled"):
        values |= {f"{who}.{split}": (result.get(f"{who}_metric") or {}).get(split) for split in ("test", "val")}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
