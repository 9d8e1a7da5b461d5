"""Embedded conditioning: CLIP text tokens with their mask and pooled vector, and the empty value.

Written by the partitioner into packs, read by islands and by sampling. `cond_null` is the
embedding of the empty caption; condition dropout replaces whole rows by it, on our side and never
inside a model (promise 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """A batch of embedded captions.

    `tokens` `(batch, length, width)`, `mask` `(batch, length)` True where a token counts,
    `pooled` `(batch, dim)`, `is_null` `(batch,)` True where the caption is the empty one.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    is_null: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """Rows picked by index, mask or slice."""
        return Conditioning(
            self.tokens[index], self.mask[index], self.pooled[index], self.is_null[index]
        )

    def to(self, like: Tensor) -> Conditioning:
        """On the device of `like` and in its floating dtype."""
        return Conditioning(
            self.tokens.to(like),
            self.mask.to(like.device),
            self.pooled.to(like),
            self.is_null.to(like.device),
        )

    def expand(self, batch: int) -> Conditioning:
        """A single row repeated `batch` times."""
        return self[torch.zeros(batch, dtype=torch.long, device=self.tokens.device)]

    def dropped(self, drop: Tensor, null: Conditioning) -> Conditioning:
        """Rows where `drop` `(batch,)` is True replaced by `null` (one row)."""
        rows = torch.where(drop, 0, torch.arange(1, len(self) + 1, device=drop.device))
        return concatenate([null, self])[rows]


def is_empty(mask: Tensor) -> Tensor:
    """Which captions are the empty one, `(batch,)`, by the masks of their tokens.

    Start and end of text alone: "" and whatever the tokenizer takes for it, such as blanks.
    """
    return mask.sum(dim=1) <= 2


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Batches one after another."""
    return Conditioning(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat([part.pooled for part in parts]),
        torch.cat([part.is_null for part in parts]),
    )
