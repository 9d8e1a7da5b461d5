"""Fully sharded: every rank holds a part of every tensor, of the optimiser and of the averages.

FSDP2 (Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`): a block is whole while it
computes, and its gradient is summed where its part is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from atoll.core.checkpoint import Piece
from atoll.islands.group import Group
from atoll.islands.learner import Learner


class Shard(Learner):
    """One rank's parts; `parameters` are they as plain tensors, in the memory of torch's own."""

    parallel = "fsdp"

    def __init__(self, module: nn.Module, group: Group, device: torch.device) -> None:
        # Its outline alone: a second network beside the first has no room either.
        meta = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
        self._whole = copy.deepcopy(module, meta)
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
        # Summed with every part of a batch: a whole gradient that waits for the last part would
        # take the memory that sharding is for.
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
        values = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu")
            for name, value in self.module.named_parameters()
        }
        self._whole.load_state_dict(values, strict=False, assign=True)
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
