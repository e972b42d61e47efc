"""From what nodes say to lines that a person can act on."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The order of attempts compares clocks of machines; S3 refuses requests 15 minutes off.
SKEW_WARNS, SKEW_FAILS = 5.0, 60.0
SLOW_DECODE = 150.0  # images a second and core, a sixth of what a current core does


@dataclass(frozen=True)
class DoctorCheck:
    """One line. ``remedy`` is for what is not ok."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """For the terminal."""
        return f"{self.state:<5} {self.name:<11} {self.found}" + (f". {self.remedy}" if self.remedy else "")


Probes = Mapping[str, Mapping[str, Any]]


def versions_alike(here: Mapping[str, str], probes: Probes) -> DoctorCheck:
    """Of Python, ktray and the libraries, on driver and nodes."""
    apart = [
        f"{probe['host']} has {name} {probe['versions'].get(name, 'none')}, the driver {here.get(name, 'none')}"
        for probe in probes.values()
        for name in sorted(here.keys() | probe["versions"].keys())
        if name != "platform" and probe["versions"].get(name) != here.get(name)
    ]
    if apart:
        more = f" (and {len(apart) - 3} more)" if len(apart) > 3 else ""
        return DoctorCheck(
            "versions", "FAIL", "; ".join(apart[:3]) + more, "Use one image, or one lock, for all nodes."
        )
    shown = ", ".join(f"{name} {here[name]}" for name in ("ktray", "python", "ray", "torch") if name in here)
    return DoctorCheck("versions", "ok", f"{shown} on {len(probes)} node(s)")


def store_shared(store: str, probes: Probes, missing: list[str]) -> DoctorCheck:
    """``missing``: hosts whose file the driver cannot see."""
    wrong = [f"{p['host']}: {p['store']}" for p in probes.values() if p["store"]]
    wrong += [f"{host}: the driver cannot see what it wrote" for host in missing]
    if wrong:
        remedy = "Name one that all nodes share (s3://bucket/prefix or a shared folder), with rights to write."
        return DoctorCheck("store", "FAIL", f"{store}: {'; '.join(wrong[:3])}", remedy)
    return DoctorCheck("store", "ok", f"{store} is read and written by {len(probes)} node(s)")


def files_there(probes: Probes, names: tuple[str, ...]) -> DoctorCheck:
    """The teacher's and the student's checkpoints."""
    if not names:
        return DoctorCheck("checkpoints", "ok", "none is named; published weights are fetched when they are first used")
    wrong = [f"{p['host']}: '{path}' {why}" for p in probes.values() for path, why in p["files"].items() if why]
    if wrong:
        return DoctorCheck(
            "checkpoints", "FAIL", "; ".join(wrong[:3]), "Put them where every node reads them (s3://...)."
        )
    return DoctorCheck("checkpoints", "ok", f"{', '.join(names)} on {len(probes)} node(s)")


def gpus_seen(probes: Probes, counted: Mapping[str, float]) -> DoctorCheck:
    """What Ray counts against what torch sees; a probe holds no GPU, so Ray hides none from it."""
    wrong = [
        f"{p['host']}: Ray counts {counted.get(node, 0.0):g}, torch sees {p['gpus']}"
        for node, p in probes.items()
        if counted.get(node, 0.0) > p["gpus"]
    ]
    if wrong:
        return DoctorCheck(
            "GPUs", "FAIL", "; ".join(wrong[:3]), "Is the driver new enough for this torch (nvidia-smi)?"
        )
    return DoctorCheck("GPUs", "ok", f"{sum(counted.values()):g} in all")


def clocks_agree(skews: Mapping[str, tuple[float, float]], hosts: Mapping[str, str]) -> DoctorCheck:
    """``skews``: by node, seconds ahead of the driver, and how uncertain that is."""
    worst = max(skews, key=lambda node: abs(skews[node][0]) - skews[node][1], default=None)
    if worst is None:
        return DoctorCheck("clocks", "ok", "no nodes")
    ahead, unsure = skews[worst]
    sure = max(0.0, abs(ahead) - unsure)
    text = f"{hosts.get(worst, worst)} is {ahead:+.1f} s (± {unsure:.1f}) from the driver"
    if sure > SKEW_WARNS:
        return DoctorCheck("clocks", "FAIL" if sure > SKEW_FAILS else "warn", text, "Run chrony or ntpd on all nodes.")
    return DoctorCheck("clocks", "ok", f"within {max(abs(a) for a, _ in skews.values()):.1f} s")


def decodes_fast(probes: Probes) -> DoctorCheck:
    """A core that is this slow starves a GPU."""
    rates = {p["host"]: p["decode"] for p in probes.values() if "decode" in p}
    slowest = min(rates, key=lambda host: rates[host])
    text = f"{rates[slowest]:.0f} images/s and core (JPEGs of 500 x 375) on {slowest}"
    if rates[slowest] < SLOW_DECODE:
        return DoctorCheck("decoding", "warn", text, "Is the node busy, or its CPU throttled?")
    return DoctorCheck("decoding", "ok", text if len(rates) == 1 else f"at least {text}")


def network(apart: list[tuple[str, str, str]], tried: int) -> DoctorCheck:
    """``apart``: two hosts and why they cannot all-reduce."""
    if apart:
        left, right, why = apart[0]
        more = f" (and {len(apart) - 1} more of {tried} pairs)" if len(apart) > 1 else ""
        remedy = "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the nodes' network, and open it between them."
        return DoctorCheck("network", "FAIL", f"{left} and {right} cannot all-reduce{more}: {why}", remedy)
    return DoctorCheck("network", "ok", f"all-reduce between {tried} pair(s)" if tried else "a single node trains")


def guarded(url: str | None) -> DoctorCheck:
    """Whether the dashboard, which runs whatever it is given, asks for a token."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if not url:
        return DoctorCheck("token", "ok", f"no dashboard runs (RAY_AUTH_MODE is {mode})")
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return DoctorCheck("token", "ok", f"{url} asks for it")
    except OSError as error:
        return DoctorCheck("token", "warn", f"{url} is not reached from here ({error})", "Look from where it is.")
    text = f"{url} answers without a token (RAY_AUTH_MODE is {mode})"
    loopback = url.split("//")[-1].split(":")[0] in ("127.0.0.1", "localhost", "[::1]")
    remedy = "Start Ray with RAY_AUTH_MODE=token: who reaches this address runs code on the cluster."
    return DoctorCheck("token", "warn" if loopback else "FAIL", text, remedy)
