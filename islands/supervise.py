"""`atoll train`: plan every shard, write it down, run the islands as Ray jobs and collect them.

The plan is in the manifest before the first job starts. A job's word is its `exit.json`; Ray's is a
hint. An island that dies is started again at the next generation and resumes; one that refuses is
not. Only this process writes manifest and ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from atoll.core import recipes
from atoll.core.config import differences, save_config, saved_config
from atoll.core.denoiser import read_card
from atoll.core.errors import (
    AtollError,
    ConfigError,
    DataError,
    ExitCode,
    Failed,
    Fenced,
    Interrupted,
    MissingError,
    Refused,
    UsageError,
)
from atoll.core.journal import Advance, log, progress
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Expert, Manifest, check_artefact, require
from atoll.core.storage import Storage
from atoll.islands.job import PARTS, IslandOrder, island_folder
from atoll.islands.settings import TrainConfig, plan_for
from atoll.islands.submit import Cluster, Jobs, local_head, remote_cluster

_POLL_SECONDS = 0.5
# What a small island takes beside its share of Ray: 0.75 GiB were measured on the digits.
_ISLAND_BYTES = 1 << 30
# An island's own exit code is the command's, where all that failed agree on it.
_AS_RAISED: dict[ExitCode | None, type[AtollError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, MissingError, Refused, Fenced)
}
_RETRIED = (ExitCode.FAILED, ExitCode.INTERRUPTED, ExitCode.FENCED)


def plan_islands(run: Storage, manifest: Manifest, config: TrainConfig) -> None:
    """Fix batch and images_seen of every shard in the manifest; a plan that stands is not moved."""
    require(manifest.base, "base", "train it with `atoll base RUN`")
    recipe = recipes.recipe_of(str(manifest.recipe))
    for name, shard in manifest.shards.items():
        asked = config.training.passes is not None or config.training.batch is not None
        if shard.plan is not None and not asked:
            continue  # nothing else was asked for than what stands
        plan = plan_for(config.training, recipe, shard.records, base=False)
        if shard.plan is not None and shard.plan != plan:
            raise Refused(
                f"{name} is planned for {shard.plan.images_seen} images in batches of "
                f"{shard.plan.batch}; this command asks for {plan.images_seen} in {plan.batch}",
                cure="leave out --passes and --minutes to go on as planned, or start a new run",
            )
        shard.plan = plan
    manifest.save(run)


def train(
    run: Storage,
    manifest: Manifest,
    config: TrainConfig,
    *,
    shards: Sequence[str] = (),
    address: str | None = None,
) -> list[str]:
    """Train the islands that are wanted and not done yet; the names of those trained now.

    Raises `Interrupted` on Ctrl-C, after every job has committed, and `Failed` when an island
    cannot be brought to its end; the others are finished and collected first.
    """
    if run.uri.startswith("memory:"):
        raise UsageError(
            "memory:// lives in one process and islands are processes of their own",
            allowed="a local path, or a URI of an object store",
        )
    wanted = list(shards) or list(manifest.shards)
    for name in wanted:
        manifest.shard(name)
    plan_islands(run, manifest, config)
    check_artefact(run, require(manifest.base, "base", "train it with `atoll base RUN`"))
    _check_exclusive_create(run)
    todo = [name for name in wanted if name not in manifest.experts]
    _check_unchanged(run, config, done=[name for name in wanted if name not in todo], todo=todo)
    save_config(config, run, "islands")
    for name in todo:
        write_order(run, manifest, config, name)
    # Finished by an earlier command that died before it could write that down.
    for name in [name for name in todo if _exit_code(run, name) is ExitCode.DONE]:
        _collect(run, manifest, name)
        todo.remove(name)
    if not todo:
        return []
    gpus = _gpus(config, address)
    # How much a cluster of somebody's holds is not for us to guess: one at a time, or as told.
    slots = config.slots or (slots_here(config) if address is None else 1)
    slots = min(len(todo), slots, gpus if gpus and address is None else slots)
    with _cluster(address, slots * config.threads, gpus) as cluster:
        log.info("%d islands, %d at a time, %d thread(s) each", len(todo), slots, config.threads)
        _Supervisor(run, manifest, config, Jobs(cluster), slots, address).work(todo)
    return todo


def _check_unchanged(
    run: Storage, config: TrainConfig, *, done: list[str], todo: list[str]
) -> None:
    """An expert that is done stays as it was trained: say so where something else is asked for."""
    earlier = saved_config(TrainConfig, run, "islands")
    if earlier is None or not done:
        return
    changed = [
        f"{part}.{line}"
        for part in ("training", "head")
        for line in differences(getattr(earlier, part), getattr(config, part))
    ]
    if changed and not todo:
        raise ConfigError(
            f"All of {', '.join(done)} are trained already, and otherwise: {'; '.join(changed)}",
            cure="leave the options out to keep them, or start a new run",
        )
    if changed:
        log.warning("%s were trained otherwise and stay: %s", ", ".join(done), "; ".join(changed))


@contextlib.contextmanager
def _cluster(address: str | None, cpus: int, gpus: int) -> Iterator[Cluster]:
    if address is not None:
        yield remote_cluster(address)
        return
    with local_head(cpus, gpus) as cluster:
        yield cluster


def slots_here(config: TrainConfig) -> int:
    """Islands at once here: a GPU each where there is any, else what processors and memory hold."""
    gpus = _gpus(config, None)
    processors = len(os.sched_getaffinity(0)) // config.threads
    return gpus or max(1, min(processors, _available_bytes() // _ISLAND_BYTES))


def _gpus(config: TrainConfig, address: str | None) -> int:
    """GPUs that jobs may ask for: this machine's, or one each on a cluster that is told cuda."""
    if config.device == "cpu":
        return 0
    return torch.cuda.device_count() if address is None else int(config.device == "cuda")


