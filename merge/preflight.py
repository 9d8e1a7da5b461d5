"""What can be told of a soup before it is made: how far its ingredients went, and whether together.

Reads the ingredients, and their base if it is named, once; writes nothing. Averaging wants small
moves from one base that do not fight one another: a move's norm beside the base's, the cosines
between moves (near 0 where shards have taught different things, below it where they pull apart),
and the distances between ingredients, which need no base.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.core.pack import Pack
from atoll.merge import exact
from atoll.merge.barrier import Barrier, measure_barrier
from atoll.merge.far import Place
from atoll.merge.ingredients import Opened, open_base
from atoll.merge.recipe import Recipe
from atoll.merge.soup import prepare
from atoll.merge.stream import stream
from atoll.merge.weights import Layout

_CHUNK = 1 << 16  # elements at a time, in float64


@dataclass(frozen=True)
class Check:
    """All that is said before a soup is made; `opened` in the order of the recipe."""

    opened: list[Opened]
    recipe: Recipe
    comparison: Comparison
    barrier: Barrier | None


@dataclass(frozen=True)
class Comparison:
    """Ingredients beside each other, in the order they came in; all measured over all floats."""

    elements: int
    base_norm: float | None  # Euclidean; None without a base, and so are the two below
    moves: list[float] | None  # norm of each ingredient's difference to the base, over the base's
    cosines: list[list[float | None]] | None  # between those differences; None where one is 0
    distances: list[list[float]]  # between ingredients, over the mean of their norms


def check(
    out: Path, experts: Mapping[Place, int], *, pack: Path | None = None, **options: Any
) -> Check:
    """Refuse what `create` would, with the same `options`, and measure the rest.

    Losses are measured on the records of a run's `pack` if there is one.
    """
    opened, recipe = prepare(out, experts, **options)
    if opened[0].model.is_adapter:
        raise Refused("Adapters are not compared", cure="leave out --check, or compare the models")
    base = options.get("base")
    start = None if base is None else open_base(base, opened[0], recipe.variant)
    barrier = None if pack is None else measure_barrier(opened, Pack(pack))
    return Check(opened, recipe, compare(opened, start), barrier)


def compare(opened: Sequence[Opened], base: Opened | None = None) -> Comparison:
    """Measure ingredients that are alike (`check_alike`), and a base that is like them."""
    models = [one.model for one in [*([] if base is None else [base]), *opened]]
    grams: list[Tensor] = []
    norms: list[Tensor] = []
    adding = threading.Lock()

    def look(_: str, values: Sequence[Tensor], __: Sequence[Tensor]) -> None:
        # Of differences to the first: inner products of the weights themselves would lose them.
        for start in range(0, len(values[0]), _CHUNK):
            wide = torch.stack([value[start : start + _CHUNK].double() for value in values])
            moved = wide[1:] - wide[0]
            with adding:
                grams.append(moved @ moved.T)
                norms.append(wide.square().sum(dim=1))

    elements = 0
    with ExitStack() as closing:
        for model in models:
            closing.enter_context(model)
        for file in models[0].weights:
            sources = [model.weights[file] for model in models]
            layouts = {n: each for n, each in sources[0].layout.items() if _averaged(each)}
            elements += sum(layout.count for layout in layouts.values())
            stream(sources, layouts, look, outs=[], what=f"comparing {file}")
    gram, squares = _total(grams, len(models) - 1), _total(norms, 0)
    return _comparison(elements, gram, squares, has_base=base is not None)


def _averaged(layout: Layout) -> bool:
    return layout.torch_dtype in exact.DTYPES


def _total(parts: list[Tensor], side: int) -> Tensor:
    """The sum, rounded once, so that it is the same whichever thread was the faster one."""
    if not parts:
        return torch.zeros(side, side, dtype=torch.float64)
    flat = torch.stack(parts).flatten(1).T.tolist()
    return torch.tensor([math.fsum(each) for each in flat], dtype=torch.float64).view_as(parts[0])


def _comparison(elements: int, gram: Tensor, squares: Tensor, *, has_base: bool) -> Comparison:
    lengths = gram.diagonal().sqrt()
    moves = cosines = None
    if has_base:
        moves = (lengths / squares[0].sqrt()).tolist()
        both = (gram / lengths[:, None] / lengths).clamp(-1, 1).tolist()
        cosines = [[None if math.isnan(each) else each for each in row] for row in both]
    else:  # the first ingredient stands at the origin
        gram = torch.nn.functional.pad(gram, (1, 0, 1, 0))
    own = squares[1:] if has_base else squares
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    mean = (own.sqrt()[:, None] + own.sqrt()) / 2
    return Comparison(
        elements=elements,
        base_norm=float(squares[0].sqrt()) if has_base else None,
        moves=moves,
        cosines=cosines,
        distances=(square.clamp(min=0).sqrt() / mean).tolist(),
    )
