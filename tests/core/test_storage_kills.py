"""A writer that gets SIGKILL, at every filesystem call and at random moments: whole or nothing."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.core.storage import Storage
from tests.core.conftest import near
from tests.waiting import until

Kills = Callable[..., Iterator[bool]]


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob(".*"))


def folder_of(path: Path, text: str) -> Path:
    for name in ("a", "sub/b", "atoll.json"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_write_killed_at_every_step_is_old_or_new(
    tmp_path: Path, killed_at_every_step: Kills
) -> None:
    run, content = Storage(tmp_path / "run"), []
    for ended in killed_at_every_step(
        lambda: run.write_bytes("x/file", b"old"), lambda: run.write_bytes("x/file", b"new" * 9999)
    ):
        content.append(run.read_bytes("x/file"))
        assert content[-1] in (b"old", b"new" * 9999)
        assert run.list() == ["x/file"]
        assert not ended or content[-1] != b"old"
    assert content[0] == b"old"
    assert len(content) > 3


def test_create_killed_at_every_step_is_nothing_or_all(
    tmp_path: Path, killed_at_every_step: Kills
) -> None:
    numbers, run = itertools.count(), Storage(tmp_path / "run")
    current = ["x"]

    def prepare() -> None:
        current[0] = f"gen/{next(numbers)}"

    for ended in killed_at_every_step(prepare, lambda: run.create(current[0], b"all" * 999)):
        if run.exists(current[0]):
            assert run.read_bytes(current[0]) == b"all" * 999
        else:
            assert not ended
            run.create(current[0], b"another writer")


def test_publish_killed_at_every_step_is_whole_or_nothing(
    tmp_path: Path, killed_at_every_step: Kills
) -> None:
    run = Storage(tmp_path / "run")
    old, new = folder_of(tmp_path / "old", "old"), folder_of(tmp_path / "new", "new" * 999)
    (old / "only-old").write_text("old")
    seen = set()

    def prepare() -> None:
        run.publish(old, "x/expert")
        # What a killed writer left is gone with the next one's success.
        assert hidden(tmp_path / "run") == []

    for ended in killed_at_every_step(prepare, lambda: run.publish(new, "x/expert")):
        files = {name.removeprefix("x/expert/") for name in run.list("x/expert")}
        texts = {run.read_bytes(f"x/expert/{name}").decode() for name in files}
        if not files:
            seen.add("nothing")
        elif texts == {"old"}:
            assert files == {"a", "sub/b", "atoll.json", "only-old"}
            seen.add("old")
        else:
            assert texts == {"new" * 999}
            assert files == {"a", "sub/b", "atoll.json"}
            seen.add("new")
        assert not ended or texts == {"new" * 999}
    assert {"old", "new"} <= seen


@pytest.mark.parametrize("step", range(0, 40, 4))
def test_removal_takes_along_what_killed_writers_left(
    step: int, tmp_path: Path, killed_at_every_step: Kills
) -> None:
    run, private = Storage(tmp_path / "run"), folder_of(tmp_path / "private", "private")
    kills = killed_at_every_step(lambda: None, lambda: run.publish(private, "shards/s"))
    for _ in itertools.islice(kills, step + 1):
        pass
    run.remove("shards/s")
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def test_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    run, random_ = Storage(tmp_path / "run"), random.Random(0)
    run.write_bytes("x", b"\x00" * 200_000)
    for _ in range(25):
        before = run.read_bytes("x")[0]
        child = os.fork()
        if child == 0:
            for value in itertools.count(before + 1):
                run.write_bytes("x", bytes([value % 256]) * 200_000)
        until(lambda before=before: run.read_bytes("x")[0] != before, every=0.001)
        time.sleep(random_.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        data = run.read_bytes("x")
        assert len(data) == 200_000
        assert len(set(data)) == 1
        assert run.list() == ["x"]


@near
def test_reader_never_sees_a_torn_file(storage: Storage) -> None:
    import threading

    storage.write_bytes("x", b"\x00" * 50_000)
    stop = threading.Event()

    def write() -> None:
        for value in itertools.count():
            if stop.is_set():
                return
            storage.write_bytes("x", bytes([value % 256]) * 50_000)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            data = storage.read_bytes("x")
            assert len(data) == 50_000
            assert len(set(data)) == 1
            assert storage.list() == ["x"]
    finally:
        stop.set()
        thread.join()
