"""Processes that are ranks of one gloo group, as a launcher would make them; started once."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from atoll.islands.group import Ranks
from tests.waiting import PATIENCE_SECONDS

_HERE = "127.0.0.1"


class Pool:
    """Some ranks that wait for work."""

    def __init__(self, world: int) -> None:
        # Listens from now on: a port that was only found to be free may be somebody else's by then.
        self._meeting = dist.TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = spawn.Pipe()
            given = (theirs, rank, world, self._meeting.port)
            process = spawn.Process(target=_wait, args=given, daemon=True)
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
                answers.append(pipe.recv() if pipe.poll(PATIENCE_SECONDS) else TimeoutError())
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
            process.join()


def _wait(orders: Connection, rank: int, world: int, port: int) -> None:
    patience = timedelta(seconds=PATIENCE_SECONDS)
    meeting = dist.TCPStore(_HERE, port, is_master=False, timeout=patience)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=patience)
    with contextlib.suppress(EOFError):
        while True:
            work, given = orders.recv()
            try:
                orders.send(work(Ranks(), *given))
            except Exception as error:
                traceback.print_exc()
                orders.send(error)
