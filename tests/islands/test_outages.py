"""Trainings whose storage goes away or is full for a while: bitwise what they would have been."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from atoll.core import outage
from atoll.core.errors import ExitCode
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands import signs, submission
from atoll.islands.heads import HeadOrder, local_heads
from atoll.islands.job import main as job
from atoll.islands.loop import Loop
from atoll.islands.settings import DenoiserTraining, LoraConfig
from atoll.islands.signs import Process, ask_to_stop, process_heartbeat
from atoll.islands.step import Errors
from atoll.islands.supervise import train
from tests.islands.conftest import CONTROLLER, TRAIN, finding, journal
from tests.islands.kills import beside
from tests.islands.test_job import finish_here, order, results
from tests.islands.test_loop import COURSE, loss_of, module, straight, weights
from tests.outages import Away, When, each_twice, said, small_disk
from tests.waiting import until

AWAY = "storage is away"


# -- a loop --------------------------------------------------------------------------------------


@pytest.fixture(params=["a store", "a disk"])
def place(
    request: pytest.FixtureRequest, away: type[Away], tmp_path: Path
) -> Iterator[tuple[Storage, Callable[[], Callable[[], None]]]]:
    """A storage, and what takes it away and gives what brings it back.

    Of the store commits alone, which would otherwise wait behind the metrics before them.
    """
    if request.param == "a disk":
        with small_disk(tmp_path / "disk", "1m") as fill:
            yield Storage(tmp_path / "disk/x"), fill
        return

    def take() -> Callable[[], None]:
        away.rule = lambda _request, path: "before" if "/c" in path else None
        return lambda: setattr(away, "rule", lambda _request, _path: None)

    yield Storage("away://x"), take


def test_a_store_that_is_away_for_a_while_delays_no_step_and_loses_nothing(place: Any) -> None:
    storage, take = place
    expected = straight(storage)
    network = module()
    back: list[Callable[[], None]] = []

    def loss(first: int, count: int) -> Errors:
        if first == 100:
            back.append(take())
        if first == 396:
            until(lambda: any(AWAY in line for line in lines))
            back[0]()
        return loss_of(network)(first, count)

    with said() as lines:
        Loop(storage, "run", network, COURSE, name="run").run(loss)
    assert any("answers again" in line for line in lines)
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())
    assert storage.read_bytes("run/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")


# -- a job ---------------------------------------------------------------------------------------


def test_a_job_whose_every_request_fails_twice_is_bitwise_the_undisturbed_one(
    fresh: Any, away: type[Away]
) -> None:
    """From its order to its last word; a request that fails may have been carried out all the same.

    An expert as adapters, since what it publishes is made of more parts.
    """
    training = DenoiserTraining(passes=2, checkpoints=4, lora=LoraConfig(rank=2))
    near, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(near, manifest, shard, TRAIN.model_copy(update={"training": training}))
    far = Storage("away://run")
    for name in near.list():
        far.write_bytes(name, near.read_bytes(name))
    away.rule = each_twice()
    assert job([far.uri, shard]) == ExitCode.DONE
    failed = {(request, path.removeprefix("/run/")) for request, path in away.failed}
    away.rule = lambda _request, _path: None
    assert results(far, shard) == finish_here(near, shard)

    here = f"islands/{shard}"
    assert far.read_json(f"{here}/exit.json")["code"] == 0
    for training_at in (here, f"{here}/gate_head_training"):
        assert far.list(f"{training_at}/gen") == [f"{training_at}/gen/000001.json"]
    for event, times in (("started", 1), ("trained", 2)):
        lines = journal(far, shard, event) + [
            line
            for line in far.read_lines(f"{here}/gate_head_training/journal.jsonl")
            if line["event"] == event
        ]
        assert len(lines) == times
    for request, part in {
        "cat_file": "island.json", "pipe_file create": "gen/000001.json",
        "put_file": "checkpoints/", "open ab": "journal.jsonl",
        "pipe_file": "exit.json", "info": "exit.json",
    }.items():  # fmt: skip
        assert any(r == request and p.startswith(f"{here}/{part}") for r, p in failed), part
    commits = {p for r, p in failed if r == "pipe_file create" and "/commits/" in p}
    assert len(commits) >= 4  # the first and the last of both trainings
    for published in ("expert/atoll.json", "gate_head/config.json"):
        assert ("put_file", f"{here}/{published}") in failed


def test_sigterm_ends_a_wait_for_storage(fresh: Any, away: type[Away]) -> None:
    near, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(near, manifest, shard)
    run = Storage("away://run")
    for name in near.list(f"islands/{shard}"):
        run.write_bytes(name, near.read_bytes(name))
    asked = []

    def rule(_request: str, path: str) -> When:
        if not path.endswith("island.json"):
            return None
        asked.append(path)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return "before"

    away.rule = rule
    assert job([run.uri, shard]) == ExitCode.INTERRUPTED
    assert len(asked) == 3
    assert run.read_json(f"islands/{shard}/exit.json")["code"] == ExitCode.INTERRUPTED


def test_a_sign_of_life_outlives_any_outage_and_a_request_is_heard_after_it(
    fresh: Any, away: type[Away], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "SIGN_SECONDS", 0.01)
    run, left = Storage("away://run").patient(), threading.Event()
    process = Process(run, "a", leave=left.set)
    with said() as lines, process.watching():
        away.rule = lambda _request, _path: "before"
        until(lambda: sum(away.failed.values()) > 9)
        process.enter("expert")  # nor does a training wait for it
        away.rule = lambda _request, _path: None
        until(lambda: run.read_json(process_heartbeat("a"))["name"] == "expert")
        assert not left.is_set()
        ask_to_stop(run, "a")
        until(left.is_set)
    assert sum("no sign of life" in line for line in lines) == 1


# -- a controller --------------------------------------------------------------------------------


@contextlib.contextmanager
def away_from_here() -> Iterator[list[object]]:
    """This process reaches no file system by fsspec, others do; what it has asked in vain."""
    refused: list[object] = []

    def away(_fs: object, path: object, *_given: Any, **_options: Any) -> Any:
        refused.append(path)
        raise ConnectionResetError("the store is away")

    with pytest.MonkeyPatch.context() as patch:
        for request in ("info", "ls", "cat_file", "open"):
            patch.setattr(LocalFileSystem, request, away)
        yield refused


def test_a_controller_and_its_job_wait_for_a_full_disk_and_for_a_store_that_is_away(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First nobody can write; then the controller alone is cut off, and its job goes on."""
    config = TRAIN.model_copy(update={"training": DenoiserTraining(passes=20, checkpoints=20)})
    shard = "shard-01"
    undisturbed, manifest = fresh()
    shutil.copytree(undisturbed.local(""), tmp_path / "copy")
    order(undisturbed, manifest, shard, config)
    expected = finish_here(undisturbed, shard)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.5)
    monkeypatch.setattr(submission, "_LOG_SECONDS", 0.2)
    with (
        small_disk(tmp_path / "disk", "64m") as fill,
        local_heads([HeadOrder("local", 1)]) as (head,),
        finding([head]),
        said() as lines,
    ):
        place = tmp_path / "disk/run"
        shutil.copytree(tmp_path / "copy", place)
        run, commits = Storage(place), place / f"islands/{shard}/commits"

        def newest() -> str:
            return max((path.name for path in commits.glob("*.json")), default="")

        def said_there() -> str:
            logs = head.folder.glob("ray/session_*/logs/job-driver*")
            return "".join(path.read_text() for path in logs)

        def disturb() -> None:
            until(newest)
            free = fill()
            until(lambda: any("No space left" in line for line in lines))
            until(lambda: f"{AWAY}, writing" in said_there())
            with away_from_here() as refused:
                before = newest()
                free()
                until(lambda: refused and newest() > before)

        with beside(disturb):
            assert train(run, Manifest.load(run), config, shards=[shard]) == [shard]
        assert any("answers again" in line for line in lines)
        assert results(run, shard) == expected
        (submitted,) = journal(run, shard, "submitted", CONTROLLER)
        (ended,) = journal(run, shard, "ended", CONTROLLER)
        assert ended["submission_id"] == submitted["submission_id"]
