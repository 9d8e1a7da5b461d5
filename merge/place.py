"""A folder that is replaced whole by one writer at a time.

The new content grows in a hidden folder beside the old one, whose lock says that somebody is at
work. A process that dies leaves the old content, and a lock that is free again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.core.errors import Refused
from atoll.core.storage import no_space_is_failure


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends without an error it becomes `folder`.

    Raises `Refused` while another process is at work on the same folder, and `Failed` when there
    is no space left; then, as with any error, `folder` stays as it was.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, what it points at is replaced
    partial = folder.parent / f".{folder.name}.partial"
    old = folder.parent / f".{folder.name}.old"
    with no_space_is_failure(folder.name), _locked(partial, folder) as is_ours:
        _recover(folder, old)
        _clear(partial)
        try:
            yield partial
            for file in [*partial.iterdir(), partial]:
                _fsync(file)
            if folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
            _fsync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            _recover(folder, old)
            if is_ours():
                shutil.rmtree(partial)
            raise


def recover(folder: Path) -> None:
    """Put back, or drop, what a writer that died left beside `folder`; nothing where none did."""
    folder = Path(os.path.realpath(folder))
    partial = folder.parent / f".{folder.name}.partial"
    old = folder.parent / f".{folder.name}.old"
    if partial.exists() or old.exists():
        with _locked(partial, folder):
            _recover(folder, old)
            shutil.rmtree(partial)


@contextlib.contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[Callable[[], bool]]:
    """Hold the lock; yields whether `partial` is still the folder that was locked."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    in_use = Refused(
        f"Another command is at work on {folder}",
        cure="wait until it has ended, then run the same command again",
    )

    def is_ours() -> bool:
        return partial.exists() and os.path.samestat(partial.stat(), os.fstat(lock))

    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        # Between open and lock, its owner may have finished and renamed it to the final name.
        if not is_ours():
            raise in_use
        yield is_ours
    finally:
        os.close(lock)


def _clear(partial: Path) -> None:
    """Drop what a writer that died has left."""
    for leftover in partial.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _recover(folder: Path, old: Path) -> None:
    """Put the old content back where a writer died between the two renames, else drop it."""
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
