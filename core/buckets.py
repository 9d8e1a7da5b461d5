"""Buckets: rows of a pack that share one shape, where a run's pictures have several.

A network takes a batch of one shape, so whoever draws rows draws them from one bucket at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.core.manifest import Picture


@dataclass(frozen=True)
class Bucket:
    """Rows of one shape, whose places are numbered from 0 as they stand in the pack."""

    picture: Picture
    runs: tuple[range, ...]

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def rows(self, places: Tensor) -> Tensor:
        """The row numbers `(n,)` of some places `(n,)`."""
        ends = torch.tensor([len(run) for run in self.runs]).cumsum(0)
        behind = torch.tensor([run.stop for run in self.runs]) - ends
        return places + behind[torch.bucketize(places, ends, right=True)]


def buckets_among(shapes: Sequence[tuple[range, Picture]], rows: range) -> list[Bucket]:
    """The buckets that some rows are of, in the order of their first; `shapes` are of all rows."""
    pictures: dict[str, Picture] = {}
    runs: dict[str, list[range]] = {}
    for run, picture in shapes:
        mine = range(max(run.start, rows.start), min(run.stop, rows.stop))
        if mine:
            pictures.setdefault(picture.size, picture)
            runs.setdefault(picture.size, []).append(mine)
    return [Bucket(picture, tuple(runs[size])) for size, picture in pictures.items()]
