"""A folder is whole at every moment: beside readers, other writers, kills and full disks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atoll.core import disk
from atoll.core.disk import recover, replacing
from atoll.core.errors import Fenced, Refused
from tests.waiting import PATIENCE_SECONDS

SWAPS = pytest.mark.parametrize("swaps", [True, False])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "soup"
    place.mkdir()
    (place / "weights").write_text("old")
    return place


def cannot_swap(*_: Any) -> bool:
    return False


@SWAPS
@pytest.mark.parametrize("alone", [True, False])
def test_replaces_whole_and_leaves_nothing_beside(
    folder: Path, swaps: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(disk, "_exchange", cannot_swap)
    for round_ in range(3):
        with replacing(folder, alone=alone) as fresh:
            assert not list(fresh.iterdir())
            (fresh / f"x{round_}").mkdir()
            (fresh / f"x{round_}" / "y").write_text("new")
        assert [path.name for path in folder.iterdir()] == [f"x{round_}"]
    with pytest.raises(FileNotFoundError), replacing(folder, alone=alone) as fresh:
        (fresh / "no such folder" / "half").touch()
    assert [path.name for path in folder.iterdir()] == ["x2"]
    assert os.listdir(folder.parent) == ["soup"]


def test_a_link_stays_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(folder)
    with replacing(link) as fresh:
        (fresh / "weights").write_text("new")
    assert link.is_symlink()
    assert (folder / "weights").read_text() == "new"


def _look(folder: Path, stop: Any, missing: Any) -> None:
    while not stop.is_set():
        missing.value += not folder.exists()


def test_there_is_no_moment_without_the_folder(folder: Path) -> None:
    (probe := folder.parent / "other").mkdir()
    if not disk._exchange(folder, probe):
        pytest.skip("this filesystem cannot swap two names")
    disk._exchange(folder, probe)
    context = multiprocessing.get_context("fork")
    stop, missing = context.Event(), context.Value("i", 0)
    readers = [context.Process(target=_look, args=(folder, stop, missing)) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(300):
            with replacing(folder) as fresh:
                (fresh / "weights").write_text("new")
    finally:
        stop.set()
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert missing.value == 0


def test_an_error_of_the_swap_is_raised_and_the_old_stays(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk._exchange(tmp_path / "nothing", folder)
    assert (folder / "weights").read_text() == "old"


def test_the_right_to_a_folder_is_asked_for_when_all_of_it_is_on_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that takes long is left between the answer and the swap."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps: list[str] = []
    monkeypatch.setattr("atoll.core.disk.fsync", lambda path: steps.append(path.name))

    def lost() -> None:
        steps.append("asked")
        raise Fenced("another has taken over")

    def write() -> None:
        with replacing(folder, check=lost) as fresh:
            (fresh / "large").write_bytes(b"x")

    with pytest.raises(Fenced):
        write()
    assert steps[-2:] == ["large", "asked"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_where_the_second_rename_fails_the_first_is_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, iter([False, True])

    def full(*names: Any) -> None:
        if next(calls, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(*names)

    monkeypatch.setattr(disk, "_exchange", cannot_swap)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"), replacing(folder) as fresh:
        (fresh / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert os.listdir(folder.parent) == ["soup"]


# -- two writers ---------------------------------------------------------------------------------


def _hold(folder: Path, ready: Any, release: Any) -> None:
    with replacing(folder, alone=True) as fresh:
        (fresh / "x").write_text("half")
        ready.set()
        release.wait(PATIENCE_SECONDS)
        raise SystemExit


def test_who_must_be_alone_refuses_a_second(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(folder, ready, release))
    other.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        with pytest.raises(Refused, match="at work"), replacing(folder, alone=True):
            pass
        recover(folder)  # takes nothing from a writer that lives
        assert len(os.listdir(folder.parent)) == 2
        with replacing(folder) as fresh:  # asks for nothing of the old content, nor of the other
            (fresh / "weights").write_text("new")
    finally:
        release.set()
        other.join()
    assert (folder / "weights").read_text() == "new"
    with replacing(folder, alone=True) as fresh:
        (fresh / "weights").write_text("newer")
    assert os.listdir(folder.parent) == ["soup"]


def test_a_lock_on_what_was_renamed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writer finishes between the second's open and lock: its result is not cleared."""
    folder = tmp_path / "soup"
    real = fcntl.flock

    def finish_first(descriptor: int, operation: int) -> None:
        (hidden,) = tmp_path.glob(".soup.*")
        (hidden / "done").write_text("x")
        os.rename(hidden, folder)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(Refused), replacing(folder, alone=True):
        pass
    assert (folder / "done").read_text() == "x"


def _count(folder: Path, rounds: int) -> None:
    done = 0
    while done < rounds:
        try:
            with replacing(folder, alone=True) as fresh:
                value = int((folder / "count").read_text())
                (fresh / "count").write_text(str(value + 1))
            done += 1
        except Refused:
            continue


@SWAPS
def test_no_change_of_four_writers_is_lost(
    tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes the new content from the old, as a soup is made."""
    if not swaps:
        monkeypatch.setattr(disk, "_exchange", cannot_swap)
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count, args=(folder, 25)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE_SECONDS)
        assert writer.exitcode == 0
    assert (folder / "count").read_text() == "100"
    assert os.listdir(tmp_path) == ["x"]


# -- kills ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from atoll.core import disk
folder, moment, alone = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def then_die(real):
    def call(*names):
        real(*names)
        die()
    return call
if moment == "between":
    disk._exchange = lambda *names: False
if moment == "swapped":
    disk._exchange = then_die(disk._exchange)
with disk.replacing(folder, alone=alone) as fresh:
    (fresh / "weights").write_text("new")
    if moment == "filling":
        die()
    if moment == "between":
        os.rename = then_die(os.rename)
"""


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("moment", "found"), [("filling", "old"), ("between", None), ("swapped", "new")]
)
def test_kill_9_leaves_the_old_or_the_new(
    folder: Path, moment: str, found: str | None, alone: bool
) -> None:
    arguments = [sys.executable, "-c", KILLED, folder, moment, str(alone)]
    done = subprocess.run(arguments, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(folder.parent)) == 2
    assert (folder / "weights").exists() == (found is not None)
    recover(folder)
    assert (folder / "weights").read_text() == (found or "old")
    assert os.listdir(folder.parent) == ["soup"]
    with replacing(folder, alone=alone) as fresh:
        (fresh / "weights").write_text("newer")
    assert (folder / "weights").read_text() == "newer"
    assert os.listdir(folder.parent) == ["soup"]
