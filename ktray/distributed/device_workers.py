"""Device workers: one process for each GPU, or share of a GPU, that lives as long as the job.

A new process on a GPU needs 10 to 20 s for imports and for opening CUDA, and a run has about ten stages that use the
GPU. Stages therefore borrow the workers, which keep the models that they loaded last. Without GPUs there are none: Ray
keeps the processes of CPU tasks anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ktray.distributed.assigned import use_assigned_device
from ktray.distributed.device_work import DeviceWork, compute
from ktray.distributed.packing import pack, unpack

MODELS = 2  # models that a worker keeps: the teacher of one stage, and that of the next
AT_ONCE = 2  # shards of a worker at a time: one is computed while the columns of the other are copied
_PROBE = "probe"  # Ray's group of threads for `BorrowedWorker.probe`, so that it does not wait behind the work


class _DeviceWorker:
    """The process of a device worker."""

    def __init__(self) -> None:
        use_assigned_device()
        self._models: OrderedDict[bytes, Any] = OrderedDict()
        self._work: tuple[str, Any] = ("", None)  # its key, and what was loaded
        self._model_name = b""  # of the work
        self._lock = threading.Lock()  # two calls must not load a model twice

    def here(self) -> None:
        """Return if the process runs."""

    def call(self, threads: int, work: bytes) -> Any:
        """Call a function that needs the whole device. The kept models make room for it."""
        import torch
        from ray import cloudpickle

        _use(threads)
        with self._lock:
            self._forget(0)
        try:
            return cloudpickle.loads(work)()
        finally:
            torch.backends.cudnn.benchmark = False  # the next stage may have varying shapes

    def compute(self, threads: int, key: str, work: list[Any], columns: pa.Table) -> pa.Table:
        """`DeviceWork.compute` on packed columns."""
        _use(threads)
        plan, model = self._ready(key, work)
        return pa.table({"columns": pack(compute(plan, model, unpack(columns.column("columns"))))})

    def apply(self, threads: int, key: str, work: list[Any], item: Any, shared: list[Any]) -> Any:
        """Call a function with an item and the referenced values."""
        import ray

        _use(threads)
        with self._lock:
            function = self._loaded(key, work)
        return function(item, *ray.get(shared))

    def _ready(self, key: str, work: list[Any]) -> tuple[DeviceWork, Any]:
        from ray import cloudpickle

        with self._lock:
            known = self._work[0] == key
            plan: DeviceWork = self._loaded(key, work)
            if not known:
                self._model_name = hashlib.sha256(cloudpickle.dumps(plan.model)).digest()
            name = self._model_name
            if name not in self._models:
                self._forget(MODELS - 1)
                self._models[name] = plan.model.load()
            self._models.move_to_end(name)
            return plan, self._models[name]

    def _loaded(self, key: str, work: list[Any]) -> Any:
        """The work or function with this key. The last one is kept."""
        import ray
        from ray import cloudpickle

        if self._work[0] != key:
            self._work = key, cloudpickle.loads(ray.get(work[0]))
        return self._work[1]

    def _forget(self, keep: int) -> None:
        """Drop the models that were not used for the longest time."""
        from ktray.models.compilation import forget_compiled

        while len(self._models) > keep:
            self._models.popitem(last=False)
        forget_compiled()


def _use(threads: int) -> None:
    """Let this thread, one of several that Ray calls, compute with ``threads`` threads.

    OpenMP keeps the number for each thread, and a worker that was started again has no number from before.
    """
    import torch

    torch.set_num_threads(threads)


@dataclass(frozen=True)
class BorrowedWorker:
    """A device worker in which a stage may compute with ``threads`` threads; picklable.

    The calls return references. If the process dies during a call, the reference has one of Ray's errors
    (`ktray.distributed.device_calls.lost_errors`); the process is started again, and further calls wait for it.
    """

    actor: Any
    threads: int

    def probe(self) -> Any:
        """Call a function that returns at once if the process runs, also if it is at work."""
        return self.actor.here.options(concurrency_group=_PROBE).remote()

    def call(self, work: bytes) -> Any:
        """Call a pickled function that needs the whole device."""
        return self._once("call", work)

    def compute(self, key: str, work: list[Any], columns: pa.Table) -> Any:
        """`DeviceWork.compute` on packed columns.

        Args:
            key: identifies the work.
            work: reference to the pickled work, in a list, so that it is read only once.
        """
        return self._once("compute", key, work, columns)

    def apply(self, key: str, work: list[Any], item: Any, shared: list[Any]) -> Any:
        """Call a function, which is identified like the work of `compute`, with an item and the referenced values."""
        return self._once("apply", key, work, item, shared)

    def _once(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).options(max_task_retries=0).remote(self.threads, *arguments)


class DeviceWorkers:
    """The device workers of this driver. Pipelines on several threads borrow different ones."""

    def __init__(self) -> None:
        self._idle: list[tuple[tuple[float, float], Any]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, count: int, cpus: float, gpus: float, threads: int = 1) -> Iterator[list[BorrowedWorker]]:
        """``count`` workers with ``cpus``, ``gpus`` and ``threads`` each; new ones if too few are idle.

        Idle workers of another size are ended, because they hold the GPUs. After an error the workers are ended, too,
        because they may still be at work.
        """
        kind = (cpus, gpus)
        with self._lock:
            own = [worker for known, worker in self._idle if known == kind][:count]
            others = [worker for known, worker in self._idle if known != kind]
            self._idle = [(known, worker) for known, worker in self._idle if known == kind and worker not in own]
        _end(others)
        own += [_start(*kind) for _ in range(count - len(own))]
        try:
            yield [BorrowedWorker(worker, threads) for worker in own]
        except BaseException:
            _end(own)
            raise
        with self._lock:
            self._idle += [(kind, worker) for worker in own]

    def end(self) -> None:
        """End the idle workers, so that their GPUs are free for other processes."""
        with self._lock:
            idle, self._idle = self._idle, []
        _end([worker for _, worker in idle])


WORKERS = DeviceWorkers()


def _start(cpus: float, gpus: float) -> Any:
    import ray

    remote: Any = ray.remote  # Ray declares only some of the options
    options: dict[str, Any] = {
        "num_cpus": cpus, "num_gpus": gpus, "max_concurrency": AT_ONCE, "concurrency_groups": {_PROBE: 1},
        # Each loss of a call is counted for its item, not here. Without a limit here, calls wait while the process
        # starts again; otherwise Ray would take each second of that as a try, and end the call after the last one.
        "max_restarts": -1, "max_task_retries": -1,
    }  # fmt: skip
    return remote(**options)(_DeviceWorker).remote()


def _end(workers: Sequence[Any]) -> None:
    import ray

    for worker in workers:
        with contextlib.suppress(Exception):  # Ray may have ended already
            ray.kill(worker)
