"""Several processes for one island, launched by Ray Train: the one file that imports Ray.

Train places the workers in the cluster, joins them in a process group of torch, gives each its GPU
and ends them all when one dies. Its checkpoints, reports and restarts are left alone: a training is
committed by `core/checkpoint.py`, and the controller starts the next generation. Until Train has
begun to train a plain process is long at work, so one worker is that.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from atoll.core.errors import AtollError, Failed, Interrupted, MissingError
from atoll.core.journal import set_verbosity
from atoll.core.outage import at_once
from atoll.core.storage import Storage
from atoll.islands.group import Ranks
from atoll.islands.island import run_island
from atoll.islands.signs import Process, ask_to_leave, island_folder, leave_request, submission

# How often Train looks after its workers: a death is noticed, and an end, so much later.
_LOOK_SECONDS = "0.5"


@dataclass(frozen=True)
class Each:
    """What one worker takes; 0 bytes of memory ask for none in particular."""

    cpus: int
    gpus: int
    memory: int

    def resources(self) -> dict[str, float]:
        """As Ray names them."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: float(value) for name, value in named.items() if value}


@dataclass(frozen=True)
class _Order:
    """What every worker is told."""

    run: str
    shard: str


def launch(run_uri: str, shard: str, workers: int, each: Each) -> None:
    """Train an island in so many workers of the cluster that this job runs in.

    SIGTERM is passed on to them. Raises what a worker raised, `Failed` when one died.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise MissingError(
            f"Several workers are launched by Ray Train, which is not there: {error}",
            cure="install ray[train] on the island, or train with one worker",
        ) from None
    own = Storage(run_uri).scoped(read=[], write=[island_folder(shard)]).patient()
    own.remove(leave_request(shard))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _LOOK_SECONDS)
    # A job finds its cluster in RAY_ADDRESS. Train's helpers have to be told: they look for any on
    # the machine, where several islands may be.
    told = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}
    ray.init(runtime_env={"env_vars": told})
    # Train wants a folder for a state of its own, and we none of it. Ray's own handler of SIGTERM
    # is there by now, and replaced.
    with tempfile.TemporaryDirectory() as folder, _passing_sigterm_on(own, shard):
        try:
            TorchTrainer(
                _work,
                train_loop_config=asdict(_Order(run_uri, shard)),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=each.gpus > 0,
                    resources_per_worker=each.resources(),
                ),
                run_config=RunConfig(
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                ),
            ).fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        finally:
            ray.shutdown()


def _work(given: dict[str, Any]) -> None:
    """One worker's part, in a thread of its process; the first one gives signs of life for all."""
    order = _Order(**given)
    group = Ranks()
    set_verbosity(0 if group.leads else -1)
    if not group.leads:
        return run_island(order.run, order.shard, group=group)
    own = Storage(order.run).scoped(read=[], write=[island_folder(order.shard)])
    own = own.patient(leave=group.leave.is_set)
    process = Process(own, order.shard, leave=group.leave.set)
    with process.watching():
        run_island(order.run, order.shard, enter=process.enter, group=group)


def _cause(error: Exception) -> AtollError:
    """What went wrong in the workers: our own word for it, where one of them had one."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: _unwrapped(each) for rank, each in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, AtollError):
            return cause
    said = [f"worker {rank}: {_first_line(cause)}" for rank, cause in causes.items()]
    return Failed(
        f"The workers ended: {'; '.join(said) or _first_line(error)}",
        cure="the next attempt goes on from the last checkpoint",
    )


def _unwrapped(error: BaseException) -> BaseException:
    """Train wraps what a worker raised, for its traceback, and how it came to know of a death."""
    error = getattr(error, "health_check_failure", error)
    found: BaseException = getattr(error, "_base_exc", error)
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _passing_sigterm_on(run: Storage, shard: str) -> Iterator[None]:
    """Inside, SIGTERM becomes a request that the first worker reads: no signal reaches it."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        try:
            with at_once():
                ask_to_leave(run, shard, submission())
        except (OSError, Failed) as error:
            raise Interrupted(
                f"Stopped, and the workers could not be told to commit before: {error}",
                cure="run the same command again, it goes on from the last checkpoint",
            ) from error

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
