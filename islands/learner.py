"""A network that learns: in one process, as one of several replicas, or in shards.

The loop and the step see plain tensors: `parameters` are what this rank updates, averages and
saves, and after the last `backward` of a batch their gradients are the sums over all ranks.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from atoll.core.checkpoint import WHOLE
from atoll.islands.group import Group

Parallel = Literal["ddp", "fsdp"]


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
