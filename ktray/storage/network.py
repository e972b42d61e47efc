"""Proxies and private certificate authorities, by the same rules for all clients: both clients of S3, and MLflow.

pyarrow reads none of these variables by itself, botocore and requests read different ones.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import MutableMapping
from urllib.parse import urlsplit

CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"""The variables that name a file of certificates; the first that is set is used."""

# libcurl's codes for certificates (51, 60), for their file (77), and for a TLS handshake that failed (35); botocore's.
_CERTIFICATE = re.compile(r"curlCode: (?:35|51|60|77)\b|CERTIFICATE_VERIFY_FAILED|SSL validation failed|CA bundle")
_PROXY = re.compile(r"curlCode: 5\b|response 407|ProxyConnectionError|Failed to connect to proxy")


def certificates() -> str | None:
    """The file with the certificate authorities to trust; None: those that each client has.

    Raises:
        ValueError: the variable names no file.
    """
    for name in CERTIFICATES:
        if path := os.environ.get(name):
            if not os.path.isfile(path):
                raise ValueError(f"there is no file '{path}' ({name}), which should hold certificates")
            return path
    return None


def proxy_for(url: str) -> str | None:
    """The proxy through which a client reaches a url: ``HTTP_PROXY`` or ``HTTPS_PROXY`` and ``NO_PROXY``.

    Raises:
        ValueError: a proxy of another kind than HTTP.
    """
    parts = urlsplit(url)
    # botocore uses the same function.
    if urllib.request.proxy_bypass_environment(parts.netloc.rpartition("@")[2]):  # type: ignore[attr-defined]
        return None
    found = urllib.request.getproxies_environment().get(parts.scheme)
    if not found:
        return None
    address = found if "://" in found else f"http://{found}"
    kind = address.partition("://")[0]
    if kind not in ("http", "https"):
        raise ValueError(
            f"{parts.scheme.upper()}_PROXY is a {kind} proxy, and S3 can only be reached through http ones"
        )
    return address


def keep_loopback(environment: MutableMapping[str, str]) -> None:
    """Exempt this machine's own servers from the proxies of ``environment``, if there are any: no proxy reaches
    them."""
    if not any(
        environment.get(name)
        for kind in ("http", "https", "all")
        for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")
    ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        present = [part.strip() for part in environment.get(name, "").split(",") if part.strip()]
        if name == "no_proxy" and not present:
            continue  # Python prefers the lower-case name; setting it would hide the other one
        environment[name] = ",".join(dict.fromkeys([*present, "localhost", "127.0.0.1", "::1"]))


def is_certificate(error: BaseException) -> bool:
    """Whether a server's certificate was refused. Repeating the request does not help."""
    return bool(_CERTIFICATE.search(str(error)))


def remedy(text: str) -> str:
    """What to change after an error of a connection, as a sentence; empty if neither a proxy nor a certificate is
    its cause."""
    if _CERTIFICATE.search(text):
        return "Set AWS_CA_BUNDLE to a file with the certificates of your authority, on every machine of the cluster."
    if _PROXY.search(text):
        return "Check HTTPS_PROXY and HTTP_PROXY, or add the server's host to NO_PROXY."
    return ""
