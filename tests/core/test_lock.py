"""One command at a time on a run, and no lock that outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.core.errors import ExitCode, Refused
from atoll.core.lock import exclusive
from atoll.core.storage import Storage

_HOLD = """
import sys, subprocess, time
from atoll.core.lock import exclusive
from atoll.core.storage import Storage
with exclusive(Storage(sys.argv[1])):
    # Its standard input is ours: the test ends it by closing that.
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdout=2)
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_second_holder_is_refused_while_the_first_holds(storage: Storage) -> None:
    with exclusive(storage):
        with pytest.raises(Refused, match=r"Another command is at work.*Cure: wait") as caught:
            exclusive(storage).__enter__()
        assert caught.value.exit_code == ExitCode.REFUSED == 7
    with exclusive(storage):
        pass
    assert storage.list() == []


def test_lock_is_released_by_an_error(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(storage):
        raise ZeroDivisionError
    with exclusive(storage):
        pass


def test_runs_do_not_lock_each_other(tmp_path: Path) -> None:
    with exclusive(Storage(tmp_path / "a")), exclusive(Storage(tmp_path / "b")):
        pass


def test_another_process_is_refused_until_kill_9_even_if_its_child_lives(tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, run.uri],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(Refused):
        exclusive(run).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with exclusive(run):
        os.kill(child, 0)  # it lives
    holder.stdin.close()


def test_remote_lock_names_its_owner_and_how_to_remove_it() -> None:
    run = Storage("memory://lock-owner")
    with exclusive(run):
        assert run.read_json("lock.json")["process"] == os.getpid()
        with pytest.raises(Refused, match=rf"{os.getpid()}.*remove memory://lock-owner/lock\.json"):
            exclusive(run).__enter__()
    assert not run.exists("lock.json")
