"""What the tests do to an island's processes beside its training, and whether any is left."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from atoll.core.storage import Storage
from tests.islands.conftest import journal
from tests.waiting import PATIENCE_SECONDS, until


@contextlib.contextmanager
def beside(act: Callable[[], None]) -> Iterator[None]:
    """Act in a thread while the block runs; what goes wrong there is raised at its end."""
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:
            wrong.append(error)

    # Not waited for where the block fails: what it waits for may never come.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    for error in wrong:
        raise error


def attempt(run: Storage, shard: str, generation: int) -> psutil.Process:
    """The process of an attempt, once it has committed twice."""
    mine = f"/commits/{generation:06d}-"
    until(lambda: sum(mine in name for name in run.list(f"islands/{shard}/commits")) >= 2)
    return psutil.Process(journal(run, shard, "started")[generation - 1]["process"])


def kill_attempts(run: Storage, shard: str, generations: Iterable[int]) -> None:
    """SIGKILL to one attempt after the other, each once it has committed twice."""
    for generation in generations:
        attempt(run, shard, generation).kill()


def kill_head_of(run: Storage, shard: str) -> None:
    """SIGKILL to the head of the first attempt, once that has committed twice, and to all below."""
    above = attempt(run, shard, 1).parents()
    send(family(next(each for each in above if "--head" in each.cmdline())), signal.SIGKILL)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started; of a head, its jobs too."""
    return [process, *process.children(recursive=True)]


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """A signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def command_lines(marker: str) -> list[str]:
    """Command lines of living processes that mention a folder or an option."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in text:
            found.append(text)
    return found


def expect_none_left(marker: str) -> None:
    """That no such process lives on; what was just killed takes a moment to be gone."""
    until(lambda: not command_lines(marker), every=0.2)
