"""Weight files: download, fingerprints, safe reading without code execution, and checks against a model."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pyarrow.fs as pafs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.weight_forms import common_prefix, file_form, key_form, unwrapped
from ktray.storage import remote, s3

Tensors = dict[str, torch.Tensor]
# numpy raises ValueError for pickled objects in .npy and .npz, which open_clip also reads.
_WRONG_CONTENT = (AttributeError, TypeError, KeyError, ValueError, StopIteration)


def fetch(uri: str, key: str = "teacher.checkpoint") -> Path:
    """The local path of a file: the path itself, or for ``s3://`` and other URIs a copy in the user's cache.

    Args:
        uri: path or URI of one file.
        key: the recipe key with the uri, for the remedy of errors.

    Raises:
        KtrayError: there is no such file, or it cannot be fetched.
    """
    if "://" not in uri:
        path = Path(uri).expanduser()
        if not path.is_file():
            raise KtrayError(f"There is no file '{uri}'", f"Set {key}= to an existing file.")
        return path
    try:
        fs, inside = remote.open_uri(uri)
        info = fs.get_file_info(inside)
        if info.type != pafs.FileType.File:
            raise KtrayError(f"There is no file '{uri}'", f"Set {key}= to an existing object.")
        version = hashlib.sha256(f"{uri}|{info.size}|{info.mtime_ns}".encode()).hexdigest()[:16]
        target = _cache() / version / Path(inside).name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Several workers may fetch at the same time: each writes its own file, and the rename is atomic.
            handle, temporary = tempfile.mkstemp(dir=target.parent)
            os.close(handle)
            try:
                s3.download(fs, inside, Path(temporary))
                os.replace(temporary, target)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
    except (OSError, ValueError) as error:
        raise KtrayError(
            f"'{uri}' cannot be fetched: {cause(error)}", f"Check {key}=, the network and the credentials."
        ) from error
    return target


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ktray" / "weights"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Computed once per process, unless size or modification time change."""
    stat = path.stat()
    return _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def weight_errors(path: Path, key: str = "teacher.checkpoint") -> Iterator[None]:
    """Convert exceptions of torch, safetensors and open_clip for an invalid weight file to `KtrayError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise KtrayError(
            f"'{path}' contains more than tensors (or is damaged). It is not opened, because a pickle can run code",
            file_form(path) or f"Save the state dict as safetensors and set {key}= to it.",
        ) from error
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if wrong:
            raise KtrayError(
                f"The weights in '{path}' and the model have different shapes: {'; '.join(wrong[:3])}",
                f"Check that {key}= belongs to this model (name, config, image size).",
            ) from error
        raise _unreadable(path, error, key) from error
    except (SafetensorError, OSError, EOFError, BadZipFile, *_WRONG_CONTENT) as error:
        raise _unreadable(path, error, key) from error


def read_weights(path: Path, key: str = "teacher.checkpoint") -> Tensors:
    """The state dict of a safetensors or (weights-only) torch file, on the CPU.

    Wrappers of training scripts are removed: the entries ``state_dict`` and ``model`` (averaged weights have priority),
    and the prefixes of DDP, FSDP and torch.compile.

    Raises:
        KtrayError: the file cannot be read, or is a pickle with other content than tensors and plain containers.
    """
    with weight_errors(path, key):
        loaded: Any
        if path.suffix == ".safetensors":
            loaded = load_file(str(path), device="cpu")
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    for inner in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(inner), dict):
            loaded = loaded[inner]
            break
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise KtrayError(f"'{path}' does not contain a state dict", f"Set {key}= to a file with named tensors.")
    return unwrapped(loaded)


def mismatch(model: nn.Module, state: Tensors) -> str:
    """Why a state dict does not fit a model, with up to three keys for each reason; empty if it fits."""
    own = model.state_dict()
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    return describe_keys([k for k in own if k not in state], [k for k in state if k not in own], shapes)


def describe_keys(missing: list[str], unexpected: list[str], shapes: list[str] | None = None) -> str:
    """One line about missing, unexpected and wrongly shaped keys; empty if there are none."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("with another shape", shapes or []))
    return "; ".join(f"{len(keys)} {kind} ({_first_keys(keys)})" for kind, keys in kinds if keys)


