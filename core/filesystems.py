"""What fsspec's filesystems are asked where their own answer would not do.

Their `exists` takes any error for an answer, and the walk that most of them list by takes a folder
which it cannot read for an empty one: an outage would look like no commits, and to a writer like
its heir. Their exclusive `pipe_file` is not exclusive on local files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from atoll.core.disk import fsync, temporary_file

T = TypeVar("T")

_CREATING = threading.Lock()
_ABSENT = (FileNotFoundError, NotADirectoryError)


def is_there(fs: Any, path: str) -> bool:
    """Whether there is a file or folder; raises what else goes wrong."""
    try:
        fs.info(path)
    except _ABSENT:
        return False
    return True


def files_below(fs: Any, path: str) -> Iterator[str]:
    """Every file below a folder, or the file; raises what else goes wrong."""
    if _finds(fs):
        if is_there(fs, path):
            yield from fs.find(path)
        return
    try:
        entries = fs.ls(path, detail=True)
    except _ABSENT:
        return
    for entry in entries:
        if entry["type"] != "directory":
            yield entry["name"]
        elif entry["name"].rstrip("/") != path.rstrip("/"):
            yield from files_below(fs, entry["name"])


def _finds(fs: Any) -> bool:
    """Whether it lists what is below a place in its own way, as object stores do."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find


def in_folder(fs: Any, path: str, write: Callable[[], T]) -> T:
    """Write; where a folder is missing, make it and write again.

    Not the other way round: object stores have none and would be asked for their bucket, which
    credentials for a prefix of it do not cover.
    """
    try:
        return write()
    except FileNotFoundError:
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        return write()


def create_alone(fs: Any, path: str, data: bytes) -> None:
    """Create a file, complete and exclusively; FileExistsError when it is already there."""
    if not isinstance(fs, LocalFileSystem):
        # `memory://` looks and writes in two steps, between which a thread may come.
        with _CREATING:
            _create_afar(fs, path, data)
        return
    # A link is exclusive and shows the whole content at once; open("xb") shows a torn one.
    with temporary_file(Path(path)) as temporary:
        temporary.write_bytes(data)
        fsync(temporary)
        os.link(temporary, path)
        fsync(Path(path).parent)


def _create_afar(fs: Any, path: str, data: bytes) -> None:
    # Nobody looks first whether it is there: the store alone can say so, and whether it does is
    # what a probe finds out. Not open("xb"), which s3fs lets replace a file by an empty one.
    try:
        in_folder(fs, path, lambda: fs.pipe_file(path, data, mode="create"))
    except OSError as error:
        # Some stores say no more than that a condition did not hold, others had no time to answer.
        if is_there(fs, path):
            raise FileExistsError(path) from error
        raise
