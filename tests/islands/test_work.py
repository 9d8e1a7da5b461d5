"""Where a shard may go on: real heads, one of which has another version, or no network."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import psutil
import pytest
import torch

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import ExitCode, Failed, Interrupted, Refused
from atoll.core.manifest import Manifest
from atoll.core.places import Island, Resources
from atoll.core.storage import Storage
from atoll.islands import sites, submit
from atoll.islands.group import Group
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.island import run_island
from atoll.islands.settings import TrainConfig, WatchConfig
from atoll.islands.sites import Site
from atoll.islands.status import read_status
from atoll.islands.submit import Jobs
from atoll.islands.supervise import train
from atoll.islands.work import Choice
from tests.islands.conftest import CONTROLLER, TRAIN, finding, journal
from tests.islands.kills import beside, family, send
from tests.islands.test_job import finish_here, order, results
from tests.waiting import until

SHARD, OTHER = "shard-00", "shard-01"
VERSION = "0.0.1"  # of diffusers, as island b believes
Fresh = Callable[..., tuple[Storage, Manifest]]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Head]]:
    """Island a as this machine is, and b, whose jobs find another version of a library."""
    folder = tmp_path_factory.mktemp("b")
    program, python = folder / "program.py", folder / "python"
    program.write_text(
        "import diffusers, runpy, sys\n"
        f"diffusers.__version__ = '{VERSION}'\n"
        "sys.argv = sys.argv[3:]\n"  # program.py -P -m atoll.islands.job RUN SHARD
        "runpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -P {program} "$@"\n')
    python.chmod(0o755)
    with local_heads([HeadOrder("a", 2), HeadOrder("b", 1)]) as (a, b):
        b.cluster = dataclasses.replace(b.cluster, python=str(python))
        yield [a, b]


@pytest.fixture(autouse=True)
def _on_these(heads: list[Head]) -> Iterator[None]:
    with finding(heads):
        yield


def told(*names: str, watch: WatchConfig | None = None, **more: Any) -> TrainConfig:
    """Training on these islands, one job each, and no second attempt after a failure."""
    places = tuple(Island(name=name, local=True, cpus=2, jobs=1) for name in names)
    given = {"islands": places, "retries": 0, "watch": watch or WatchConfig(), **more}
    return TRAIN.model_copy(update=given)


def begun(fresh: Fresh, name: str = "run") -> tuple[Storage, Manifest]:
    """A run whose shard was committed once, on a machine like island a."""
    run, manifest = fresh(name)
    order(run, manifest, SHARD)
    group = Group()
    group.leave.set()
    with pytest.raises(Interrupted):
        run_island(run.uri, SHARD, group=group)
    return run, manifest


def events(run: Storage, *kinds: str) -> list[dict[str, Any]]:
    lines = run.read_lines(f"islands/{SHARD}/{CONTROLLER}")
    return [line for line in lines if line["event"] in kinds]


def test_a_shard_that_an_island_refuses_waits_for_one_that_can_go_on_with_it(
    fresh: Fresh,
) -> None:
    """Bitwise; the refusal is no failure, which here would be the last."""
    straight, manifest = fresh("straight")
    order(straight, manifest, SHARD)
    expected = finish_here(straight, SHARD)

    run, manifest = begun(fresh)
    # Of two islands where nothing goes on the first one that is named gets the first shard.
    assert train(run, manifest, told("b", "a"), shards=[SHARD, OTHER]) == [SHARD, OTHER]
    assert results(run, SHARD) == expected
    first, refused, waiting, second, done = events(run, "submitted", "ended", "waiting")
    assert [first["island"], second["island"]] == ["b", "a"]
    assert [refused["code"], done["code"]] == [ExitCode.REFUSED, ExitCode.DONE]
    assert waiting["event"] == "waiting"
    differing = f"diffusers {diffusers.__version__} then and {VERSION} now"
    assert waiting["reason"] == f"cannot go on bitwise on island b: {differing}"
    assert f"made otherwise: {differing}. Cure" in str(refused["reason"])
    # The island like its own was busy with the other one.
    (busy,) = journal(run, OTHER, "submitted", CONTROLLER)
    (ended,) = journal(run, OTHER, "ended", CONTROLLER)
    assert busy["island"] == "a"
    assert ended["unix_seconds"] <= second["unix_seconds"]


def test_with_no_such_island_left_it_is_told_what_is_missing_and_goes_on_by_leave(
    fresh: Fresh,
) -> None:
    run, manifest = begun(fresh)
    with pytest.raises(Refused) as raised:
        train(run, manifest, told("b"), shards=[SHARD])
    said = raised.value
    assert "no island is left for it; those that take it: b" in said.what
    made = run.read_json(run.list(f"islands/{SHARD}/commits")[-1])["facts"]
    assert f"made with device {made['device']}, diffusers {made['diffusers']}, numpy" in said.what
    assert "workers 1, and --allow-inexact-resume lets it go on elsewhere (b: diff" in said.what
    assert "--allow-inexact-resume" in said.cure
    (given_up,) = events(run, "given_up")
    assert given_up["made_with"]["diffusers"] == made["diffusers"]
    assert given_up["reason"] in said.what
    row = next(row for row in read_status(run, manifest).shards if row.shard == SHARD)
    assert (row.state, row.reason) == ("failed", given_up["reason"])

    leave = told("b", bitwise_resume=False)
    assert train(run, manifest, leave, shards=[SHARD]) == [SHARD]
    (resumed,) = journal(run, SHARD, "resumed")
    assert resumed["bitwise"] is False
    assert (resumed["was"]["diffusers"], resumed["is"]["diffusers"]) == (made["diffusers"], VERSION)


def test_what_the_islands_file_says_is_known_before_a_job_is_started(fresh: Fresh) -> None:
    run, manifest = begun(fresh)
    two = Island(name="a", local=True, cpus=2, resources=Resources(workers=2))
    with pytest.raises(Refused, match="a: parallel none then and ddp now, workers 1 then and 2"):
        train(run, manifest, told(islands=(two,)), shards=[SHARD])
    with pytest.raises(Refused, match="threads 1 then and 2 now"):
        train(run, manifest, told("a", threads=2), shards=[SHARD])
    assert not events(run, "submitted")


def test_workers_bind_the_expert_and_not_its_head(fresh: Fresh, heads: list[Head]) -> None:
    run, _ = begun(fresh)
    config = TRAIN.model_copy(update={"workers": 2})
    site = Site(Island(name="a", local=True), Jobs(heads[0].cluster, ask=False), 1, 2, 0, workers=2)
    choice = Choice(run, SHARD, config, [site])
    assert choice.able() == []
    run.write_bytes(f"islands/{SHARD}/expert/atoll.json", b"{}")
    choice.look()
    assert choice.able() == [site]  # there is no commit of a head
    writer = Checkpoints(run, f"islands/{SHARD}/gate_head_training")
    writer.claim()
    made = {"workers": 1, "parallel": "none", "threads": 1, "torch": "0.1"}
    writer.seal(8, [writer.write(8, {"x": torch.zeros(1)})], {**made, "plan": {}, "guard": {}})
    choice.look()
    assert choice.made_with == made
    assert choice.able() == [site]
    choice.refused(site, {"torch": ["0.1", "0.2"]})
    assert choice.able() == []
    writer.seal(16, [writer.write(16, {"x": torch.zeros(1)})], {**made, "torch": "0.2"})
    choice.look()
    assert choice.able() == [site]  # of another kind than it was asked about


def test_a_shard_waits_for_an_island_that_is_cut_off_and_goes_on_there_when_it_is_back(
    fresh: Fresh, heads: list[Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen in the moment of a submission, which may arrive all the same when it wakes up."""
    monkeypatch.setattr(submit, "_SUBMIT_SECONDS", 1.0)
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(sites, "_ASK_AGAIN_SECONDS", 1.0)
    straight, manifest = fresh("straight")
    order(straight, manifest, SHARD)
    expected = finish_here(straight, SHARD)

    run, manifest = fresh()
    sent, stopped = [], []
    frozen: list[psutil.Process] = []
    submit_, stop = Jobs.submit, Jobs.stop

    def freezing(self: Jobs, *given: Any, submission_id: str, **more: Any) -> str | None:
        sent.append(submission_id)
        if len(sent) == 1:
            frozen.extend(family(psutil.Process(heads[0].process)))
            send(frozen, signal.SIGSTOP)
        return submit_(self, *given, submission_id=submission_id, **more)

    def stopping(self: Jobs, submission_id: str) -> None:
        stop(self, submission_id)
        stopped.append(submission_id)

    monkeypatch.setattr(Jobs, "submit", freezing)
    monkeypatch.setattr(Jobs, "stop", stopping)

    def wake() -> None:
        until(lambda: events(run, "waiting"))
        row = next(row for row in read_status(run, manifest).shards if row.shard == SHARD)
        assert (row.state, row.reason) == ("planned", "waits for a to answer")
        send(frozen, signal.SIGCONT)

    watch = WatchConfig(unreachable_seconds=0.1, give_up_seconds=None)
    try:
        with beside(wake):
            assert train(run, manifest, told("a", watch=watch), shards=[SHARD]) == [SHARD]
    finally:
        send(frozen, signal.SIGCONT)
    assert results(run, SHARD) == expected
    assert len(events(run, "waiting")) == 1
    assert stopped == sent[:1]  # what may have arrived is no rival of the next attempt


def test_an_island_that_stays_away_is_given_up_at_last(fresh: Fresh) -> None:
    run, manifest = fresh()
    away = Island(name="away", address="http://127.0.0.1:1", shards=(SHARD,))
    here = Island(name="a", local=True)
    watch = WatchConfig(unreachable_seconds=0.1, give_up_seconds=0.2)
    with pytest.raises(Failed, match="no island is left for it; those that take it: away"):
        train(run, manifest, told(islands=(here, away), watch=watch), shards=[SHARD])
    (given_up,) = events(run, "given_up")
    assert given_up["made_with"] == {}
    assert not events(run, "submitted")
