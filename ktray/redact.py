"""Removal of secrets from what is logged and shown.

Masked texts are for people. What a program uses - paths, names, ids - is never masked, because it would no longer name
what it named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
_SECRET_WORDS = r"secret|passw(or)?d|credential|authorization|(api|access|private)_?key|(^|[._-])token$|_token$"
_SECRET_KEY = re.compile(rf"(^|[._-])aws_|{_SECRET_WORDS}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(_SECRET_WORDS, re.IGNORECASE)
# Tokens of known services. Names of files, such as hf_image_classification_sets, look like them but for the lengths
# and the signs, and a name must stay what it is.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}|"
    r"hf_[A-Za-z0-9]{30,}|glpat-[\w-]{20,}|sk-[A-Za-z0-9]{32,}|sk-(?:proj|ant|svcacct)-[\w-]{32,})(?![A-Za-z0-9])"
)
_SECRET_TEXT = (
    (re.compile(r"(?<=://)[^/\s]+@"), f"{HIDDEN}@"),  # user:password@ in a URL
    (re.compile(r"(?i)([?&][\w-]*(?:signature|token|credential|sig|password|key)=)[^&\s]+"), rf"\1{HIDDEN}"),
    (_TOKEN, HIDDEN),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
)
# Forms that can only be secrets, so that a recipe that contains one can be rejected. The name of a user without a
# password (postgresql://ktray@host/runs) is not a secret.
_CERTAIN = {
    "a password": re.compile(r"://[^/\s@:]*:[^/\s]+@"),
    "a signed URL": _SECRET_TEXT[1][0],
    "a key or token": _TOKEN,
}


def scrub(value: Any, key: str = "") -> Any:
    """``value`` with its secrets replaced by `HIDDEN`.

    Secrets are texts under keys with a telling name ("password"), parts of URLs, texts in a known form of token, and
    the values of environment variables with a telling name.
    """
    if isinstance(value, Mapping):
        return {str(k): scrub(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(v, key) for v in value]
    # A switch or a number under such a name ("class_token: true") is not a secret, except a number as a password.
    if value is not None and _SECRET_KEY.search(key) and (isinstance(value, str) or "passw" in key.lower()):
        return HIDDEN
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_VARIABLE.search(name) and not name.upper().endswith(("_FILE", "_PATH")):
            value = value.replace(secret, HIDDEN)
    for pattern, replacement in _SECRET_TEXT:
        value = pattern.sub(replacement, value)
    return value


def credential_in(value: Any) -> str:
    """The kind of secret that a text contains, judged by its form alone; empty if there is none.

    Args:
        value: a text, or a list or mapping whose texts are searched.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((kind for item in value if (kind := credential_in(item))), "")
    return next((kind for kind, form in _CERTAIN.items() if isinstance(value, str) and form.search(value)), "")
