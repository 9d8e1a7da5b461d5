"""Real Ray Train: two workers, one of them killed, against two processes without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from atoll.core.checkpoint import Checkpoints, newest_commit
from atoll.core.errors import ExitCode, Fenced, Interrupted
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
from atoll.islands.spot import heeding
from atoll.islands.status import read_status
from atoll.islands.submit import Cluster, Jobs
from atoll.islands.supervise import train
from atoll.islands.workers import Each, _cause
from tests.islands.clouds import playing
from tests.islands.conftest import CONTROLLER, TRAIN, finding, journal
from tests.islands.kills import beside, expect_none_left, kill_attempts
from tests.islands.ranks import Pool, pool
from tests.islands.test_job import order, results
from tests.waiting import PATIENCE_SECONDS, until

SHARD = "shard-00"
# The workers are the island's business and not the order's.
CONFIG = TRAIN.model_copy(
    update={"workers": 2, "training": DenoiserTraining(passes=8, checkpoints=8), "slots": 1}
)


def island(group: Group, uri: str, environment: dict[str, str]) -> None:
    """A rank's part, on a machine whose cloud is asked often."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("atoll.islands.island.heeding", partial(heeding, poll_seconds=0.02))
        run_island(uri, SHARD, group=group)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head for two workers."""
    with local_heads([HeadOrder("local", 2)]) as (started,):
        yield started


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two processes as Ray Train would join them, without it."""
    with pool(2) as ranks:
        yield ranks


@pytest.fixture
def undisturbed(fresh, pair: Pool) -> Callable[[Parallel], dict[str, str]]:
    """What the two come to, as replicas or as shards."""

    def of(parallel: Parallel) -> dict[str, str]:
        run, manifest = fresh("undisturbed")
        order(run, manifest, SHARD, CONFIG.model_copy(update={"parallel": parallel}))
        assert pair.run(island, run.uri, {}) == [None, None]
        return results(run, SHARD)

    return of


def test_a_worker_that_is_killed_ends_the_job_and_the_next_resumes_bitwise(
    fresh, head: Head, undisturbed: Callable[[Parallel], dict[str, str]]
) -> None:
    """As shards; replicas go on below, and Ray knows neither from the other."""
    config = CONFIG.model_copy(update={"parallel": "fsdp"})
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

    assert results(run, SHARD) == undisturbed("fsdp")
    latest = Checkpoints(run, f"islands/{SHARD}").latest()
    assert latest is not None
    assert (latest.facts["workers"], latest.facts["parallel"]) == (2, "fsdp")
    expect_none_left(run.uri)

    alone, manifest = fresh("alone")
    order(alone, manifest, SHARD, config)
    run_island(alone.uri, SHARD)
    gate_head = f"islands/{SHARD}/gate_head"
    # Which the first worker trains by itself.
    assert run.sha256(gate_head) == alone.sha256(gate_head)


def test_a_notice_to_one_machine_is_a_commit_of_all_and_they_go_on_from_there(
    fresh, pair: Pool, undisturbed: Callable[[Parallel], dict[str, str]]
) -> None:
    run, manifest = fresh()
    order(run, manifest, SHARD, CONFIG.model_copy(update={"spot": "aws"}))
    here = f"islands/{SHARD}"
    with playing() as (cloud, environment):
        cloud.once = True
        pair.send(island, run.uri, environment)
        until(lambda: len(run.list(f"{here}/commits")) >= 2)
        cloud.notice = True
        assert [type(error) for error in pair.receive()] == [Interrupted, Interrupted]
        left_at = newest_commit(run, here)
        assert pair.run(island, run.uri, environment) == [None, None]
    assert results(run, SHARD) == undisturbed("ddp")
    (resumed,) = journal(run, SHARD, "trained")
    assert (resumed["generation"], resumed["from_images_seen"]) == (2, left_at)


def test_a_launcher_passes_its_signal_on_through_storage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(SUBMISSION_VARIABLE, "run-shard-2")
    monkeypatch.setattr("atoll.islands.signs.SIGN_SECONDS", 0.02)
    run, left = Storage(tmp_path), threading.Event()
    with Process(run, SHARD, leave=left.set).watching():
        ask_to_leave(run, SHARD, "run-shard-1")  # an attempt before
        assert not left.wait(0.2)
        ask_to_leave(run, SHARD, "run-shard-2")
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
