"""The checks: they turn what the nodes report into lines that say what to change."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The order of attempts compares clocks of machines; S3 refuses requests if a clock is 15 minutes off.
SKEW_WARNS, SKEW_FAILS = 5.0, 60.0  # seconds
SLOW_DECODE = 150.0  # images per second and core, a sixth of what a current core decodes


@dataclass(frozen=True)
class DoctorCheck:
    """The result of one check.

    Attributes:
        found: what the check found.
        remedy: what to change if the state is not ``ok``.
    """

    name: str
    state: Literal["ok", "warn", "FAIL"]
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The result as one line for the terminal."""
        return f"{self.state:<5} {self.name:<11} {self.found}" + (f". {self.remedy}" if self.remedy else "")


Probes = Mapping[str, Mapping[str, Any]]


def versions_alike(here: Mapping[str, str], probes: Probes) -> DoctorCheck:
    """Compare the versions of Python, ktray and the libraries on the driver and on the nodes."""
    different = [
        f"{probe['host']} has {name} {probe['versions'].get(name, 'none')}, the driver {here.get(name, 'none')}"
        for probe in probes.values()
        for name in sorted(here.keys() | probe["versions"].keys())
        if name != "platform" and probe["versions"].get(name) != here.get(name)
    ]
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        return DoctorCheck(
            "versions",
            "FAIL",
            "; ".join(different[:3]) + more,
            "Use the same image or the same lock file on all nodes.",
        )
    shown = ", ".join(f"{name} {here[name]}" for name in ("ktray", "python", "ray", "torch") if name in here)
    return DoctorCheck("versions", "ok", f"{shown} on {len(probes)} node(s)")


def store_shared(store: str, probes: Probes, missing: list[str]) -> DoctorCheck:
    """Check that all nodes read and write the same store.

    Args:
        missing: hosts whose file the driver cannot see.
    """
    wrong = [f"{p['host']}: {p['store']}" for p in probes.values() if p["store"]]
    wrong += [f"{host}: the driver cannot see the file that this node wrote" for host in missing]
    if wrong:
        remedy = "Set store= to one that all nodes share (s3://bucket/prefix or a shared folder) and may write to."
        return DoctorCheck("store", "FAIL", f"{store}: {'; '.join(wrong[:3])}", remedy)
    return DoctorCheck("store", "ok", f"{store} can be read and written on {len(probes)} node(s)")


def files_there(probes: Probes, names: tuple[str, ...]) -> DoctorCheck:
    """Check that every node can read the checkpoints of teacher and student."""
    if not names:
        return DoctorCheck("checkpoints", "ok", "none is set; published weights are downloaded at their first use")
    wrong = [f"{p['host']}: '{path}' {why}" for p in probes.values() for path, why in p["files"].items() if why]
    if wrong:
        return DoctorCheck(
            "checkpoints", "FAIL", "; ".join(wrong[:3]), "Copy them to a place that every node can read (s3://...)."
        )
    return DoctorCheck("checkpoints", "ok", f"{', '.join(names)} on {len(probes)} node(s)")


def gpus_seen(probes: Probes, counted: Mapping[str, float]) -> DoctorCheck:
    """Compare the GPUs that Ray counts with those that torch sees. A probe holds no GPU, so Ray hides none from it."""
    wrong = [
        f"{p['host']}: Ray counts {counted.get(node, 0.0):g}, torch sees {p['gpus']}"
        for node, p in probes.items()
        if counted.get(node, 0.0) > p["gpus"]
    ]
    if wrong:
        return DoctorCheck(
            "GPUs", "FAIL", "; ".join(wrong[:3]), "Check with nvidia-smi that the driver is new enough for this torch."
        )
    return DoctorCheck("GPUs", "ok", f"{sum(counted.values()):g} in total")


def clocks_agree(skews: Mapping[str, tuple[float, float]], hosts: Mapping[str, str]) -> DoctorCheck:
    """Compare the nodes' clocks with the driver's.

    Args:
        skews: for each node, how many seconds its clock is ahead of the driver's, and the uncertainty of this in
            seconds.
        hosts: for each node, its host name.
    """
    worst = max(skews, key=lambda node: abs(skews[node][0]) - skews[node][1], default=None)
    if worst is None:
        return DoctorCheck("clocks", "ok", "no nodes")
    ahead, uncertainty = skews[worst]
    certain = max(0.0, abs(ahead) - uncertainty)
    text = f"{hosts.get(worst, worst)} differs by {ahead:+.1f} s (± {uncertainty:.1f}) from the driver"
    if certain > SKEW_WARNS:
        state: Literal["warn", "FAIL"] = "FAIL" if certain > SKEW_FAILS else "warn"
        return DoctorCheck("clocks", state, text, "Run chrony or ntpd on all nodes.")
    return DoctorCheck("clocks", "ok", f"within {max(abs(a) for a, _ in skews.values()):.1f} s")


def decodes_fast(probes: Probes) -> DoctorCheck:
    """Check how fast a core decodes images. A slow core leaves a GPU waiting for images."""
    rates = {p["host"]: p["decode"] for p in probes.values() if "decode" in p}
    slowest = min(rates, key=lambda host: rates[host])
    text = f"{rates[slowest]:.0f} images/s per core (JPEGs of 500 x 375) on {slowest}"
    if rates[slowest] < SLOW_DECODE:
        return DoctorCheck("decoding", "warn", text, "Check whether the node is busy or its CPU is throttled.")
    return DoctorCheck("decoding", "ok", text if len(rates) == 1 else f"at least {text}")


def network(failures: list[tuple[str, str, str]], tried: int) -> DoctorCheck:
    """Check that the nodes can train together.

    Args:
        failures: pairs of hosts that cannot all-reduce, each with the reason.
        tried: number of pairs that were tried.
    """
    if failures:
        left, right, why = failures[0]
        more = f" (and {len(failures) - 1} more of {tried} pairs)" if len(failures) > 1 else ""
        remedy = (
            "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the nodes' network, and open the "
            "firewall between the nodes."
        )
        return DoctorCheck("network", "FAIL", f"{left} and {right} cannot all-reduce{more}: {why}", remedy)
    return DoctorCheck("network", "ok", f"{tried} pair(s) can all-reduce" if tried else "only one node trains")


def guarded(url: str | None) -> DoctorCheck:
    """Check that the dashboard, which runs any code that it is sent, requires a token."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if not url:
        return DoctorCheck("token", "ok", f"there is no dashboard (RAY_AUTH_MODE is {mode})")
    try:
        # The dashboard is inside the cluster, which is not reached through a proxy.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/api/version", timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return DoctorCheck("token", "ok", f"{url} requires a token")
    except OSError as error:
        return DoctorCheck(
            "token", "warn", f"{url} cannot be reached from here ({error})", "Run this check on the head node."
        )
    text = f"{url} answers without a token (RAY_AUTH_MODE is {mode})"
    loopback = url.split("//")[-1].split(":")[0] in ("127.0.0.1", "localhost", "[::1]")
    remedy = "Start Ray with RAY_AUTH_MODE=token: everyone who can reach this address can run code on the cluster."
    return DoctorCheck("token", "warn" if loopback else "FAIL", text, remedy)