def _available_bytes() -> int:
    """Memory that can be had without swapping, as Linux says; no bound elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return sys.maxsize


def _check_exclusive_create(run: Storage) -> None:
    """Refuse a store whose exclusive create is not: fencing would be a pretence there."""
    name = "islands/.probe"
    run.remove(name)
    run.create(name, b"1")
    try:
        run.create(name, b"2")
    except FileExistsError:
        return
    finally:
        run.remove(name)
    raise Refused(
        f"{run.uri} lets two writers create one file",
        allowed="a file system or object store with exclusive create",
    )


def write_order(run: Storage, manifest: Manifest, config: TrainConfig, name: str) -> None:
    shard = manifest.shard(name)
    assert shard.plan is not None
    assert manifest.base is not None
    order = IslandOrder(
        name=name,
        shard=Artefact(path=shard.path, sha256=shard.sha256),
        commons=Artefact(path=manifest.commons.path, sha256=manifest.commons.sha256),
        base=manifest.base,
        recipe=str(manifest.recipe),
        plan=shard.plan,
        seed=manifest.seed,
        # How many islands this machine holds is no business of an island.
        config=config.model_copy(update={"slots": None, "planned_by_all": False}),
    )
    run.write_json(f"{island_folder(name)}/island.json", order.model_dump(mode="json"))


def _exit_code(run: Storage, shard: str) -> ExitCode | None:
    name = f"{island_folder(shard)}/exit.json"
    return ExitCode(int(run.read_json(name)["code"])) if run.exists(name) else None


@dataclass
class _Island:
    """One shard's attempts."""

    shard: str
    submission_id: str = ""
    attempts: int = 0
    said: int = 0  # images that the progress bar has been told of
    reasons: list[str] = field(default_factory=list)
    code: ExitCode | None = None  # how the last attempt ended


