"""Islands that are open for work: heads of ours that were started, clusters that were reached.

A site that does not answer, or does not take its token, is asked again ever more rarely, each time
with the token as it then is, and gets no shard meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from atoll.core.errors import AtollError, ConfigError, Failed, MissingError
from atoll.core.journal import log
from atoll.core.places import Island
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.settings import TrainConfig
from atoll.islands.submit import Jobs, TokenRefused, Unreachable, remote_cluster

# What a small island takes beside its share of Ray: 0.75 GiB were measured on the digits.
_ISLAND_BYTES = 1 << 30
_ASK_AGAIN_SECONDS = 30.0  # at most


@dataclass
class Site:
    """One island at work: its Jobs API, how much it takes, and whether it answers."""

    island: Island
    jobs: Jobs
    at_once: int
    cpus: int  # of one job
    gpus: int  # of one job
    workers: int = 1  # of one job
    head: Head | None = None
    running: int = 0
    silent_since: float | None = None
    trouble: str = ""  # why it is silent, and what to do
    _said: type[AtollError] | None = None  # the kind of trouble that was told of last
    _revivals: int = 2
    _ask_at: float = 0.0
    _pause: float = 0.5

    def answers(self) -> bool:
        """Whether it is worth asking now; a silent one is left in peace ever longer."""
        return time.monotonic() >= self._ask_at

    def heard(self) -> None:
        """It answered."""
        if self._said is not None:
            log.warning("Island %s answers again", self.island.name)
        self.silent_since, self.trouble, self._said = None, "", None
        self._pause, self._ask_at = 0.5, 0.0

    def missed(self, error: AtollError) -> None:
        """It did not answer, or its token was refused; asked again after a pause that doubles."""
        now, again = time.monotonic(), self.silent_since is not None
        if not again:
            self.silent_since = now
        self.trouble = f"{error.what}; {error.cure}" if error.cure else error.what
        of_token = isinstance(error, TokenRefused | MissingError)
        kind = type(error) if of_token else Unreachable
        # One answer may be late on a busy machine, and some calls wait for parts that others do
        # without: silence is what meets two in a row.
        if (again or of_token) and self._said is not kind:
            self._said = kind
            log.warning("%s", self.trouble)
        self._ask_at, self._pause = now + self._pause, min(_ASK_AGAIN_SECONDS, self._pause * 2)

    def free(self) -> bool:
        """Whether it takes another job now."""
        return self.silent_since is None and self.running < self.at_once and not self.gone()

    def gone(self) -> bool:
        """Whether it can never come back: the process of a head of ours has ended."""
        return self.head is not None and not self.head.alive()

    def revive(self) -> bool:
        """Start a head of ours anew that has ended; false where there is none, or it keeps ending.

        Only for shards that no other island takes: elsewhere one can be done without.
        """
        if self.head is None or self.head.alive() or self._revivals == 0:
            return False
        self._revivals -= 1
        log.warning(
            "the head of island %s has ended and is started again; its last words: %s",
            self.island.name, self.head.last_words(),
        )  # fmt: skip
        try:
            self.head.restart()
            self.jobs = Jobs(self.head.cluster)
        except Failed as error:
            self.missed(error)
        else:
            self.heard()
        return True

    def lost(self, seconds: float | None) -> bool:
        """Gone, or silent for so long; of None seconds there is no end."""
        if self.gone():
            return True
        if self.silent_since is None or seconds is None:
            return False
        return time.monotonic() - self.silent_since > seconds

    def ask_again(self) -> None:
        """Ask a silent site whether it is back."""
        if self.silent_since is not None and not self.gone() and self.answers():
            try:
                if self.head is None:
                    # Its token may have been mended, or have come with the cluster.
                    self.jobs = Jobs(remote_cluster(self.island), ask=False)
                self.jobs.check()
            except (Failed, MissingError) as error:
                self.missed(error)
            else:
                self.heard()


@contextlib.contextmanager
def open_sites(config: TrainConfig, shards: int) -> Iterator[list[Site]]:
    """Start the heads and reach the clusters; `Failed` when not one of the clusters answers."""
    islands = config.islands or (Island(name="local", local=True, jobs=slots_here(config)),)
    plans = _plans(islands, config, shards)
    ours = [
        HeadOrder(i.name, plan.cpus, plan.devices, i.memory_gib)
        for i, plan in zip(islands, plans, strict=True)
        if i.local
    ]
    # First those that only have to be asked: what is wrong there is known before a head starts.
    remote = {i.name: Jobs(remote_cluster(i), ask=False) for i in islands if not i.local}
    away = _away(remote, alone=not ours)
    with local_heads(ours) as heads:
        by_name = {head.cluster.name: head for head in heads}
        sites = []
        for island, plan in zip(islands, plans, strict=True):
            head = by_name.get(island.name)
            jobs = remote[island.name] if head is None else Jobs(head.cluster)
            site = Site(island, jobs, plan.jobs, plan.job_cpus, plan.job_gpus, plan.workers, head)
            if island.name in away:  # it may come later
                site.missed(away[island.name])
            sites.append(site)
        yield sites


def _away(remote: dict[str, Jobs], *, alone: bool) -> dict[str, Unreachable]:
    """The clusters that do not answer now, or refuse the token; to reach none is an error.

    So is one that answers and is no cluster.
    """
    away = {}
    for name, jobs in remote.items():
        try:
            jobs.check()
        except Unreachable as error:
            away[name] = error
    if alone and remote and len(away) == len(remote):
        # One that refuses is there: first of all it is what can be mended.
        raise min(away.values(), key=lambda error: not isinstance(error, TokenRefused))
    return away


@dataclass(frozen=True)
class _SitePlan:
    """How many jobs at once, what each takes, and what a head of ours has to offer for that."""

    jobs: int
    job_cpus: int
    job_gpus: int
    workers: int
    cpus: int = 0
    devices: tuple[str, ...] = ()


def _plans(islands: Sequence[Island], config: TrainConfig, shards: int) -> list[_SitePlan]:
    free = [] if config.device == "cpu" else _devices()
    local = sum(island.local for island in islands)
    share = len(free) // local if local else 0
    plans = []
    for island in islands:
        workers = island.resources.workers or config.workers
        cpus = island.resources.cpus or config.threads * workers
        if cpus > config.threads * workers:
            log.warning(
                "a job of island '%s' takes %d CPUs and computes on %d: --set threads=%d uses them",
                island.name, cpus, config.threads * workers, cpus // workers,
            )  # fmt: skip
        if not island.local:
            gpus = island.resources.gpus
            gpus = workers * int(config.device == "cuda") if gpus is None else gpus
            _check_divided(island, workers, cpus, gpus)
            # How much a cluster of somebody's holds is not for us to guess: one, or as told.
            jobs = island.jobs or config.slots or 1
            plans.append(_SitePlan(min(jobs, shards), cpus, gpus, workers))
            continue
        wanted = share if island.gpus is None else island.gpus
        if wanted > len(free):
            raise ConfigError(
                f"Island '{island.name}' is to have {wanted} GPUs, and {len(free)} are left here",
                cure="lower gpus in the islands' file",
            )
        devices, free = tuple(free[:wanted]), free[wanted:]
        gpus = island.resources.gpus
        gpus = (workers if wanted else 0) if gpus is None else gpus
        _check_divided(island, workers, cpus, gpus)
        if gpus > wanted:
            raise ConfigError(
                f"A job of island '{island.name}' is to have {gpus} GPUs of its {wanted}",
                cure="raise gpus or lower resources.gpus",
            )
        jobs = island.jobs or config.slots or (len(devices) // gpus if gpus else 0)
        jobs = jobs or (island.cpus // cpus if island.cpus else 1) or 1
        jobs = min(jobs, shards, len(devices) // gpus if gpus else jobs)
        if island.cpus is not None and island.cpus < cpus:
            raise ConfigError(
                f"A job of island '{island.name}' takes {cpus} CPUs and it has {island.cpus}",
                cure="raise cpus, or lower resources.cpus or threads",
            )
        memory = island.resources.memory_gib or 0.0
        if island.memory_gib is not None and island.memory_gib < memory:
            raise ConfigError(
                f"A job of island '{island.name}' takes {memory:g} GiB and it has "
                f"{island.memory_gib:g}",
                cure="raise memory_gib, or lower resources.memory_gib",
            )
        offer = island.cpus or jobs * cpus
        plans.append(_SitePlan(jobs, cpus, gpus, workers, offer, devices))
    return plans


def _check_divided(island: Island, workers: int, cpus: int, gpus: int) -> None:
    """A worker is a process with a GPU of its own, or none; several are alike."""
    if workers > 1 and (gpus not in (0, workers) or cpus % workers):
        raise ConfigError(
            f"A job of island '{island.name}' has {workers} workers, {cpus} CPUs and {gpus} GPUs",
            allowed=f"a multiple of {workers} CPUs, and 0 or {workers} GPUs",
            cure="change resources.workers, resources.cpus or resources.gpus",
        )


def slots_here(config: TrainConfig) -> int:
    """Islands at once here: a GPU each where there is any, else what processors and memory hold."""
    if config.slots:
        return config.slots
    gpus = 0 if config.device == "cpu" else len(_devices())
    processors = len(os.sched_getaffinity(0)) // config.threads
    held = gpus or min(processors, _available_bytes() // _ISLAND_BYTES)
    return max(1, held // config.workers)


def _devices() -> list[str]:
    """CUDA's names of the GPUs that this process may use."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in visible.split(",")] if visible else []
    return named[:count] if len(named) >= count > 0 else [str(n) for n in range(count)]


def _available_bytes() -> int:
    """Memory that can be had without swapping, as Linux says; no bound elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return sys.maxsize
