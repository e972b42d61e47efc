"""What the cloud provider says about this machine, from its metadata service (AWS and Google Cloud)."""

from __future__ import annotations

import contextlib
import urllib.request

SERVICE = "http://169.254.169.254"  # the link-local address of the metadata services
_SECONDS = 0.5
_SPOT = "spot"


def machine_type(service: str = SERVICE) -> dict[str, str]:
    """``instance``, the provider's name for the type of this machine, and ``market``: ``spot`` or ``on-demand``.

    Empty if no service answers: outside of a cloud, or in a container that cannot reach it.
    """
    with contextlib.suppress(OSError, ValueError):
        return _google(service)
    with contextlib.suppress(OSError, ValueError):
        return _aws(service)
    return {}


def _google(service: str) -> dict[str, str]:
    place, headers = f"{service}/computeMetadata/v1/instance", {"Metadata-Flavor": "Google"}
    name = _get(f"{place}/machine-type", headers).rpartition("/")[2]
    spot = _get(f"{place}/scheduling/preemptible", headers).upper() == "TRUE"
    return {"instance": name, "market": _SPOT if spot else "on-demand"}


def _aws(service: str) -> dict[str, str]:
    token = _get(f"{service}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    place, headers = f"{service}/latest/meta-data", {"X-aws-ec2-metadata-token": token}
    return {
        "instance": _get(f"{place}/instance-type", headers),
        "market": _get(f"{place}/instance-life-cycle", headers),
    }


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    # No proxy: the address is only valid on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=_SECONDS) as answer:
        content: bytes = answer.read(1000)
    return content.decode("ascii").strip()