class _Supervisor:
    """Keeps `slots` islands running until all are collected or given up."""

    def __init__(
        self,
        run: Storage,
        manifest: Manifest,
        config: TrainConfig,
        jobs: Jobs,
        slots: int,
        address: str | None,
    ) -> None:
        self._run = run
        self._manifest = manifest
        self._config = config
        self._jobs = jobs
        self._slots = slots
        self._gpus = min(1, _gpus(config, address))
        self._given_up: list[_Island] = []

    def work(self, shards: Sequence[str]) -> None:
        """Run every shard; raises at the end for those that could not be finished."""
        waiting = [_Island(shard) for shard in shards]
        running: list[_Island] = []
        total = sum(self._plan(shard) for shard in shards)
        try:
            with progress("training the islands", total) as advance:
                while waiting or running:
                    while waiting and len(running) < self._slots:
                        running.append(self._start(waiting.pop(0)))
                    time.sleep(_POLL_SECONDS)
                    for island in list(running):
                        self._report(island, advance)
                        done = _exit_code(self._run, island.shard) is not None
                        if done or self._jobs.ended(island.submission_id):
                            running.remove(island)
                            if self._finish(island):
                                waiting.insert(0, island)
        except KeyboardInterrupt:
            for island in running:
                self._jobs.stop(island.submission_id)
            left = self._wait_for(running)
            said = (
                f"; {', '.join(left)} did not answer and lost at most one interval" if left else ""
            )
            raise Interrupted(
                f"Stopped; the islands have committed{said}",
                cure="run the same command again, it resumes",
            ) from None
        if self._given_up:
            failed = self._given_up[0]
            kinds = {island.code for island in self._given_up}
            kind = _AS_RAISED.get(kinds.pop(), Failed) if len(kinds) == 1 else Failed
            raise kind(
                f"{len(self._given_up)} of {len(shards)} islands did not finish: "
                f"{', '.join(island.shard for island in self._given_up)}. "
                f"{failed.shard}: {failed.reasons[-1]}",
                cure="the others are done and kept; run the same command again for these",
            )

    def _plan(self, shard: str) -> int:
        plan = self._manifest.shards[shard].plan
        assert plan is not None
        return plan.images_seen

    def _start(self, island: _Island) -> _Island:
        here = island_folder(island.shard)
        claimed = self._run.list(f"{here}/gen")
        generation = len(claimed) + 1
        run_name = hashlib.sha256(self._run.uri.encode()).hexdigest()[:12]
        self._run.remove(f"{here}/exit.json")
        island.attempts += 1
        island.submission_id = self._jobs.submit(
            str(self._run.local("").resolve()) if self._run.is_local else self._run.uri,
            island.shard,
            submission_id=f"{run_name}-{island.shard}-{generation}-{secrets.token_hex(4)}",
            threads=self._config.threads,
            gpus=self._gpus,
        )
        return island

    def _report(self, island: _Island, advance: Advance) -> None:
        name = f"{island_folder(island.shard)}/heartbeat.json"
        if not self._run.exists(name):
            return
        with contextlib.suppress(ValueError, Refused, FileNotFoundError):
            seen = int(json.loads(self._run.read_bytes(name))["images_seen"])
            if seen > island.said:
                advance(seen - island.said, note=island.shard)
                island.said = seen

    def _finish(self, island: _Island) -> bool:
        """Collect an island whose job is over; True when it is to be started again."""
        code = _exit_code(self._run, island.shard)
        if code is ExitCode.DONE:
            _collect(self._run, self._manifest, island.shard)
            return False
        if code is None:
            reason = "its process died"
            logs = self._jobs.logs(island.submission_id).strip()
            if logs:
                reason += f"; its last words: {logs.splitlines()[-1]}"
        else:
            name = f"{island_folder(island.shard)}/exit.json"
            reason = str(self._run.read_json(name)["reason"])
        island.reasons.append(reason)
        island.code = code
        again = code in (None, *_RETRIED) and island.attempts <= self._config.retries
        log.warning("%s: %s%s", island.shard, reason, "; started again" if again else "")
        if not again:
            self._given_up.append(island)
        return again

    def _wait_for(self, running: Sequence[_Island]) -> list[str]:
        """Give the islands time to commit; the names of those that did not end."""
        deadline = time.monotonic() + 30
        left = [island.shard for island in running]
        while left and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            left = [i.shard for i in running if not self._jobs.ended(i.submission_id)]
        return left


def _collect(run: Storage, manifest: Manifest, shard: str) -> None:
    """Record what an island published: digests in the manifest, two lines in the ledger."""
    here = island_folder(shard)
    for part, marker in PARTS.items():
        if not run.exists(f"{here}/{part}/{marker}"):
            raise DataError(
                f"{shard} says it is done and {here}/{part} is not there",
                cure=f"remove {here}/exit.json and run the same command again",
            )
    expert, head = run.sha256(f"{here}/expert"), run.sha256(f"{here}/gate_head")
    card = read_card(run.local(f"{here}/expert"))
    ledger = Ledger(run)
    parents = [
        entry
        for kind, name in (("base", "base"), ("commons", "commons"), ("shard", shard))
        if (entry := ledger.latest(kind, name)) is not None
    ]
    ledger.append("expert", shard, expert, parents=parents, shards=[shard])
    ledger.append("gate_head", shard, head, parents=parents, shards=[shard])
    manifest.experts[shard] = Expert(
        path=f"{here}/expert",
        sha256=expert,
        gate_head=Artefact(path=f"{here}/gate_head", sha256=head),
        images_seen=card.images_seen,
    )
    manifest.experts = dict(sorted(manifest.experts.items()))
    manifest.save(run)
