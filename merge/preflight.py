"""What can be told of a soup before it is made: how far its ingredients went, and whether together.

Reads the ingredients, and their base if it is named, once; writes nothing. Averaging wants small
moves from one base that do not fight one another: a move's norm beside the base's, the cosines
between moves (near 0 where shards have taught different things, below it where they pull apart),
and the distances between ingredients, which need no base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.core.errors import Refused, UsageError
from atoll.core.pack import Pack
from atoll.merge.barrier import Barrier, measure_barrier
from atoll.merge.far import Place
from atoll.merge.grams import grams
from atoll.merge.ingredients import Opened, open_base
from atoll.merge.recipe import Recipe, Settings
from atoll.merge.soup import prepare


@dataclass(frozen=True)
class Check:
    """All that is said before a soup is made; `opened` in the order of the recipe."""

    opened: list[Opened]
    recipe: Recipe
    comparison: Comparison
    barrier: Barrier | None


@dataclass(frozen=True)
class Comparison:
    """Ingredients beside each other, in the order they came in; all measured over all floats.

    None is a quotient by 0.
    """

    elements: int
    base_norm: float | None  # Euclidean; None without a base, and so are the two below
    moves: (
        list[float | None] | None
    )  # norm of each ingredient's difference to the base, over the base's
    cosines: list[list[float | None]] | None  # between those differences
    distances: list[list[float | None]]  # between ingredients, over the mean of their norms


def check(
    out: Place,
    experts: Mapping[Place, int],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    base: Place | None = None,
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
    pack: Path | None = None,
) -> Check:
    """Refuse what `create` would, and measure the rest.

    Losses are measured on the records of a run's `pack` if there is one.
    """
    opened, recipe = prepare(out, experts, settings, base=base, negative=negative, names=names)
    if opened[0].model.is_adapter:
        raise Refused("Adapters are not compared", cure="leave out --check, or compare the models")
    if pack is not None and recipe.variant is not None:
        raise UsageError("Losses are measured without --variant", cure="leave out one of the two")
    start = None if base is None else open_base(base, opened[0], recipe.variant)
    barrier = None if pack is None else measure_barrier(opened, Pack(pack))
    return Check(opened, recipe, compare(opened, start), barrier)


def compare(opened: Sequence[Opened], base: Opened | None = None) -> Comparison:
    """Measure ingredients that are alike (`check_alike`), and a base that is like them."""
    every = [*([] if base is None else [base]), *opened]
    found = grams([one.model for one in every]).values()
    if not found:
        raise Refused("There is no tensor of floats to compare")
    gram = torch.stack([each.moves for each in found]).sum(dim=0)
    squares = torch.stack([each.squares for each in found]).sum(dim=0)
    elements = sum(each.elements for each in found)
    return _comparison(elements, gram, squares, has_base=base is not None)


def _comparison(elements: int, gram: Tensor, squares: Tensor, *, has_base: bool) -> Comparison:
    lengths, norms = gram.diagonal().sqrt(), squares.sqrt()
    moves = cosines = None
    if has_base:
        moves = _over(lengths, norms[0])
        cosines = [
            _over(row.clamp(-all_, all_), all_) for row, all_ in _with_lengths(gram, lengths)
        ]
    else:  # the first ingredient stands at the origin
        gram = torch.nn.functional.pad(gram, (1, 0, 1, 0))
    own = norms[1:] if has_base else norms
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    means = (own[:, None] + own) / 2
    return Comparison(
        elements=elements,
        base_norm=float(norms[0]) if has_base else None,
        moves=moves,
        cosines=cosines,
        distances=[
            _over(row, mean) for row, mean in zip(square.clamp(min=0).sqrt(), means, strict=True)
        ],
    )


def _with_lengths(gram: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every row of inner products, and what they would be of parallel moves."""
    return list(zip(gram, lengths[:, None] * lengths, strict=True))


def _over(above: Tensor, below: Tensor) -> list[float | None]:
    """Quotients, None where there is none."""
    return [each if math.isfinite(each) else None for each in (above / below).tolist()]
