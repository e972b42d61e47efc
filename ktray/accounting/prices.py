"""The prices of devices, in USD per hour."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from ktray.errors import KtrayError

SPOT = "spot:"


def price_table() -> dict[str, Any]:
    """The content of ``prices.yaml``: ``as_of``, ``accelerators``, ``instances``, ``cpu_core``; in USD per hour."""
    table: dict[str, Any] = yaml.safe_load(resources.files("ktray.accounting").joinpath("prices.yaml").read_text())
    return table


def hourly_price(device: Mapping[str, Any], overrides: Mapping[str, float] | None = None) -> float | None:
    """The price of one device in USD per hour: of an accelerator if ``device`` has any, else of the whole machine.

    Args:
        device: the result of `ktray.accounting.device.describe_device`.
        overrides: the recipe's ``prices``: accelerator names, instance types or ``cpu_core``, in USD per hour. Names
            that begin with ``spot:`` are for spot machines; without one, a spot machine has its on-demand price, which
            is an upper limit.

    Returns:
        None for an accelerator that is neither in the table nor in ``overrides``: no price is invented.

    Raises:
        KtrayError: a price in ``overrides`` is negative or not a number.
    """
    table, own = price_table(), dict(overrides or {})
    for name, price in own.items():
        if not price >= 0:
            raise KtrayError(f"The price of '{name}' is {price} USD per hour", "Set prices.* to 0 or more.")
    gpus = device.get("gpus") or []
    spot = {name.removeprefix(SPOT): price for name, price in own.items() if name.startswith(SPOT)}
    own = {name: price for name, price in own.items() if not name.startswith(SPOT)}
    if device.get("market") == "spot":
        own |= spot
    instance = device.get("instance")
    gpu_name = str(gpus[0]["name"]) if gpus else ""
    by_name = _longest_match(own, gpu_name) if gpus else None
    if by_name is not None:
        return by_name
    whole = {**table["instances"], **own}.get(instance) if instance else None
    if whole is not None:
        return float(whole) / max(1, len(gpus))
    if gpus:
        return _longest_match(table["accelerators"], gpu_name)
    return float(own.get("cpu_core", table["cpu_core"])) * int(device["cores"])


def _longest_match(prices: Mapping[str, float], name: str) -> float | None:
    matches = [entry for entry in prices if entry.lower() in name.lower()]
    return float(prices[max(matches, key=len)]) if matches else None
