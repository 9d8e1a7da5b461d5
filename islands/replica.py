"""Data parallel: every rank holds everything, and gradients are summed while backward still runs.

Li et al. 2020, arXiv 2006.15704, section 3.2. Not torch's own `DistributedDataParallel`: it lays
out its buckets anew after the first step, and the order of a sum over more than two ranks depends
on the layout, so that a resumed training would not be bitwise the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atoll.islands.group import Group
from atoll.islands.learner import Learner

# Enough for a link to be busy, and few enough bytes that most of them go while backward still runs.
_BUCKET_BYTES = 25 << 20


class Replica(Learner):
    """One of several that start alike, and stay alike bit by bit."""

    parallel = "ddp"

    def __init__(self, module: nn.Module, group: Group) -> None:
        super().__init__(module, group)
        self._last = False
        self._next = 0  # the bucket that goes next: on every rank they go in the same order
        # Backward reaches the last layers first.
        self._buckets = _buckets(self.parameters[::-1])
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                told: Any = parameter
                told.register_post_accumulate_grad_hook(self._ready(bucket))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last
        super().backward(loss, last=last)
        if last:
            self._send(all_of_them=True)
            for bucket in self._buckets:
                bucket.receive()
            self._next = 0

    def _ready(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def count(_parameter: Tensor) -> None:
            if self._last:
                bucket.waits_for -= 1
                self._send()

        return count

    def _send(self, *, all_of_them: bool = False) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.waits_for and not all_of_them:
                return
            bucket.send()
            self._next += 1


class _Bucket:
    """Gradients that travel as one tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.waits_for = len(self.parameters)
        self._sent: tuple[list[Tensor], Tensor, dist.Work] | None = None

    def send(self) -> None:
        # A parameter that this loss does not reach has no gradient, on any rank.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sent = gradients, flat, dist.all_reduce(flat, async_op=True)

    def receive(self) -> None:
        self.waits_for = len(self.parameters)
        if self._sent is None:
            return
        gradients, flat, work = self._sent
        work.wait()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        self._sent = None


def _buckets(parameters: Sequence[nn.Parameter]) -> list[_Bucket]:
    """Neighbours together, until there is a bucket full."""
    filled: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size > _BUCKET_BYTES:
            filled.append([])
            size = 0
        filled[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return [_Bucket(each) for each in filled]
