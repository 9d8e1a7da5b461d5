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


def kill_in_head(run: Storage, shard: str, name: str | None) -> list[psutil.Process]:
    """SIGKILL to the process of that name in the head of the first attempt, or to all of the head.

    When the attempt has committed twice; it stands still from then on, not to be done before it is
    noticed. Returns the head and all below, as it was.
    """
    job = attempt(run, shard, 1)
    # Not by --head alone, which its raylet is told too.
    above = (each for each in job.parents() if "ray.scripts.scripts" in each.cmdline())
    found = family(next(above))
    meant = [each for each in found if name in (None, each.name())]
    assert meant
    job.suspend()
    send(meant, signal.SIGKILL)
    return found


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


def expect_gone(processes: list[psutil.Process]) -> None:
    """That none of them lives on."""
    until(lambda: not any(_lives(each) for each in processes), every=0.2)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
