"""Real Ray Train: two workers, one of them killed, against two processes without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import ExitCode, Fenced
from atoll.core.storage import Storage
from atoll.islands.group import Group
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.island import run_island
from atoll.islands.learner import Parallel
from atoll.islands.settings import DenoiserTraining
from atoll.islands.signs import (
    SUBMISSION_VARIABLE,
    Process,
    ask_to_leave,
    process_heartbeat,
    write_journal,
)
from atoll.islands.status import read_status
from atoll.islands.submit import Cluster, Jobs
from atoll.islands.supervise import train
from atoll.islands.workers import Each, _cause
from tests.islands.conftest import CONTROLLER, TRAIN, finding, journal
from tests.islands.kills import beside, kill_attempts
from tests.islands.ranks import Pool, pool
from tests.islands.test_job import order, results
from tests.waiting import PATIENCE_SECONDS

SHARD = "shard-00"
# The workers are the island's business and not the order's.
CONFIG = TRAIN.model_copy(
    update={"workers": 2, "training": DenoiserTraining(passes=12, checkpoints=12), "slots": 1}
)


def island(group: Group, uri: str) -> None:
    run_island(uri, SHARD, group=group)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head for two workers."""
    with local_heads([HeadOrder("local", 2)]) as (started,):
        yield started


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    with pool(2) as ranks:
        yield ranks


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_worker_that_is_killed_ends_the_job_and_the_next_resumes_bitwise(
    fresh, head: Head, pair: Pool, parallel: Parallel
) -> None:
    config = CONFIG.model_copy(update={"parallel": parallel})
    run, manifest = fresh()
    with finding([head]), beside(lambda: kill_attempts(run, SHARD, [1])):
        assert train(run, manifest, config, shards=[SHARD]) == [SHARD]
    first, second = journal(run, SHARD, "ended", CONTROLLER)
    assert first["code"] == ExitCode.FAILED
    assert "worker 0" in str(first["reason"])
    assert second["code"] == ExitCode.DONE
    resumed = journal(run, SHARD, "trained")[0]
    assert resumed["generation"] == 2
    assert resumed["from_images_seen"] > 0

    plain, manifest = fresh("plain")
    order(plain, manifest, SHARD, config)
    assert pair.run(island, plain.uri) == [None, None]
    assert results(run, SHARD) == results(plain, SHARD)
    latest = Checkpoints(run, f"islands/{SHARD}").latest()
    assert latest is not None
    assert (latest.facts["workers"], latest.facts["parallel"]) == (2, parallel)

    alone, manifest = fresh("alone")
    order(alone, manifest, SHARD, config)
    run_island(alone.uri, SHARD)
    head = f"islands/{SHARD}/gate_head"
    assert run.sha256(head) == alone.sha256(head)  # which the first worker trains by itself


def test_a_launcher_passes_its_signal_on_through_storage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(SUBMISSION_VARIABLE, "run-shard-2")
    monkeypatch.setattr("atoll.islands.signs.SIGN_SECONDS", 0.02)
    run, left = Storage(tmp_path), threading.Event()
    with Process(run, SHARD, leave=left.set).watching():
        monkeypatch.setenv(SUBMISSION_VARIABLE, "run-shard-1")
        ask_to_leave(run, SHARD)  # of an attempt before
        monkeypatch.setenv(SUBMISSION_VARIABLE, "run-shard-2")
        assert not left.wait(0.2)
        ask_to_leave(run, SHARD)
        assert left.wait(PATIENCE_SECONDS)


def test_status_knows_a_launch_that_failed_before_its_workers_began(fresh) -> None:
    """As its controller leaves it that is killed once it has submitted."""
    run, manifest = fresh()
    order(run, manifest, SHARD, CONFIG)
    earlier = {"submission_id": "run-shard-1", "name": "expert", "unix_seconds": 0.0}
    run.write_json(process_heartbeat(SHARD), earlier)
    write_journal(run, SHARD, "submitted", "run-shard-2", island="a")
    environment = {**os.environ, SUBMISSION_VARIABLE: "run-shard-2"}
    environment.pop("RAY_ADDRESS", None)  # no cluster started it, and so there is none to join
    command = [sys.executable, "-P", "-m", "atoll.islands.job", run.uri, SHARD, "--workers", "2"]
    job = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE_SECONDS)
    assert job.returncode == ExitCode.FAILED

    row = read_status(run, manifest).shards[0]
    assert (row.shard, row.state) == (SHARD, "failed")
    assert "RAY_ADDRESS" in str(row.reason)
    # It is no word of the attempt after it.
    write_journal(run, SHARD, "submitted", "run-shard-3", island="a")
    assert read_status(run, manifest).shards[0].state == "planned"


def test_a_job_with_workers_takes_nothing_itself(monkeypatch) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(
        Jobs, "_json", lambda _self, _method, _path, value=None, **_: sent.append(value)
    )
    jobs = Jobs(Cluster("http://h:1", ""), ask=False)
    given = {"submission_id": "x", "threads": 2, "memory_gib": 4.0}
    jobs.submit("run", SHARD, cpus=8, gpus=4, workers=4, **given)
    jobs.submit("run", SHARD, cpus=2, gpus=1, **given)
    several, one = sent
    assert not [key for key in several if key.startswith("entrypoint_")]
    assert several["entrypoint"].endswith(
        f"run {SHARD} --workers 4 --worker-cpus 2 --worker-gpus 1 --worker-memory {1 << 30}"
    )
    assert one["entrypoint"].endswith(f"atoll.islands.job run {SHARD}")
    assert (one["entrypoint_num_cpus"], one["entrypoint_num_gpus"]) == (2, 1)
    assert one["entrypoint_memory"] == 4 << 30
    assert Each(2, 0, 0).resources() == {"CPU": 2.0}
    assert Each(2, 1, 1 << 30).resources() == {"CPU": 2.0, "GPU": 1.0, "memory": float(1 << 30)}


def test_our_own_word_comes_before_what_a_death_makes_of_the_others() -> None:
    class Ended(Exception):
        worker_failures: dict[int, Exception]

    error = Ended("all workers ended")
    error.worker_failures = {1: RuntimeError("connection closed\nby peer"), 0: Fenced("taken over")}
    assert isinstance(_cause(error), Fenced)
    error.worker_failures = {1: RuntimeError("connection closed\nby peer"), 0: OSError("died")}
    said = str(_cause(error))
    assert "worker 0: OSError: died; worker 1: RuntimeError: connection closed" in said
    assert "by peer" not in said
    assert "all workers ended" in str(_cause(Exception("all workers ended")))
