"""A package of weights like those on the registry, for tests: a folder with one file, and no code that may run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from ktray.models.packaged import PackagedWeights

ARCHITECTURE = "test_efficientnet"


def fake_package(folder: Path, patch: pytest.MonkeyPatch, seed: int = 3) -> SimpleNamespace:
    """Install a package with random weights of a small timm model, under names that are not timm's.

    Returns:
        ``weights``: its description; ``model``: the timm model with the same weights, in evaluation mode; ``file``: the
        path of the file.
    """
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE).eval()
    module = f"fake_weights_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    file = folder / module / "models" / "fake.pth"
    file.parent.mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    torch.save({f"_{k.replace('.', '_', k.count('.') - 1)}": v for k, v in model.state_dict().items()}, file)
    patch.syspath_prepend(str(folder))
    weights = PackagedWeights(
        name="fake-lite",
        architecture=ARCHITECTURE,
        requirement="fake-lite-model==0.1.0",
        module=module,
        file="models/fake.pth",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        licence="apache-2.0 (fake)",
    )
    return SimpleNamespace(weights=weights, model=model, file=file)
