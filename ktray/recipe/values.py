"""Values of recipe keys as they are typed: the type of the key decides how a text is read.

A key whose type is text takes the text unchanged, so that folders called ``2024_01``, ``my #1 photos``, ``yes`` or
``[old]`` are what they look like. ``[a, b]`` for a list of texts is divided at the commas; quotes make it YAML.
Numbers, other lists and mappings are read as YAML, with the scalars of YAML 1.2 (core schema): YAML 1.1, which PyYAML
reads by default, takes ``2024_01`` and ``1:30`` for numbers, ``no`` for false, and ``2026-11-27`` for a date, but
``1e-3`` for text.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from ktray.errors import KtrayError

# Schema keys that hold a mapping with keys of the user's own: what follows the dot is one key, whatever it contains.
OPEN_KEYS = ("student.kwargs", "prices", "mlflow.tags")


@dataclass(frozen=True)
class Scalar:
    """A scalar of a YAML document: its text, and the value that it has where the type of its key is not text."""

    text: str
    value: Any


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of the core schema of YAML 1.2, each as a `Scalar`."""


class _Dumper(yaml.SafeDumper):
    """YAML in which texts that one of the two schemas takes for something else are quoted."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _schema in (_Loader, _Dumper):
        _schema.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), [*_first, ""])


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Scalar:
    kind = node.tag.rpartition(":")[2]
    text = str(node.value)
    if kind == "null":
        return Scalar(text, None)
    if kind == "bool":
        return Scalar(text, text.lower() == "true")
    if kind == "int":
        return Scalar(text, int(text, 0) if text[:2] in ("0o", "0x") else int(text))
    if kind == "float":
        return Scalar(text, float(re.sub(r"\.(?=inf|nan)", "", text.lower())))
    return Scalar(text, text)


for _tag in ("null", "bool", "int", "float", "str"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)


def read_document(text: str) -> Any:
    """A YAML document with a `Scalar` in place of each scalar value. Keys of mappings are text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return _text_keys(yaml.load(text, _Loader))  # a subclass of SafeLoader


def write_document(value: Any) -> str:
    """Inverse of `read_document` for plain values, in the order of their keys."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {k.text if isinstance(k, Scalar) else k: _text_keys(v) for k, v in value.items()}
    return [_text_keys(v) for v in value] if isinstance(value, list) else value


def plain(value: Any, kind: Any = Any) -> Any:
    """A value of a document for a key of the type ``kind``: scalars are text where the type is text."""
    if isinstance(value, Scalar):
        allowed = _kinds(kind)
        as_text = "text" in allowed and not allowed & {"number", "any"} and value.value is not None
        return value.text if as_text else value.value
    if isinstance(value, Mapping):
        inner = next((get_args(k)[1] for k in _branches(kind) if get_origin(k) is dict), Any)
        return {k: plain(v, inner) for k, v in value.items()}
    if isinstance(value, list):
        inner = next((get_args(k)[0] for k in _branches(kind) if get_origin(k) is list), Any)
        return [plain(v, inner) for v in value]
    return value


def parse(key: str, text: str, kind: Any) -> Any:
    """The value of ``key=text`` on a command line.

    Args:
        key: the key, for errors.
        text: what follows the ``=``; an empty text is null.
        kind: the annotation of the key.

    Raises:
        KtrayError: a list or mapping is not YAML.
    """
    if not text.strip():
        return None
    allowed = _kinds(kind)
    opens = {"list": "[", "mapping": "{"}
    bracketed = any(text.lstrip().startswith(sign) for name, sign in opens.items() if name in allowed | _any(allowed))
    if "text" in allowed and not allowed & {"number", "any"} and not bracketed:
        return None if text in ("null", "~") and "null" in allowed else text
    listed = text.strip()
    if bracketed and listed[0] == "[" and listed[-1] == "]" and _lists_text(kind) and not set(listed) & set("'\""):
        return [item.strip() for item in listed[1:-1].split(",") if item.strip()]
    try:
        return plain(read_document(text), kind)
    except yaml.YAMLError as error:
        if bracketed or "text" not in allowed | _any(allowed):
            raise KtrayError(
                f"The value of '{key}' is not YAML: {' '.join(str(error).split())[:200]}",
                "Write lists as [a, b] and mappings as {key: value}, with quotes around texts that contain one of "
                "these: , : # [ ] { }",
            ) from error
        return text


def _lists_text(kind: Any) -> bool:
    """Whether a list of this type has only texts. Such a list is divided at its commas, because YAML would take signs
    in names, such as ``#`` and ``{}``, for its own."""
    lists = [get_args(branch) for branch in _branches(kind) if get_origin(branch) is list]
    return bool(lists) and all(_kinds(item) == {"text"} for (item,) in lists)


def _any(allowed: set[str]) -> set[str]:
    return {"list", "mapping", "text"} if "any" in allowed else set()


def _branches(kind: Any) -> list[Any]:
    """The branches of a union, without annotations and with the types of literals' values."""
    if get_origin(kind) is Annotated:
        return _branches(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [branch for arg in get_args(kind) for branch in _branches(arg)]
    if get_origin(kind) is Literal:
        return [type(value) for value in get_args(kind)]
    return [kind]


def _kinds(kind: Any) -> set[str]:
    """What values of a type may be: null, text, number, list, mapping, any."""
    found = set()
    for branch in _branches(kind):
        outer = get_origin(branch) or branch
        if outer is Any:
            found.add("any")
        elif outer is type(None):
            found.add("null")
        elif isinstance(outer, type) and issubclass(outer, str):
            found.add("text")
        elif isinstance(outer, type) and issubclass(outer, bool | int | float):
            found.add("number")
        elif outer in (list, tuple):
            found.add("list")
        elif outer is dict:
            found.add("mapping")
        else:
            found.add("any")
    return found
