"""Files as an attacker would make them: reading one with pickle leaves a mark."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Unpickling it writes ``mark``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.mark, "executed"))


def write_torch(path: Path, mark: Path) -> Path:
    """As ``torch.save`` writes, whatever the suffix says."""
    torch.save({"state_dict": Payload(mark)}, path)
    return path


def write_pickle(path: Path, mark: Path) -> Path:
    path.write_bytes(pickle.dumps(Payload(mark)))
    return path


def write_legacy(path: Path, mark: Path) -> Path:
    """As torch wrote before its zip files: several pickles in a row."""
    torch.save({"state_dict": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    return path


def write_numpy(path: Path, mark: Path) -> Path:
    """An array of objects in .npy or .npz, which numpy pickles."""
    array = np.array([Payload(mark)], dtype=object)
    with open(path, "wb") as stream:
        if path.suffix == ".npz":
            np.savez(stream, **{"params/img/embedding/kernel": array})
        else:
            np.save(stream, array, allow_pickle=True)
    return path
