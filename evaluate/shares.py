"""Which shard a picture belongs to, and how far a system's shares of shards are from the real ones.

A truncated routing starves small shards while a Frechet distance hardly moves, so shares are
reported beside every quality figure, and real held-out records are measured by the same instrument:
the nearest centre in the encoder's space. Total variation is never negative and therefore never 0
at finite N; the noise level beside it is what two samples of one and the same law would show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from atoll.core import seeds
from atoll.evaluate.metrics import Estimate

_REPEATS = 1000


@dataclass(frozen=True)
class Instrument:
    """Unit centres `(shard, dim)` of the shards `names`."""

    names: tuple[str, ...]
    centres: Tensor

    def nearest(self, features: Tensor) -> Tensor:
        """The shard of each row of `features` `(n, dim)`, by cosine, `(n,)`."""
        unit = functional.normalize(features.double(), dim=1)
        return (unit @ self.centres.double().T).argmax(dim=1)

    def count(self, features: Tensor) -> Tensor:
        """How many rows belong to each shard, `(shard,)`."""
        return torch.bincount(self.nearest(features), minlength=len(self.names))

    def own(self, features: Tensor, shards: Sequence[str]) -> dict[str, float]:
        """Of the rows of each shard, the part that is read as its own; others' names are left out.

        One centre stands for a shard: where its contents are unlike each other this is little, and
        shares of that shard, real or generated, are not what they seem.
        """
        read = [self.names[index] for index in self.nearest(features).tolist()]
        of = Counter(shard for shard in shards if shard in self.names)
        right = Counter(mine for mine, found in zip(shards, read, strict=True) if mine == found)
        return {name: right[name] / of[name] for name in self.names if of[name]}


def from_centroids(names: tuple[str, ...], centroids: Tensor) -> Instrument:
    """The partition's own centroids `(shard, dim)`."""
    return Instrument(names, functional.normalize(centroids.double(), dim=1))


def from_records(features: Mapping[str, Tensor]) -> Instrument:
    """The mean direction of each shard's training records, for shards that are owners."""
    means = [functional.normalize(rows.double(), dim=1).mean(dim=0) for rows in features.values()]
    return from_centroids(tuple(features), torch.stack(means))


class Shares(BaseModel):
    """Pictures per shard, of a system and of the reference, and their total variation distance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    counts: dict[str, int]
    reference: dict[str, int]
    distance: Estimate
    noise_level: float  # mean distance of two samples of these sizes from one common law


def compare(names: tuple[str, ...], counts: Tensor, reference: Tensor, *, seed: int) -> Shares:
    """Total variation distance of two vectors of counts `(shard,)`, with a bootstrap interval.

    Resampled distances are too large by what resampling adds, so the interval takes their spread
    about their mean and puts it about the distance that was found.
    """
    n, m = int(counts.sum()), int(reference.sum())
    found = float(_total_variation(counts, reference))
    drawn = _total_variation(
        _redraw(counts, n, seed, "generated"), _redraw(reference, m, seed, "reference")
    )
    low, high = (drawn - drawn.mean() + found).quantile(drawn.new_tensor([0.025, 0.975])).tolist()
    pooled = counts + reference
    noise = _total_variation(_redraw(pooled, n, seed, "null"), _redraw(pooled, m, seed, "null", 1))
    return Shares(
        counts=dict(zip(names, counts.tolist(), strict=True)),
        reference=dict(zip(names, reference.tolist(), strict=True)),
        distance=Estimate(value=found, low=max(0.0, low), high=min(1.0, high), n=n, n_reference=m),
        noise_level=float(noise.mean()),
    )


def _total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the absolute difference of shares, over the last dimension of two sets of counts."""
    a, b = a.double(), b.double()
    return (a / a.sum(-1, keepdim=True) - b / b.sum(-1, keepdim=True)).abs().sum(-1) / 2


def _redraw(counts: Tensor, n: int, seed: int, *words: str | int) -> Tensor:
    """Multinomial redraws of `n` pictures from the shares of `counts`, `(repeats, shard)`."""
    generator = seeds.generator(seed, "evaluate", "shares", *words)
    weights = (counts.double() / counts.sum()).expand(_REPEATS, -1)
    drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
    return torch.zeros(_REPEATS, len(counts), dtype=torch.long).scatter_add_(
        1, drawn, torch.ones_like(drawn)
    )
