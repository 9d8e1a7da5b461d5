"""The mean of adapters at a smaller rank: the nearest product of that rank, and how near it is.

By Eckart and Young (Psychometrika 1, 1936) the nearest to `M = B A` of rank r is its singular value
decomposition cut off there. M is never formed: with B = Q_1 R_1 and A' = Q_2 R_2 what is decomposed
is R_1 R_2', which has as many rows as the adapters have ranks together. In float64; processors
differ in its last bits, so that such a mean is verified by its distance, and not bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""A `(rank, inputs...)` and B `(outputs, rank, ...)` of a layer, whose mean is B A."""


@dataclass(frozen=True)
class Truncated:
    """Factors by layer, and their distance from the mean over its norm, all layers together."""

    factors: dict[str, Factors]
    error: float


def truncate(layers: Mapping[str, Factors], rank: int) -> Truncated:
    """Cut every layer off at `rank`, in the dtype that it has."""
    cut = {stem: _cut(down, up, rank) for stem, (down, up) in layers.items()}
    return Truncated(cut, distance(layers, cut))


def distance(layers: Mapping[str, Factors], others: Mapping[str, Factors]) -> float:
    """How far products are from those of the first: the Frobenius norms of all, as one quotient."""
    whole = sum(_square(down, up) for down, up in layers.values())
    # B A - D C = [B, -D] [A; C], which loses nothing to cancellation but what B A itself has.
    apart = sum(
        _square(
            torch.cat([down.double(), others[stem][0].double()]),
            torch.cat([up.double(), -others[stem][1].double()], dim=1),
        )
        for stem, (down, up) in layers.items()
    )
    return math.sqrt(apart / whole) if whole else 0.0


def _cut(down: Tensor, up: Tensor, rank: int) -> Factors:
    left, one = torch.linalg.qr(up.double().flatten(1))
    right, other = torch.linalg.qr(down.double().flatten(1).T)
    u, s, v = torch.linalg.svd(one @ other.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    ups, downs = left @ (u[:, :kept] * root), (v[:kept] * root[:, None]) @ right.T
    # Of the two signs of every pair that in which A begins with a positive number.
    largest = downs.gather(1, downs.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    downs, ups = downs * sign, ups * sign.T
    return (
        downs.to(down.dtype).reshape(kept, *down.shape[1:]),
        ups.to(up.dtype).reshape(up.shape[0], kept, *up.shape[2:]),
    )


def _square(down: Tensor, up: Tensor) -> float:
    """The squared Frobenius norm of B A."""
    _, one = torch.linalg.qr(up.double().flatten(1))
    _, other = torch.linalg.qr(down.double().flatten(1).T)
    return float((one @ other.T).square().sum())
