"""Three real heads: tokens, the queue, islands that die or freeze, and what wakes up later."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from atoll.core.checkpoint import newest_generation
from atoll.core.errors import ExitCode, Failed
from atoll.core.manifest import Manifest
from atoll.core.places import Island
from atoll.core.storage import Storage
from atoll.islands.curves import EVENTS
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.settings import DenoiserTraining, TrainConfig, WatchConfig
from atoll.islands.status import ShardStatus, read_status
from atoll.islands.supervise import train
from tests.islands.conftest import CONTROLLER, TRAIN, answer, ended_job, finding, journal
from tests.islands.kills import beside, family, send
from tests.islands.test_job import finish_here, order, results
from tests.waiting import until

NAMES = ("a", "b", "c")


def islands(**named: dict[str, object]) -> tuple[Island, ...]:
    return tuple(Island(name=name, local=True, cpus=1, **more) for name, more in named.items())


@pytest.fixture(scope="module")
def heads() -> Iterator[list[Head]]:
    """Three heads beside each other, started once; the tests below use them up."""
    with local_heads([HeadOrder(name, 1) for name in NAMES]) as started:
        yield started


@pytest.fixture
def on_these(heads: list[Head]) -> Iterator[None]:
    with finding(heads):
        yield


def test_every_head_refuses_every_other_token(heads: list[Head]) -> None:
    clusters = [head.cluster for head in heads]
    assert len({cluster.token for cluster in clusters}) == len(NAMES)
    assert len({head.folder for head in heads}) == len(NAMES)
    for cluster in clusters:
        for other in clusters:
            assert answer(cluster, other.token) == (200 if other is cluster else 403)
        assert answer(cluster, None) == 401
        assert cluster.token not in repr(cluster)


def test_a_crash_loop_is_stopped_with_its_reason(
    fresh, heads: list[Head], monkeypatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sick = tmp_path / "python"
    sick.write_text("#!/bin/sh\necho 'no such instruction' >&2\nkill -9 $$\n")
    sick.chmod(0o755)
    cluster = heads[0].cluster
    monkeypatch.setenv("SICK", cluster.token)
    island = Island(
        name="sick", address=cluster.address, token_env="SICK", python=str(sick), ship=False
    )
    config = TRAIN.model_copy(
        update={"islands": (island,), "retries": 2, "watch": WatchConfig(backoff_seconds=0.25)}
    )
    run, manifest = fresh()
    with pytest.raises(Failed) as stopped:
        train(run, manifest, config, shards=["shard-00"])
    assert stopped.value.exit_code == ExitCode.FAILED
    assert stopped.value.what == (
        "1 of 1 islands did not finish: shard-00. shard-00: 2 retries got no further, the last: "
        "its process died; its last words: no such instruction"
    )
    assert "run the same command again" in stopped.value.cure
    began, ended = (journal(run, "shard-00", e, CONTROLLER) for e in ("submitted", "ended"))
    assert len(began) == len(ended) == 3
    assert {line["code"] for line in ended} == {None}
    assert all("no such instruction" in line["reason"] for line in ended)
    said = [r.getMessage() for r in caplog.records if "its process died" in r.getMessage()]
    assert [text.rpartition("; ")[2] for text in said] == [
        "started again in 0.25 s", "started again in 0.5 s", "its last words: no such instruction",
    ]  # fmt: skip
    pauses = [b["unix_seconds"] - a["unix_seconds"] for a, b in pairwise(began)]
    assert pauses[0] >= 0.25
    assert pauses[1] >= 0.5
    assert manifest.experts == {}


def test_two_shards_queue_on_one_island_and_a_pinned_one_has_its_own(
    fresh, heads: list[Head], on_these: None
) -> None:
    run, manifest = fresh()
    assert read_status(run, manifest).shards[0].state == "planned"
    places = islands(a={"jobs": 1, "price": 3600.0}, b={"shards": ("shard-02",)})
    assert train(run, manifest, TRAIN.model_copy(update={"islands": places})) == [*manifest.shards]

    where = {}
    for shard in manifest.shards:
        (began,), (ended,) = (journal(run, shard, e, CONTROLLER) for e in ("submitted", "ended"))
        where[shard] = (began["island"], began["unix_seconds"], ended["unix_seconds"])
        assert ended["code"] == ExitCode.DONE
    assert [place for place, _, _ in where.values()] == ["a", "a", "b"]
    assert where["shard-00"][2] <= where["shard-01"][1]  # one after the other
    assert where["shard-02"][1] < where["shard-00"][2]  # beside them

    status = read_status(run, manifest)
    assert status.ended
    assert [row.state for row in status.shards] == ["done"] * 3
    seconds = sum(where[s][2] - where[s][1] for s in ("shard-00", "shard-01"))
    assert status.cost == pytest.approx(seconds, abs=0.01)  # 3600 an hour is 1 a second
    assert status.shards[2].cost is None
    for row in status.shards:
        assert row.images_seen == row.of == row.committed_images_seen
        assert row.percent is not None
        assert row.loss is not None
        assert row.generation == 1
        assert run.exists(f"islands/{row.shard}/{EVENTS}")
        (line, *_) = run.read_bytes(f"islands/{row.shard}/log-journal.jsonl").splitlines()
        assert json.loads(line)["island"] == row.island

    tokens = [head.cluster.token.encode() for head in heads]
    for path in Path(run.uri).rglob("*"):
        if path.is_file():
            assert not any(token in path.read_bytes() for token in tokens), path
    order_ = json.loads(run.read_bytes("islands/shard-00/island.json"))
    assert order_["config"]["islands"] == []  # an island is told of no other
    assert b"shard-02" not in run.read_bytes("islands/shard-00/island.json")


LONG = TRAIN.model_copy(
    update={
        "training": DenoiserTraining(passes=16, checkpoints=16),
        "watch": WatchConfig(dead_seconds=10, backoff_seconds=0.1),
    }
)


class Disturbance:
    """Freezes the island that trains first, kills the one that takes over, and watches."""

    def __init__(self, run: Storage, manifest: Manifest, heads: list[Head], shard: str) -> None:
        self._run, self._manifest, self._shard = run, manifest, shard
        self._heads = {head.cluster.name: head for head in heads}
        self.frozen: list[psutil.Process] = []
        self.seen: list[ShardStatus] = []

    def disturb(self) -> None:
        here = f"islands/{self._shard}"
        until(lambda: len(self._run.list(f"{here}/commits")) >= 2)
        self._look(0)
        self.frozen = self._family_seen()
        send(self.frozen, signal.SIGSTOP)
        self._look(61)  # as somebody sees it a minute later
        before = set(self._run.list(f"{here}/commits"))
        until(lambda: newest_generation(self._run, here) == 2)
        until(lambda: len(set(self._run.list(f"{here}/commits")) - before) >= 2)
        self._look(0)
        send(self._family_seen(), signal.SIGKILL)
        until(lambda: newest_generation(self._run, here) == 3)

    def _family_seen(self) -> list[psutil.Process]:
        head = self._heads[str(self.seen[-1].island)]
        return family(psutil.Process(head.process))

    def _look(self, later: float) -> None:
        rows = read_status(self._run, self._manifest, now=time.time() + later).shards
        self.seen += [row for row in rows if row.shard == self._shard]


def test_a_shard_moves_from_a_frozen_island_and_from_a_killed_one_and_the_zombie_is_fenced(
    fresh, heads: list[Head], on_these: None
) -> None:
    shard = "shard-00"
    straight, manifest = fresh("straight")
    order(straight, manifest, shard, LONG)
    expected = finish_here(straight, shard)

    run, manifest = fresh("run")
    told: TrainConfig = LONG.model_copy(update={"islands": islands(a={}, b={}, c={})})
    disturbance = Disturbance(run, manifest, heads, shard)
    try:
        with beside(disturbance.disturb):
            assert train(run, manifest, told, shards=[shard]) == [shard]
        assert results(run, shard) == expected
        submitted = journal(run, shard, "submitted", CONTROLLER)
        assert [line["generation"] for line in submitted] == [1, 2, 3]
        assert sorted(str(line["island"]) for line in submitted) == list(NAMES)
        ended = journal(run, shard, "ended", CONTROLLER)
        assert [line["code"] for line in ended] == [None, None, 0]
        assert "no sign of life" in str(ended[0]["reason"])

        before_freeze, frozen, before_kill = disturbance.seen
        assert (before_freeze.state, before_freeze.generation) == ("running", 1)
        assert before_freeze.images_per_second
        assert before_freeze.eta_seconds is not None
        assert (frozen.state, frozen.island) == ("dead", before_freeze.island)
        assert (before_kill.state, before_kill.generation) == ("running", 2)
        assert before_kill.island != before_freeze.island

        after = digests(run)
    finally:
        send(disturbance.frozen, signal.SIGCONT)
    first = next(head for head in heads if head.cluster.name == submitted[0]["island"])
    assert ended_job(first.cluster, submitted[0])["driver_exit_code"] == ExitCode.FENCED
    woken = digests(run)
    assert woken == after


def digests(run: Storage) -> dict[str, str]:
    return {name: run.sha256(name) for name in run.list()}
