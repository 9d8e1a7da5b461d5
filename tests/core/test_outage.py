"""What a patient handle waits for, what it never asks twice, and when it gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.core import outage
from atoll.core.checkpoint import Checkpoints, newest_generation
from atoll.core.errors import Failed, Fenced, Interrupted, Refused
from atoll.core.lock import exclusive
from atoll.core.outage import at_once, is_outage, ride_out, unless_away
from atoll.core.storage import Storage
from tests.outages import Away, ClientError, When, each_twice, said, small_disk
from tests.waiting import until


def everything(place: Storage) -> list[Any]:
    """Every request there is, and what it comes to."""
    place.write_bytes("a/x", b"first")
    place.write_bytes("a/x", b"then")
    place.write_json("a/y.json", {"a": 1})
    place.create("a/new", b"ours")
    with pytest.raises(FileExistsError):
        place.create("a/x", b"ours")
    for n in range(3):
        place.append_line("journal.jsonl", f'{{"n": {n}}}')
    with place.writing("a/large") as path:
        path.write_bytes(b"large")
    with place.writing_folder("a/folder") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text("1")
    place.write_folder("b", lambda folder: [(folder / n).write_text(n) for n in "xy"])
    place.write_folder("b", lambda folder: (folder / "z").write_text("z"))
    place.write_bytes("gone/x", b"")
    place.remove("gone")
    with pytest.raises(FileNotFoundError):
        place.read_bytes("gone/x")
    found = place.list()
    staged = {name: place.local(name).read_bytes() for name in found}
    return [
        found, staged, {name: place.read_bytes(name) for name in found},
        [place.exists(name) for name in ("a", "a/x", "b", "b/x", "gone", "gone/x")],
        list(place.read_lines("journal.jsonl")), place.read_json("a/y.json"),
        list(place.read_ranges([("a/x", 0, 2), ("a/large", 1, 4)])),
        place.sha256("a/folder"), place.sha256("a/x"),
    ]  # fmt: skip


def test_every_request_is_made_until_it_is_answered(away: type[Away]) -> None:
    """Also where it was carried out and its answer was lost: nothing is there twice."""
    expected = everything(Storage("away://undisturbed"))
    away.rule = each_twice()
    assert everything(Storage("away://run").patient()) == expected
    assert {request for request, _ in away.failed} == {
        "info", "ls", "cat_file", "pipe_file", "pipe_file create", "put_file", "open ab", "rm",
    }  # fmt: skip
    with exclusive(Storage("away://run")):
        assert Storage("away://run").patient().exists("lock.json")
    assert not Storage("away://run").patient().exists("lock.json")


def test_an_outage_is_no_empty_folder_and_no_missing_file(away: type[Away]) -> None:
    run = Storage("away://run")
    Checkpoints(run, "x").claim()
    away.rule = lambda request, _path: "before"
    asked: list[Callable[[], Any]] = [
        lambda: run.list("x/gen"), lambda: run.list(), lambda: run.exists("x"),
        lambda: run.remove("x"), lambda: newest_generation(run, "x"),
    ]  # fmt: skip
    for ask in asked * 3:  # every kind of error
        with pytest.raises((OSError, Failed)) as caught:
            ask()
        assert is_outage(caught.value)


# -- who made it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_claim_is_ours_where_only_its_answer_was_lost(away: type[Away], when: When) -> None:
    lost = iter([when])
    away.rule = lambda request, _path: next(lost, None) if request == "pipe_file create" else None
    writer = Checkpoints(Storage("away://run").patient(), "x")
    assert writer.claim() == 1
    writer.check_fence()
    assert Checkpoints(Storage("away://run"), "x").claim() == 2
    with pytest.raises(Fenced):
        writer.check_fence()


def test_a_claim_that_another_made_meanwhile_is_not_ours(away: type[Away]) -> None:
    """Theirs arrives while ours is on its way again; both say the same but for who they are."""
    run = Storage("away://run")
    Checkpoints(run, "elsewhere").claim()
    theirs = iter([run.read_bytes("elsewhere/gen/000001.json")])

    def rule(request: str, _path: str) -> When:
        if request != "pipe_file create" or (claim := next(theirs, None)) is None:
            return None
        run.write_bytes("x/gen/000001.json", claim)
        return "before"

    away.rule = rule
    assert Checkpoints(run.patient(), "x").claim() == 2


def test_what_was_sent_twice_is_counted_once(away: type[Away], tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(bytes(100))
    lost, heard = iter(["after", "before"]), list[int]()
    away.rule = lambda request, _path: next(lost, None) if request == "put_file" else None
    Storage("away://run").patient().put(file, "x", advance=heard.append)
    assert sum(away.failed.values()) == 2
    assert sum(heard) == 100
    assert Storage("away://run").read_bytes("x") == bytes(100)


def test_a_line_torn_by_a_full_disk_spoils_no_other(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    run.append_line("journal.jsonl", '{"n": 1}')
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"n": 2, "what')
    run.append_line("journal.jsonl", '{"n": 3}')
    assert list(run.read_lines("journal.jsonl")) == [{"n": 1}, {"n": 3}]


# -- what is not waited for ----------------------------------------------------------------------


def test_answers_are_taken_at_once(away: type[Away]) -> None:
    run = Storage("away://run").patient()
    run.write_bytes("x", b"no JSON")
    scoped = run.scoped(read=["y"], write=[])
    asked: dict[type[Exception], Callable[[], Any]] = {
        FileNotFoundError: lambda: run.read_bytes("nothing"),
        FileExistsError: lambda: run.create("x", b""),
        PermissionError: lambda: scoped.read_bytes("x"),
        Refused: lambda: run.read_json("x"),
    }
    with said() as lines:
        for kind, ask in asked.items():
            with pytest.raises(kind):
                ask()
    assert lines == []


@pytest.mark.parametrize(
    "error", [Fenced("another"), Refused("no"), KeyError("bug"), SystemExit(1)]
)
def test_what_is_no_outage_ends_the_work(error: BaseException) -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        ride_out("x", work, patience=lambda: 60.0)
    assert len(calls) == 1


def test_ctrl_c_ends_a_wait_at_once(away: type[Away], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    away.rule = lambda _request, _path: "before"
    with pytest.raises(KeyboardInterrupt):
        Storage("away://run").patient().exists("x")


def test_who_is_to_leave_waits_no_longer(away: type[Away]) -> None:
    leave = threading.Event()

    def rule(_request: str, _path: str) -> When:
        leave.set()  # as a signal's handler does while a request is made
        return "before"

    away.rule = rule
    with pytest.raises(Interrupted, match="while storage was away"):
        Storage("away://run").patient(leave=leave.is_set).exists("x")


def test_patience_has_an_end_and_both_ends_are_told_once(away: type[Away]) -> None:
    away.rule = lambda _request, _path: "before"
    with said() as lines, pytest.raises(Failed, match=r"away for \d+ s, writing x: .*resumes"):
        Storage("away://run").patient(seconds=0.1).write_bytes("x", b"")
    (line,) = lines
    assert line.startswith("storage is away, writing x, tried again for up to 0 s: ")
    fails = iter(range(9))
    away.rule = lambda _request, _path: None if next(fails, None) is None else "before"
    with said() as lines:
        Storage("away://run").patient().write_bytes("x", b"")
    assert [line.split(",")[0] for line in lines] == [
        "storage is away", "storage answers again after 0 s",
    ]  # fmt: skip


def test_of_work_within_work_the_outer_one_waits(away: type[Away]) -> None:
    away.rule = lambda _request, _path: "before"
    run, outer = Storage("away://run").patient(), []

    def work() -> None:
        outer.append(sum(away.failed.values()))
        if len(outer) == 5:
            away.rule = lambda _request, _path: None
        run.write_bytes("x", b"")

    ride_out("x", work, patience=lambda: 60.0, pause=0.001)
    assert outer == [0, 1, 2, 3, 4]


def test_at_once_nothing_is_waited_for(away: type[Away]) -> None:
    away.rule = lambda _request, _path: "before"
    run = Storage("away://run").patient()
    with at_once(), pytest.raises((Failed, OSError)):
        run.exists("x")
    with said() as lines, unless_away("a note"):
        run.write_bytes("x", b"")
    assert lines[0].startswith("storage is away, a note is left out: ")
    with pytest.raises(KeyError), unless_away("a note"):
        raise KeyError
    assert sum(away.failed.values()) == 2


def test_a_clients_own_error_is_a_failure_with_its_name(away: type[Away]) -> None:
    away.rule = lambda _request, _path: "before"
    found = []
    for _ in range(3):
        with pytest.raises((Failed, OSError)) as caught:
            Storage("away://run").read_bytes("x")
        found.append(caught.value)
    (failed,) = (error for error in found if isinstance(error, Failed))
    assert isinstance(failed.__cause__, ClientError)
    assert failed.what == "away://run does not answer, reading x: ClientError: the store is away"


# -- a disk that is full indeed ------------------------------------------------------------------


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.01)
    expected = everything(Storage(tmp_path / "roomy"))
    with small_disk(tmp_path / "disk", "256k") as fill, said() as lines:
        free, found = fill(), []
        patient = Storage(tmp_path / "disk/run").patient()
        waiting = threading.Thread(target=lambda: found.append(everything(patient)))
        waiting.start()
        until(lambda: any("No space left" in line for line in lines))
        assert waiting.is_alive()
        free()
        waiting.join()
    assert found == [expected]
