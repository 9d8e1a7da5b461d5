"""Processes that are ranks of one gloo group, as a launcher would make them; started once."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from atoll.islands.group import Ranks

_PATIENCE_SECONDS = 300


class Pool:
    """Some ranks that wait for work."""

    def __init__(self, world: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_wait, args=(theirs, rank, world, where), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def send(self, work: Callable[..., Any], *given: Any) -> None:
        """Begin `work(group, *given)` on every rank."""
        for pipe in self._pipes:
            pipe.send((work, given))

    def receive(self) -> list[Any]:
        """What it returned on each rank, or the exception that it raised there."""
        answers: list[Any] = []
        for pipe in self._pipes:
            try:
                answers.append(pipe.recv() if pipe.poll(_PATIENCE_SECONDS) else TimeoutError())
            except EOFError as error:  # it was killed
                answers.append(error)
        return answers

    def run(self, work: Callable[..., Any], *given: Any) -> list[Any]:
        self.send(work, *given)
        return self.receive()


@contextlib.contextmanager
def pool(world: int) -> Iterator[Pool]:
    ranks = Pool(world)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()


def _wait(orders: Connection, rank: int, world: int, where: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=_PATIENCE_SECONDS)
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=world, timeout=patience
    )
    with contextlib.suppress(EOFError):
        while True:
            work, given = orders.recv()
            try:
                orders.send(work(Ranks(), *given))
            except Exception as error:
                traceback.print_exc()
                orders.send(error)
