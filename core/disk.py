"""What a local disk owes a run: content that appears whole, survives a kill, or says why not.

A file or folder grows under a hidden name beside its place, is synced, and takes its place in one
step. What killed writers leave is hidden too, and goes with the next writer or with a removal:
otherwise it would be data that nothing ever forgets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from atoll.core.errors import Failed, Refused

# Linux, renameat2(2): names relative to the working directory, swap the two.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_SOLE = "0" * 32


@contextlib.contextmanager
def no_space_is_failure(where: str) -> Iterator[None]:
    """Turn the operating system's "no space left" into an error with a cure (exit code 1)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands on the system's error as text alone.
        numbers = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in numbers and not any(
            f"(os error {number})" in str(error) for number in numbers
        ):
            raise
        raise Failed(
            f"No space left while writing {where}; nothing was half-written",
            cure="free some space and run the same command again, it resumes",
        ) from error


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write at, gone afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(
    folder: Path, *, alone: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """An empty folder to fill; when the block ends without an error it becomes `folder`, at once.

    What stood there stays until then, and after any error. `alone` says that the new content is
    made from the old: `Refused` while another such writer is at work on the folder. `check` raises
    where the folder is not to be replaced any more, and is asked last, when all is on the disk.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, what it points at is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        fresh = locks.enter_context(_hidden_folder(folder, alone=alone))
        recover(folder)
        for leftover in fresh.iterdir():
            drop(leftover)
        try:
            yield fresh
            for place in (fresh, *fresh.rglob("*")):
                follow_umask(place)
                fsync(place)
            if folder.exists():
                # Held until it is gone: under the hidden name it looks like a dead writer's.
                locks.enter_context(locked(folder))
            check()
            _put_in_place(fresh, folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        fsync(folder.parent)


def recover(path: Path) -> None:
    """Clear away what killed writers of a file or folder left beside it; nothing where none did."""
    path = Path(os.path.realpath(path))
    old = _old(path)
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (old, *path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}")):
        with contextlib.suppress(BlockingIOError), locked(leftover):
            drop(leftover)


def sweep(folder: Path) -> None:
    """`recover` everything below a folder."""
    for pattern in (f".*.{'[0-9a-f]' * 32}", ".*.old"):
        for left in list(folder.rglob(pattern)):
            recover(left.parent / left.name[1 : left.name.rindex(".")])


def drop(path: Path) -> None:
    """Remove a local file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def follow_umask(path: Path) -> None:
    """The permissions of something newly made: scratch folders and safetensors are private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def fsync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, suffix: str | None = None) -> Path:
    return path.parent / f".{path.name}.{suffix or uuid.uuid4().hex}"


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


@contextlib.contextmanager
def _hidden_folder(folder: Path, *, alone: bool) -> Iterator[Path]:
    """A locked hidden folder beside `folder`: one name for those who must be alone."""
    fresh = _hidden(folder, _SOLE if alone else None)
    try:
        with contextlib.suppress(FileExistsError):
            fresh.mkdir()
        with locked(fresh):
            yield fresh
    except BlockingIOError:
        raise Refused(
            f"Another command is at work on {folder}",
            cure="wait until it has ended, then run the same command again",
        ) from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder; BlockingIOError where another process does, or did until just now."""
    with contextlib.ExitStack() as closing:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            closing.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock, its owner may have finished and given it its final name.
            ours = os.path.samestat(path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise BlockingIOError(f"{path} is another's")
        yield


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Give `fresh` its final name, and drop what had it."""
    if not folder.exists():
        os.rename(fresh, folder)
        return
    gone = fresh
    if not _exchange(fresh, folder):
        # The filesystem cannot swap: between these two a kill leaves what `recover` puts back.
        old = _old(folder)
        os.rename(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            os.rename(old, folder)
            raise
        os.rename(old, gone := _hidden(folder))
    shutil.rmtree(gone, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system or the filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one))
