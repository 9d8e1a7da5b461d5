"""What the tests of core share: storages, threads, and a process that dies at every step."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core.conditioning import Conditioning
from atoll.core.storage import Storage

DONE = 0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage, on each kind of filesystem that is tested."""
    if request.param == "local":
        yield Storage(tmp_path / "run")
    else:
        place = Storage(f"memory://{uuid.uuid4().hex}")
        yield place
        place.remove("")


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
