"""The processes that train one expert together, and what they tell each other.

A batch is divided by position and everything random is a function of position (`data.py`), so the
parts of all ranks are the very batch that one process would have seen. Whatever decides how the
training goes on (stop, commit, go back) is agreed upon first, so that all ranks do it at the same
step. Of one process nothing here communicates.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# A rank may wait for another one's storage, whose outages are ridden out for an hour.
_PATIENCE = timedelta(hours=2)


class Group:
    """One process by itself: rank 0 of 1. `leave` is set when this process is asked to stop."""

    rank = 0
    world = 1

    def __init__(self) -> None:
        self.leave = threading.Event()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def alone(self) -> Group:
        """This process by itself, asked to stop by the same flag."""
        group = Group()
        group.leave = self.leave
        return group

    def share(self, first: int, count: int) -> tuple[int, int]:
        """This rank's part of the images `first` to `first + count - 1`: its first, and how many.

        Parts are as equal as can be; over all ranks they are the whole, once.
        """
        begin, end = (count * (self.rank + more) // self.world for more in (0, 1))
        return first + begin, end - begin

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        return flags

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        return [value]

    def gather_files(self, value: T) -> list[T]:
        """`gather` for the thread that writes checkpoints, beside the training's own."""
        return [value]


class Ranks(Group):
    """The processes of torch's default process group, which has been set up already."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        # Words go by gloo, whatever gradients go by; a group each for two threads, since the calls
        # of one group must come in the same order on all ranks.
        self._words, self._files = _gloo(), _gloo()

    def sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._words)
        return tuple(bool(flag) for flag in told.tolist())

    def gather(self, value: T) -> list[T]:
        return _gathered(value, self._words)

    def gather_files(self, value: T) -> list[T]:
        return _gathered(value, self._files)


def _gloo() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
    return group


def _gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
