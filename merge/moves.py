"""TIES and DARE: what is kept of every expert's move from the base, averaged exactly.

With `theta_i` the experts, `b` the base and `p_i` integer weights, of each element:

TIES (Yadav et al. 2023, arXiv 2306.01708): of every expert those moves `theta_i - b` are kept that
are among the largest, `density` of its network's; of those kept, the ones of the sign that they
have together, so weighted; the soup is `b + scale * mean(kept moves)`, the base where none is left.

DARE (Yu et al. 2023, arXiv 2311.03099): every move is kept with the chance `density` and then
divided by it: `b + scale / density * sum(p_i m_i (theta_i - b)) / sum(p_i)`.

Either is a mean of experts and base whose whole-numbered weights differ from element to element, so
that it has one correctly rounded value like any soup. What is kept of an expert depends on it, the
base and the seed alone: it leaves as if it had never been there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction

import torch
from torch import Tensor

from atoll.core import seeds
from atoll.merge import exact, sums
from atoll.merge.ingredients import block_name
from atoll.merge.mean import copy_same, named
from atoll.merge.model import Model
from atoll.merge.recipe import Recipe
from atoll.merge.stream import Rule, stream

# Magnitudes are float32's bits without the sign, looked at in two halves.
_LOW_BITS = 16
_BINS = 1 << _LOW_BITS
_A_DRAW = 4  # elements
_LOOKED_AT = 1 << 18  # elements at a time, in some 8 MB


def moves_rule(recipe: Recipe, file: str, limits: Sequence[int]) -> Rule:
    """The rule of a file; `limits` are as of `trim_limits`, for TIES."""
    names = [part.name for part in recipe.ingredients]
    base = names.index(str(recipe.base))
    scale = Fraction(str(recipe.scale))

    def rule(name: str, first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        (out,) = outs
        called = block_name(file, name)
        weights = recipe.weights(called)
        # One that does not count is not looked at, whatever it holds.
        heard = [i for i, weight in enumerate(weights) if weight or i == base]
        own, who = heard.index(base), [names[i] for i in heard]
        if values[0].dtype not in exact.DTYPES:
            copy_same(file, name, [values[i] for i in heard], who, out)
            return
        told = [weights[i] for i in heard]
        with named(file, name, out.dtype, who):
            for start in range(0, len(out), exact.CHUNK):
                part = slice(start, start + exact.CHUNK)
                here = [values[i][part] for i in heard]
                if len(heard) == 1:  # a block in which no expert counts
                    counts = [torch.ones(len(here[0]), dtype=torch.float64)]
                elif recipe.method == "ties":
                    counts = _elected(here, told, own, [limits[i] for i in heard], scale)
                else:
                    counts = _drawn(recipe, called, first + start, len(here[0]), told, who, own)
                sums.mean_by_element(here, counts, out[part])

    return rule


def trim_limits(recipe: Recipe, models: Sequence[Model]) -> dict[str, list[int]]:
    """How large a move has to be that TIES keeps it: by file, of each model in their order.

    As `_magnitude` has it; the base's is 0. Moves that are as large as the last one kept are kept
    too. Reads the models twice.
    """
    base = [part.name for part in recipe.ingredients].index(str(recipe.base))
    density = Fraction(str(recipe.density))
    tops = _looked(models, base, {file: [0] * len(models) for file in models[base].weights}, True)
    high = {}
    for file, histograms in tops.items():
        kept = math.ceil(density * int(histograms[base].sum()))
        high[file] = [_nth(histogram, kept) for histogram in histograms]
    upper = {file: [top for top, _ in each] for file, each in high.items()}
    found = {}
    for file, histograms in _looked(models, base, upper, False).items():
        pairs = zip(high[file], histograms, strict=True)
        found[file] = [(top << _LOW_BITS) + _nth(each, left)[0] for (top, left), each in pairs]
    return found


def _looked(
    models: Sequence[Model], base: int, tops: Mapping[str, Sequence[int]], upper: bool
) -> dict[str, list[Tensor]]:
    """How often each half of a magnitude occurs: the upper, or the lower of those below `tops`."""
    found = {}
    with ExitStack() as closing:
        for model in models:
            closing.enter_context(model)
        for file, weights in models[base].weights.items():
            floats = {
                name: layout
                for name, layout in weights.layout.items()
                if layout.torch_dtype in exact.DTYPES
            }
            counts = [torch.zeros(_BINS, dtype=torch.int64) for _ in models]
            rule = _look_rule(counts, tops[file], base, upper)
            sources = [model.weights[file] for model in models]
            stream(sources, floats, rule, outs=[], what=f"looking at {file}")
            found[file] = counts
        for model in models:
            model.sha256()  # what is read again later has to be the same
    return found


def _look_rule(counts: Sequence[Tensor], tops: Sequence[int], base: int, upper: bool) -> Rule:
    adding = threading.Lock()

    def look(_: str, __: int, values: Sequence[Tensor], ___: Sequence[Tensor]) -> None:
        for start in range(0, len(values[0]), _LOOKED_AT):
            here = [value[start : start + _LOOKED_AT] for value in values]
            for index, value in enumerate(here):
                magnitude = _magnitude(value, here[base])
                if upper:
                    magnitude >>= _LOW_BITS
                else:
                    magnitude = magnitude[magnitude >> _LOW_BITS == tops[index]] % _BINS
                found = torch.bincount(magnitude, minlength=_BINS)
                with adding:
                    counts[index] += found

    return look


def _nth(histogram: Tensor, n: int) -> tuple[int, int]:
    """The bin of the n-th from above, and how many of that bin are among the first n."""
    above = histogram.flip(0).cumsum(0)
    place = int((above >= n).nonzero()[0])
    return _BINS - 1 - place, n - int(above[place] - histogram.flip(0)[place])


def _magnitude(value: Tensor, base: Tensor) -> Tensor:
    """How far values moved, in integers that are ordered as the distances are."""
    return (value.double() - base.double()).abs_().float().view(torch.int32).long()


def _elected(
    values: Sequence[Tensor],
    weights: Sequence[int],
    base: int,
    limits: Sequence[int],
    scale: Fraction,
) -> list[Tensor]:
    """What experts and base count in every element, `(count,)` each: TIES."""
    wide = [value.double() for value in values]
    votes = [
        weight * (_magnitude(value, values[base]) >= limit).double()
        for value, weight, limit in zip(values, weights, limits, strict=True)
    ]
    votes[base] = -_sum_but(votes, base)
    elected = sums.signs(values, votes)
    # A difference of two floats has its true sign, and is 0 only where they are equal.
    heard = [
        vote * ((value - wide[base]).sign_() * elected > 0)
        for vote, value in zip(votes, wide, strict=True)
    ]
    together = _sum_but(heard, base)
    counts = [each.mul_(scale.numerator) for each in heard]
    counts[base] = together * (scale.denominator - scale.numerator)
    counts[base][together == 0] = 1
    return counts


def _drawn(
    recipe: Recipe,
    tensor: str,
    first: int,
    count: int,
    weights: Sequence[int],
    names: Sequence[str],
    base: int,
) -> list[Tensor]:
    """What experts and base count in every element, `(count,)` each: DARE."""
    scale, density = (Fraction(str(each)) for each in (recipe.scale, recipe.density))
    total = sum(weights) - weights[base]
    counts = [
        torch.zeros(count, dtype=torch.float64)
        if i == base
        else _mask(recipe, name, tensor, first, count).mul_(
            weight * scale.numerator * density.denominator
        )
        for i, (name, weight) in enumerate(zip(names, weights, strict=True))
    ]
    whole = total * scale.denominator * density.numerator
    counts[base] = whole - _sum_but(counts, base)
    return counts


def _mask(recipe: Recipe, name: str, tensor: str, first: int, count: int) -> Tensor:
    """1 where an expert's moves are kept, else 0, of elements from `first` on; float64."""
    assert recipe.seed is not None
    assert recipe.density is not None
    begin, end = first // _A_DRAW, -(-(first + count) // _A_DRAW)
    drawn = seeds.uniform(
        recipe.seed, "dare", name, tensor, first=begin, count=end - begin, each=_A_DRAW
    ).reshape(-1)[first - begin * _A_DRAW :][:count]
    return (drawn < recipe.density).double()


def _sum_but(counts: Sequence[Tensor], left_out: int) -> Tensor:
    return torch.stack([c for i, c in enumerate(counts) if i != left_out]).sum(dim=0)
