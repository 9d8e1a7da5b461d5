"""Model Stock: how near to the base each tensor's mean should lie, from the angles between moves.

For N experts that moved from a base with a mean cosine c between their moves, the point nearest to
the middle of where such experts lie is `t mean + (1 - t) base` with

    t = N c / (1 + (N - 1) c)

of each tensor (Jang et al. 2024, arXiv 2403.19522, equation 5). It is a mean of experts and base
with weights of its own in every tensor, so that it is written down as blocks of whole numbers and
computed as any soup: exactly, and removable by doing it again without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.merge.grams import grams
from atoll.merge.ingredients import Opened
from atoll.merge.recipe import Block

_PARTS = 1 << 12  # of which t is a whole number: finer than it is known, and coarser than rounding


def stock_blocks(experts: Sequence[Opened], base: Opened) -> list[Block]:
    """The weights of experts and base in every tensor of floats."""
    names = [one.ingredient.name for one in experts]
    found = grams([base.model, *(one.model for one in experts)])
    blocks = []
    for tensor, gram in found.items():
        part = round(ratio(gram.moves) * _PARTS)
        ours, theirs = part, (_PARTS - part) * len(names)
        common = math.gcd(ours, theirs)
        weights = dict.fromkeys(names, ours // common) | {base.ingredient.name: theirs // common}
        blocks.append(Block(tensors=tensor, weights=weights))
    return blocks


def ratio(moves: Tensor) -> float:
    """t, from the inner products of moves `(n, n)`; the mean itself where there is no angle."""
    count, lengths = len(moves), moves.diagonal().sqrt()
    if count < 2 or not bool(lengths.all()):
        return 1.0
    cosines = moves / lengths[:, None] / lengths
    others = ~torch.eye(count, dtype=torch.bool)
    # Where moves fight one another nothing of them is agreed on.
    cosine = min(max(float(cosines[others].mean()), 0.0), 1.0)
    return count * cosine / (1 + (count - 1) * cosine)
