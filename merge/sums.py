"""Exact sums that are more than one mean: with weights by element, and kept beside a soup.

Of the same steps as the mean (`exact.py`, which has the proofs): a sum that is proven exact or
checked, a quotient, one rounding; elements for which float64 is too short are settled in integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from atoll.merge.exact import (
    MAX_TOTAL,
    NotFiniteError,
    Scratch,
    Span,
    checked_sums,
    round_normal,
    rounded,
    rounded_to_odd,
    settle,
    span_of,
    units,
    whole_sum,
)


def mean_by_element(tensors: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor) -> None:
    """The mean with weights of its own in every element, into `out`; tensors are `(count,)`.

    `weights` are whole numbers in float64, `(count,)`, of any sign. In every element their sum is
    positive, and their magnitudes add up to at most `MAX_TOTAL`. Raises as `mean`.
    """
    total = torch.stack(list(weights)).sum(dim=0)
    span, sums, inexact = _sums_by_element(tensors, weights)
    sums.div_(total)
    if inexact is None and span.normal_over(int(total.max())):
        round_normal(sums, out, Scratch(len(out)))
    else:
        out.copy_(rounded(sums, out.dtype))
    if inexact is not None and bool(inexact.any()):
        settled = [settle(column, counts) for column, counts in _columns(tensors, weights, inexact)]
        out[inexact] = rounded(torch.tensor(settled, dtype=torch.float64), out.dtype)
    if not bool(torch.isfinite(out).all()):
        raise NotFiniteError(None)


def signs(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The signs of the sums `sum(p_i theta_i)`, -1, 0 or 1 in float64, weighted as above."""
    _, sums, inexact = _sums_by_element(tensors, weights)
    found = sums.sign_()
    if inexact is not None and bool(inexact.any()):
        told = [whole_sum(*column) for column in _columns(tensors, weights, inexact)]
        found[inexact] = torch.tensor([float((n > 0) - (n < 0)) for n in told], dtype=found.dtype)
    return found


def add(sums: Tensor, rests: dict[int, int], tensor: Tensor, weight: int) -> None:
    """Add `weight * tensor` to exact sums, in place; tensors are `(count,)`, weights any integers.

    A sum is the float64 in `sums` and, where that is rounded, what `rests` has for the element
    besides, in units of 2**-149. There is one such pair for every sum, so that the way to it does
    not show. Raises `NotFiniteError`.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NotFiniteError(0)
    term = tensor.double().mul_(weight)
    new = sums + term
    # What rounding lost, without error (Knuth, TAOCP 2, section 4.2.2, theorem B).
    back = new - sums
    lost = (sums - (new - back)).add_(term.sub(back))
    for i in sorted({*lost.nonzero().reshape(-1).tolist(), *rests}):
        whole = units(float(sums[i])) + units(float(term[i])) + rests.pop(i, 0)
        near = math.ldexp(float(whole), -149)
        new[i] = near
        if left := whole - units(near):
            rests[i] = left
    sums.copy_(new)


def divide(sums: Tensor, rests: Mapping[int, int], total: int, out: Tensor) -> None:
    """Exact sums, as `add` has them, over `total`, rounded once into `out`; raises as `mean`."""
    assert 0 < total <= MAX_TOTAL, total
    out.copy_(rounded(sums / total, out.dtype))
    if rests:
        odd = [rounded_to_odd(units(float(sums[i])) + rest, total) for i, rest in rests.items()]
        out[list(rests)] = rounded(torch.tensor(odd, dtype=torch.float64), out.dtype)
    if not bool(torch.isfinite(out).all()):
        raise NotFiniteError(None)


def _sums_by_element(
    tensors: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Span, Tensor, Tensor | None]:
    """Float64 sums with weights by element, and which were rounded on the way: None is none."""
    reach = int(torch.stack([weight.abs() for weight in weights]).sum(dim=0).max())
    assert reach <= MAX_TOTAL, reach
    span = span_of(tensors, Scratch(len(tensors[0])))
    terms = [tensor.double().mul_(weight) for tensor, weight in zip(tensors, weights, strict=True)]
    if span.proves_exact(reach):
        sums = torch.zeros_like(terms[0])
        for term in terms:
            sums.add_(term)
        return span, sums, None
    return span, *checked_sums(terms)


def _columns(
    tensors: Sequence[Tensor], weights: Sequence[Tensor], where: Tensor
) -> Iterator[tuple[tuple[float, ...], list[int]]]:
    """Values and weights of single elements."""
    columns = zip(*(tensor[where].double().tolist() for tensor in tensors), strict=True)
    counts = zip(*(weight[where].tolist() for weight in weights), strict=True)
    for column, told in zip(columns, counts, strict=True):
        yield column, [int(count) for count in told]
