"""One command at a time on a run: a lock that a killed process cannot leave behind.

Locally an advisory lock on `.lock` that the kernel drops with the process; elsewhere an exclusively
created `lock.json`, which names its owner so that a stranger can decide to remove it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator

from atoll.core.digest import canonical_json
from atoll.core.disk import no_space_is_failure
from atoll.core.errors import Failed, Refused
from atoll.core.journal import log
from atoll.core.outage import GRACE_SECONDS
from atoll.core.storage import Storage

LOCK_NAME = "lock.json"  # where a run is not on a local disk


class InUse(Refused):
    """Another command holds the run."""


@contextlib.contextmanager
def exclusive(run: Storage) -> Iterator[Callable[[], None]]:
    """Hold the run for one command; `InUse` when another command is at work on it.

    Yields what raises `InUse` where somebody took the lock away meanwhile, which on a disk nobody
    can.
    """
    if run.is_local:
        with _local(run):
            yield lambda: None
        return
    owner = canonical_json({
        "schema_version": 1, "host": socket.gethostname(), "process": os.getpid(),
        "writer": uuid.uuid4().hex,
    })  # fmt: skip
    run = run.patient(seconds=GRACE_SECONDS)  # what is lost here locks everybody out
    try:
        run.create(LOCK_NAME, owner)
    except FileExistsError:
        raise InUse(
            f"Another command is at work on {run.uri}: {run.read_json(LOCK_NAME)}",
            cure=f"wait for it; if it is surely dead, remove {run.uri}/{LOCK_NAME}",
        ) from None

    def still() -> None:
        if not _is(run, owner):
            raise InUse(
                f"{run.uri}/{LOCK_NAME} was taken away while this command was at work",
                cure="run it again when nobody else is at work there",
            )

    try:
        yield still
    finally:
        _release(run, owner)


def _is(run: Storage, owner: bytes) -> bool:
    try:
        return run.read_bytes(LOCK_NAME) == owner
    except FileNotFoundError:
        return False


def _release(run: Storage, owner: bytes) -> None:
    try:
        if _is(run, owner):
            run.remove(LOCK_NAME)
    except (Failed, OSError) as error:  # what was done under it stands, however that ended
        log.warning("%s/%s is left, remove it by hand: %s", run.uri, LOCK_NAME, error)


@contextlib.contextmanager
def _local(run: Storage) -> Iterator[None]:
    folder = run.local("")
    found = folder.exists()
    with no_space_is_failure("the lock"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"Another command is at work on {run.uri}",
                cure="wait until it has ended, or stop it",
            ) from None
        yield
    finally:
        # A command that was refused leaves no folder behind that was not there before.
        if not found and os.listdir(folder) == [".lock"]:
            shutil.rmtree(folder)
        os.close(descriptor)
