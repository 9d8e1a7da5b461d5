"""Exclusive creation, on which fencing and the ledger rest: of racing writers exactly one wins."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.core.lock import exclusive
from atoll.core.storage import Storage
from tests.core.conftest import at_once, near
from tests.s3 import Gate
from tests.waiting import PATIENCE_SECONDS


def test_create_refuses_what_is_there_and_leaves_it(storage: Storage) -> None:
    storage.create("gen/1", b"first")
    with pytest.raises(FileExistsError):
        storage.create("gen/1", b"second")
    assert storage.read_bytes("gen/1") == b"first"
    assert storage.list() == ["gen/1"]


def _creates(storage: Storage, name: str, data: bytes) -> bool:
    try:
        storage.create(name, data)
    except FileExistsError:
        return False
    return True


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Let threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@near
@pytest.mark.usefixtures("eager_threads")
def test_of_16_racing_threads_exactly_one_creates(storage: Storage) -> None:
    for name in [f"gen/{round_}" for round_ in range(40)]:
        first = at_once(lambda number, name=name: _creates(storage, name, b"%d" % number), 16)
        assert sum(first) == 1
        assert storage.read_bytes(name) == b"%d" % first.index(True)


def _create_all(uri: str, number: int, rounds: int, start: Any, won: Any) -> None:
    place = Storage(uri)
    for round_ in range(rounds):
        start.wait()
        if _creates(place, f"gen/{round_}", b"%02d" % number * 1000):
            won.put((round_, number))
        else:  # whoever loses must find the winner's content, all of it
            found = place.read_bytes(f"gen/{round_}")
            assert found == found[:2] * 1000


@pytest.mark.parametrize(("kind", "count", "rounds"), [("local", 16, 25), ("s3", 4, 10)])
def test_of_racing_processes_exactly_one_creates(
    kind: str, count: int, rounds: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path)
    if kind == "s3":
        request.getfixturevalue("s3")
        uri = f"s3://runs/{tmp_path.name}"
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(count), context.Queue()
    racers = [
        context.Process(target=_create_all, args=(uri, number, rounds, start, won))
        for number in range(count)
    ]
    for racer in racers:
        racer.start()
    winners = dict(won.get(timeout=PATIENCE_SECONDS) for _ in range(rounds))
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert won.empty()
    assert sorted(winners) == list(range(rounds))
    for round_, number in winners.items():
        assert Storage(uri).read_bytes(f"gen/{round_}") == b"%02d" % number * 1000


def test_a_store_that_ignores_conditions_is_found_out(s3: Gate, monkeypatch) -> None:
    """By creating twice: whoever looked first would never learn what two at once would do."""
    place = Storage("s3://runs/old-store")
    place.create("a", b"1")
    monkeypatch.setattr(s3, "ignores_conditions", True)
    assert _creates(place, "a", b"2")
    monkeypatch.setattr(s3, "ignores_conditions", False)
    assert not _creates(place, "a", b"3")
    assert place.read_bytes("a") == b"2"


def test_a_condition_that_does_not_hold_is_one_however_a_store_says_so(
    s3: Gate, monkeypatch
) -> None:
    monkeypatch.setattr(s3, "names_conditions", False)
    place = Storage("s3://runs/terse-store")
    assert _creates(place, "a", b"1")
    assert not _creates(place, "a", b"2")
    assert place.read_bytes("a") == b"1"


def test_what_is_created_is_ours_where_the_store_s_client_asked_again_by_itself(
    s3: Gate, monkeypatch
) -> None:
    place = Storage("s3://runs/lost-answers")
    monkeypatch.setattr(s3, "loses_answers", 1)
    place.create("a", b"mine")
    assert s3.loses_answers == 0
    assert place.read_bytes("a") == b"mine"
    monkeypatch.setattr(s3, "loses_answers", 1)
    with exclusive(place):
        assert place.exists("lock.json")
    assert not place.exists("lock.json")


@pytest.mark.parametrize("data", [b"", b"second"])
def test_nothing_replaces_what_was_created(storage: Storage, data: bytes) -> None:
    storage.create("a/b", b"first")
    assert not _creates(storage, "a/b", data)
    assert storage.read_bytes("a/b") == b"first"
