"""Whose turn it is: which bucket each batch of a stream is of, and which of its rows.

A network takes a batch of one shape. Records of several are therefore drawn in batches that take
turns: in an epoch every bucket has as many as its records fill, in an order of the epoch's own, and
within a bucket every record comes once before any comes again. Which rows stand at a position is a
function of (seed, stream, position), as everything here: no count is carried along.

A bucket's records seldom fill whole batches. What is left over is not dropped but owed: bucket k of
n_k records has had floor((e n_k + o_k) / batch) batches after e epochs, o_k a seeded offset below
batch. So it is never a batch or more away from its due e n_k, and by the offset it has its due on
average over seeds, a bucket smaller than a batch as well (systematic sampling).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.core import seeds
from atoll.core.buckets import Bucket


@dataclass(frozen=True)
class Turns:
    """The turns of buckets of some sizes in the batches of the stream (seed, words)."""

    sizes: tuple[int, ...]
    batch: int
    seed: int
    words: tuple[str, ...]

    def at(self, turn: int) -> tuple[int, int]:
        """Which bucket batch number `turn` is of, and how many of its batches came before."""
        batches = turn + 1 + len(self.sizes)  # by then even the latest bucket has had its turn
        most = -(-batches * self.batch // sum(self.sizes))
        epoch = bisect_right(range(most + 1), turn, key=lambda e: sum(self._had(e))) - 1
        before = self._had(epoch)
        bucket, within = (int(each[turn - sum(before)]) for each in _epoch(self, epoch))
        return bucket, before[bucket] + within

    def _had(self, epochs: int) -> list[int]:
        """How many batches each bucket has had after some epochs."""
        due = zip(self.sizes, _offsets(self), strict=True)
        return [(epochs * size + offset) // self.batch for size, offset in due]

    def counts(self, epoch: int) -> list[int]:
        """How many batches each bucket has in an epoch: its records over the batch, or one more."""
        return [b - a for a, b in zip(self._had(epoch), self._had(epoch + 1), strict=True)]


@lru_cache(maxsize=64)
def _offsets(turns: Turns) -> tuple[int, ...]:
    drawn = seeds.uniform(turns.seed, *turns.words, "owed", first=0, count=len(turns.sizes))
    return tuple(int(share) for share in drawn[:, 0] * turns.batch)


@lru_cache(maxsize=16)
def _epoch(turns: Turns, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each batch of an epoch its bucket, and how many of that bucket's came in it before."""
    counts = turns.counts(epoch)
    n = sum(counts)
    order = seeds.order(turns.seed, *turns.words, "turns", epoch, first=0, count=n, n=n)
    buckets = np.repeat(np.arange(len(counts)), counts)[order]
    within = np.empty(n, dtype=np.int64)
    for bucket, count in enumerate(counts):
        within[buckets == bucket] = np.arange(count)
    return buckets, within


def places(
    buckets: Sequence[Bucket], seed: int, *words: str, first: int, count: int, batch: int | None
) -> Tensor:
    """The rows `(count,)` at positions `first` onwards of a stream over some buckets.

    Of one bucket that is its records in endless epochs, whatever the batch. Of several, `batch`
    positions, from each multiple of `batch` on, are of one.
    """
    if len(buckets) == 1:
        order = seeds.order(seed, *words, first=first, count=count, n=len(buckets[0]))
        return buckets[0].rows(torch.from_numpy(order))
    assert batch is not None, "a batch of one shape needs to know how large it is"
    turns = Turns(tuple(map(len, buckets)), batch, seed, words)
    found, end = [], first + count
    while first < end:
        turn, within = divmod(first, batch)
        index, before = turns.at(turn)
        bucket, here = buckets[index], min(end, (turn + 1) * batch) - first
        order = seeds.order(
            seed,
            *words,
            bucket.picture.size,
            first=before * batch + within,
            count=here,
            n=len(bucket),
        )
        found.append(bucket.rows(torch.from_numpy(order)))
        first += here
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)
