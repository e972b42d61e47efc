"""Work on shards that needs a model on a device: what the device computes, and what a CPU does with it.

A device computes from a few columns of a shard, and gives back small results (embeddings, logits, scores). The CPU task
that prepared the shard keeps its other columns, and stores the shard. So no pixels return from a device, and a GPU does
not wait for files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ktray.storage.columns import Rows

Item = dict[str, Any]


class LoadsModel(Protocol):
    """A picklable description of a model. Equal pickles are the same model, which a worker keeps for the next stage."""

    def load(self) -> Any:
        """Load the model on the device of this process."""


class DeviceWork(Protocol):
    """A picklable description of the work.

    Attributes:
        model: the model.
        reads: names of the columns that `compute` needs.
    """

    @property
    def model(self) -> LoadsModel: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def compute(self, model: Any, columns: Rows) -> Rows:
        """Compute on the device.

        Args:
            model: the loaded model.
            columns: the columns of a shard in `reads`.
        """

    def finish(self, item: Item, columns: Rows, computed: Rows) -> Any:
        """Store the shard, on a CPU. Returns a summary (JSON-able) for `ktray.distributed.ray_data.map_shards`.

        Args:
            item: the description of the shard.
            columns: all columns of the shard.
            computed: the result of `compute`.
        """


def compute(work: DeviceWork, model: Any, columns: Rows) -> Rows:
    """`DeviceWork.compute` on the columns that it reads."""
    return work.compute(model, {name: columns[name] for name in work.reads})


def in_this_process(work: DeviceWork, model: Any) -> Callable[[Item, Rows], Any]:
    """A function that does both parts of the work here, with a loaded model."""
    return lambda item, columns: work.finish(item, columns, compute(work, model, columns))
