"""What the tests of core share: storages, threads, and a process that dies at every step."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from atoll.core import outage
from atoll.core.conditioning import Conditioning
from atoll.core.storage import Storage

DONE = 0
T = TypeVar("T")


# For what a slower store has no part in.
near = pytest.mark.parametrize("storage", ["local", "memory"], indirect=True)


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage, on each kind of filesystem that is tested."""
    if request.param == "local":
        yield Storage(tmp_path / "run")
        return
    if request.param == "s3":
        request.getfixturevalue("s3")
    place = Storage(f"{'s3://runs/' if request.param == 's3' else 'memory://'}{uuid.uuid4().hex}")
    yield place
    place.remove("")


class Flaky(MemoryFileSystem):
    """Memory as a store that is slow, that goes away, and that garbles what it sends."""

    protocol = "flaky"
    seconds: ClassVar[float] = 0.0
    failures: ClassVar[int] = 0  # reads that fail from now on
    garbled: ClassVar[int] = 0
    reads: ClassVar[list[tuple[str, int | None]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        time.sleep(Flaky.seconds)
        Flaky.reads.append((path.rpartition("/")[2], start))
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise ConnectionError("the store is away")
        data = bytes(super().cat_file(path, start, end, **kwargs))
        if Flaky.garbled > 0:
            Flaky.garbled -= 1
            return bytes(len(data))
        return data


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    """A store at `flaky://` whose moods a test sets; nobody pauses long."""
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.01)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.reads.clear()
    yield Flaky
    Flaky.seconds, Flaky.failures, Flaky.garbled = 0.0, 0, 0
    Storage("flaky://").remove("")


def at_once(work: Callable[[int], T], count: int) -> list[T]:
    """What `work(0)`, `work(1)`, ... return, each in a thread of its own, begun together."""
    start = threading.Barrier(count)

    def begin(number: int) -> T:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


@pytest.fixture
def killed_at_every_step() -> Callable[..., Iterator[bool]]:
    """`for ended in killed_at_every_step(prepare, act)`: see `_killed_at_every_step`."""
    return _killed_at_every_step


def _killed_at_every_step(
    prepare: Callable[[], Any], act: Callable[[], Any], *, stride: int = 1
) -> Iterator[bool]:
    """Run `act` in processes that get SIGKILL before their n-th filesystem call, n = 0, 1, ...

    `prepare` runs here before each; whether `act` came to its end is yielded after each, and the
    first that did is the last.
    """
    for step in itertools.count(0, stride):
        prepare()
        child = os.fork()
        if child == 0:
            try:
                _die_at(step)
                act()
            except BaseException as error:
                os.write(2, f"{type(error)}: {error}\n".encode())
                os._exit(1)
            os._exit(DONE)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == DONE
            yield True
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield False


def _die_at(step: int) -> None:
    calls = itertools.count()

    def hook(event: str, _arguments: object) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture
def cond() -> Callable[..., Conditioning]:
    """`cond(n, length=4, width=8, dim=8)`: made-up conditioning, row 0 cond_null."""

    def make(n: int, *, length: int = 4, width: int = 8, dim: int = 8) -> Conditioning:
        generator = torch.Generator().manual_seed(n)
        mask = torch.arange(length)[None] <= torch.arange(n)[:, None] % length
        tokens = torch.randn(n, length, width, generator=generator) * mask[:, :, None]
        pooled = torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)
        return Conditioning(tokens, mask, pooled, torch.arange(n) == 0)

    return make