def wrong_keys(path: Path | str, why: str, key: str = "teacher.checkpoint", names: Iterable[str] = ()) -> KtrayError:
    """The error for weights that do not belong to the model.

    Args:
        names: the names of the weights in the file, by which other forms are recognised.
    """
    form = key_form(names)
    prefix = common_prefix(names)
    if not form and prefix:
        form = f"All names begin with '{prefix}': if a wrapper added it, save the weights of the model inside."
    return KtrayError(
        f"The weights in '{path}' do not fit the model: {why}",
        form or f"Check that {key}= belongs to this model (name, config, image size).",
    )


def plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in a form that safetensors can save: on the CPU, contiguous, and without shared memory."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def fill(module: nn.Module, path: Path) -> None:
    """Load the weights of a safetensors file into the module.

    Raises:
        KtrayError: the weights cannot be read, or belong to another architecture.
    """
    with weight_errors(path):
        state = load_file(str(path))
    if why := mismatch(module, state):
        raise wrong_keys(path, why, names=state)
    module.load_state_dict(state)


def load_timm_weights(model: nn.Module, path: Path, key: str, *, keep_head: bool = False) -> bool:
    """Load a weight file into a timm model, strictly.

    The classifier of the file is not loaded if the model has none or, unless `keep_head` is set, one with another
    number of classes.

    Args:
        model: a timm model; changed in place.
        path: the file.
        key: the recipe key with the path.
        keep_head: require that the classifier fits as well.

    Returns:
        Whether the file's classifier was loaded (or the model has none).

    Raises:
        KtrayError: see `read_weights`; or keys or shapes do not fit.
    """
    return load_timm_state(model, read_weights(path, key), path, key, keep_head=keep_head)


def load_timm_state(model: nn.Module, state: Tensors, path: Path | str, key: str, *, keep_head: bool = False) -> bool:
    """Like `load_timm_weights`, for weights that were read from a file before."""
    names = list(state)
    fitted, loaded_head = _fit_head(model, state, keep_head)
    problem = mismatch(model, fitted)
    if problem and (prefix := common_prefix(state)):
        inner = {name.removeprefix(prefix): value for name, value in state.items()}
        fitted_inner, has_head = _fit_head(model, inner, keep_head)
        if not mismatch(model, fitted_inner):
            model.load_state_dict(fitted_inner)
            return has_head
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if problem and convert is not None:
        # Published weights may have other names, or position embeddings for another size. If the converter fails,
        # the check below reports the keys.
        with contextlib.suppress(Exception):
            state = convert(state, model)
        fitted, loaded_head = _fit_head(model, state, keep_head)
        problem = mismatch(model, fitted)
    if problem:
        raise wrong_keys(path, problem, key, names)
    model.load_state_dict(fitted)
    return loaded_head


def _head_names(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ()
    return tuple(f"{n}." for n in ((names,) if isinstance(names, str) else names))


def _fit_head(model: nn.Module, state: Tensors, keep_head: bool) -> tuple[Tensors, bool]:
    """The state dict, with the model's own classifier if that of the file does not fit; and whether it fits."""
    if keep_head:
        return state, True
    own, heads = model.state_dict(), _head_names(model)
    wrong = {k for k, v in state.items() if heads and k.startswith(heads) and (k not in own or own[k].shape != v.shape)}
    kept = {k: v for k, v in state.items() if k not in wrong}
    absent = [k for k in own if heads and k.startswith(heads) and k not in kept]
    return {**kept, **{k: own[k] for k in absent}}, not absent


def _first_keys(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _unreadable(path: Path, error: Exception, key: str) -> KtrayError:
    return KtrayError(
        f"'{path}' cannot be read as weights: {cause(error)}",
        file_form(path) or f"Set {key}= to a safetensors file or a state dict saved by torch.",
    )
