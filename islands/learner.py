"""A network that learns: in one process, as one of several replicas, or in shards.

The loop and the step see plain tensors: `parameters` are what this rank updates, averages and
saves, and after the last `backward` of a batch their gradients are the sums over all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from atoll.core.checkpoint import WHOLE, Piece
from atoll.islands.group import Group

Parallel = Literal["ddp", "fsdp"]

# Enough for a link to be busy, and few enough bytes that most of them go while backward still runs.
_BUCKET_BYTES = 25 << 20


class Learner:
    """One process holds everything."""

    parallel = "none"
    piece = WHOLE

    def __init__(self, module: nn.Module, group: Group | None = None) -> None:
        self.group = group or Group()
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; with the `last` part of a batch they become the group's."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`; the norm before, of all ranks."""
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    def whole(self) -> nn.Module:
        """The network, whole, with the values of now."""
        return self.module


class Replica(Learner):
    """Every rank holds everything; gradients are summed while backward still runs (DDP).

    Li et al. 2020, arXiv 2006.15704, section 3.2. Not torch's own `DistributedDataParallel`: it
    lays out its buckets anew after the first step, and the order of a sum over more than two ranks
    depends on the layout, so that a resumed training would not be bitwise the undisturbed one.
    """

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

    def send(self) -> None:
        # A parameter that this loss does not reach has no gradient, on any rank.
        self._gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._gradients:
            self._flat = torch.cat([gradient.flatten() for gradient in self._gradients])
            self._work = dist.all_reduce(self._flat, async_op=True)

    def receive(self) -> None:
        self.waits_for = len(self.parameters)
        if self._gradients:
            self._work.wait()
            parts = torch.split(self._flat, [gradient.numel() for gradient in self._gradients])
            for gradient, part in zip(self._gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        del self._gradients


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


class Shard(Learner):
    """Every rank holds a part of every tensor, and with it of the optimiser and the averages.

    FSDP2 (Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`): a block is whole while it
    computes, and its gradient is summed where its part is. `parameters` are this rank's parts as
    plain tensors, in the same memory as torch's sharded ones.
    """

    parallel = "fsdp"

    def __init__(self, module: nn.Module, group: Group, device: torch.device) -> None:
        self._whole = copy.deepcopy(module)
        mesh = init_device_mesh(device.type, (group.world,))
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        # The root too gives up its whole parameters after forward: without a backward behind it
        # (a held-out loss) it would keep them, and know nothing of another average put in.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # A sum and no mean: shares of a batch need not be equal.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        super().__init__(module, group)
        self.piece = Piece(group.rank, group.world)
        self._sharded = self.parameters
        self.parameters = [nn.Parameter(_local(p).detach()) for p in self._sharded]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        super().backward(loss, last=last)
        if last:
            for own, sharded in zip(self.parameters, self._sharded, strict=True):
                own.grad = None if sharded.grad is None else _local(sharded.grad)
                sharded.grad = None

    def clip(self, limit: float) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.group.sum(nn.utils.get_total_norm(gradients).square()).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    @torch.no_grad()
    def whole(self) -> nn.Module:
        values = dict(self.module.named_parameters())
        for name, parameter in self._whole.named_parameters():
            value = values[name]
            parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        return self._whole


def _local(sharded: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory."""
    assert isinstance(sharded, DTensor)
    local: Tensor = sharded.to_local()
    return local


def _blocks(module: nn.Module) -> list[nn.Module]:
    """What a network repeats: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += child if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def learner_of(
    module: nn.Module, group: Group, parallel: Parallel, device: torch.device
) -> Learner:
    """The learner of a network on its device, for this rank of a group."""
    if group.world == 1:
        return Learner(module, group)
    return Replica(module, group) if parallel == "ddp" else Shard(module, group, device)
