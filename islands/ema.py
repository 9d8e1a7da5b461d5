"""Exponential averages of the weights over several horizons (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averages:
    """One average of the parameters per decay, updated together."""

    def __init__(self, parameters: Sequence[nn.Parameter], decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        self._parameters = [p.detach() for p in parameters]
        self._averaged = [[p.detach().clone() for p in parameters] for _ in decays]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move each average towards the parameters, after step number `step`.

        Warmed up, so that a short training is not averaged with its random start.
        """
        for decay, averaged in zip(self.decays, self._averaged, strict=True):
            torch._foreach_lerp_(
                averaged, self._parameters, 1 - min(decay, (1 + step) / (10 + step))
            )

    @torch.no_grad()
    def publish(self, index: int) -> None:
        """Give the parameters the values of one average."""
        torch._foreach_copy_(self._parameters, self._averaged[index])

    @contextmanager
    def shown(self, index: int) -> Iterator[None]:
        """Lend the parameters the values of one average; theirs come back, bit for bit."""
        theirs = [p.clone() for p in self._parameters]
        self.publish(index)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, theirs)

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint."""
        return {
            f"average-{index}/{name}": value
            for index, averaged in enumerate(self._averaged)
            for name, value in zip(names, averaged, strict=True)
        }

    @torch.no_grad()
    def restore(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave, put back."""
        for index, averaged in enumerate(self._averaged):
            for name, value in zip(names, averaged, strict=True):
                value.copy_(tensors[f"average-{index}/{name}"])
