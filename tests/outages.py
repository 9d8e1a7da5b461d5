"""Stores that are away for a while, a disk that is full, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

When = Literal["before", "after"] | None
"""Whether a request fails before it did anything, after it did all (its answer is lost), or not."""
Rule = Callable[[str, str], When]
"""Of a request's name and its path."""


class ClientError(Exception):
    """As the client of an object store raises: of no kind that we know."""


_ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: ConnectionResetError("the store is away"),
    lambda: ClientError("the store is away"),
    lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
)


class Away(MemoryFileSystem):
    """Memory as a store whose requests fail by a rule; each is one, whatever it is made of."""

    protocol = "away"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    find = AbstractFileSystem.find  # as of most filesystems, and blind to what goes wrong
    rule: ClassVar[Rule]
    failed: ClassVar[Counter[tuple[str, str]]] = Counter()
    _inside: ClassVar[threading.local] = threading.local()
    _kinds: ClassVar[Iterator[int]] = itertools.count()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).replace("away://", "memory://")))

    @classmethod
    def request(cls, name: str, path: str, act: Callable[[], Any]) -> Any:
        if getattr(cls._inside, "on", False):
            return act()
        path = cls._strip_protocol(path)
        when = cls.rule(name, path)
        cls._inside.on = True
        try:
            found = None if when == "before" else act()
        finally:
            cls._inside.on = False
        if when is not None:
            cls.failed[name, path] += 1
            raise _ERRORS[next(cls._kinds) % len(_ERRORS)]()
        return found

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if getattr(self._inside, "on", False):
            return super().open(path, mode, **options)
        # As on an object store: what is written arrives with the end, whole or not at all.
        return _Upload(self, path, mode)

    def put(self, path: str, mode: str, data: bytes) -> None:
        with super().open(path, mode) as file:
            file.write(data)


class _Upload(io.BytesIO):
    def __init__(self, store: Away, path: str, mode: str) -> None:
        super().__init__()
        self._end: Callable[[bytes], None] | None = lambda data: Away.request(
            f"open {mode}", path, lambda: store.put(path, mode, data)
        )

    def close(self) -> None:
        end, self._end = self._end, None
        data = b"" if self.closed else self.getvalue()
        super().close()
        if end is not None:
            end(data)


def _requests(name: str, place: int = 0) -> None:
    plain = getattr(MemoryFileSystem, name)

    def asked(self: Away, *given: Any, **options: Any) -> Any:
        said = f"{name} {options['mode']}" if "mode" in options else name
        return Away.request(said, given[place], lambda: plain(self, *given, **options))

    setattr(Away, name, asked)


for _name in ("info", "ls", "cat_file", "pipe_file", "makedirs", "rm"):
    _requests(_name)
_requests("put_file", 1)


def each_twice() -> Rule:
    """Every request of every file fails before it did anything, then after, and then no more."""
    lock, met = threading.Lock(), Counter[tuple[str, str]]()

    def rule(request: str, path: str) -> When:
        with lock:
            met[request, path] += 1
            return {1: "before", 2: "after"}.get(met[request, path])  # type: ignore[return-value]

    return rule


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("atoll")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[], Callable[[], None]]]:
    """A disk of its own at a folder; what fills it to the last byte, and that what frees it."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")

    def fill() -> Callable[[], None]:
        with (place / "filler").open("wb", buffering=0) as file:
            for length in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(length)):
                        pass
        return (place / "filler").unlink

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
