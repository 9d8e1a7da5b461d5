"""The correctly rounded integer-weighted mean `sum(p_i theta_i) / sum(p_i)`, one rounding in all.

Reads tensors of float16, bfloat16 or float32, in any mixture, and returns one. The result is a
mathematical function of its inputs, so order, chunking, threads and history cannot show in a single
bit; zeros are +0. Three steps, each with its proof beside it: an exact sum, a quotient that lies on
the right side of every number where rounding could turn, and one rounding. The test for an exact
sum is Dekker's (Numer. Math. 18, 1971); round-to-odd is Boldo and Melquiond's (IEEE Trans.
Computers 57, 2008).

Notation: total = sum(weights), reach = sum(|weights|), 0 < total <= reach <= 2**28; "24 bits" means
a significand of that length, as float32's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# 25 bits of a float32 midpoint times 28 bits of total make 53, float64's significand.
MAX_TOTAL = 1 << 28
# Elements at a time. Fewer, and threads wait for the interpreter between operations; more, and a
# chunk and its temporaries leave the processor's second cache.
CHUNK = 1 << 17
# Of weights for which float32 does: few are left over, and the total has no more than 15 bits.
_NARROW_REACH = 64
_FAR_FROM_SUBNORMAL = 40  # an exponent with its bias; no quotient of such sums is subnormal
_INFINITY = 0x7F80  # bfloat16's bits
_GROUP = 8  # bools that are looked at as one word


@dataclass(frozen=True)
class _Format:
    integer: torch.dtype  # of the same width
    bits: int  # of the stored significand
    bias: int  # of the exponent


_FORMATS = {
    torch.float16: _Format(torch.int16, 10, 15),
    torch.bfloat16: _Format(torch.int16, 7, 127),
    torch.float32: _Format(torch.int32, 23, 127),
}
DTYPES = tuple(_FORMATS)

_Value = TypeVar("_Value")
_BELOW = (1 << 29) - 1  # the bits of float64's significand that float32's has not


class NotFiniteError(ValueError):
    """A NaN or an infinity in the `index`-th tensor, or in the result when `index` is None."""

    def __init__(self, index: int | None) -> None:
        super().__init__("a value is NaN, infinite or too large for the dtype")
        self.index = index


def mean(
    tensors: Sequence[Tensor],
    weights: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The mean of CPU tensors of one shape, in `dtype` or the narrowest that holds all of theirs.

    It is written to `out`, a contiguous tensor of that shape, if there is one, and has its dtype.
    `weights` are integers other than 0, with a positive sum; their magnitudes sum to at most
    `MAX_TOTAL`. Raises `NotFiniteError` for NaN and infinities, in the inputs or, where the result
    does not fit into its dtype, in the result.
    """
    if out is None:
        widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        out = torch.empty(tensors[0].shape, dtype=dtype or widest)
    assert len(tensors) == len(weights), (len(tensors), len(weights))
    assert all(weights), weights
    assert sum(weights) > 0, weights
    assert dtype in (None, out.dtype), (dtype, out.dtype)
    _check(tensors, weights, [out])
    flat, result = [tensor.reshape(-1) for tensor in tensors], out.view(-1)
    narrow = _Narrow.of(flat, weights, result)
    _in_chunks(flat, weights, result, chunk, narrow)
    if narrow is not None:
        where = narrow.left_over()
        settled = torch.empty(len(where), dtype=out.dtype)
        _in_chunks([tensor[where] for tensor in flat], weights, settled, chunk)
        result[where] = settled
    _check_finite(out, tensors, weights)
    return out


def _in_chunks(
    flat: Sequence[Tensor],
    weights: Sequence[int],
    result: Tensor,
    chunk: int,
    narrow: _Narrow | None = None,
) -> None:
    scratch = Scratch(min(chunk, len(result)))
    for start in range(0, len(result), chunk):
        part = slice(start, min(start + chunk, len(result)))
        values = [tensor[part] for tensor in flat]
        if narrow is None or not narrow.mean(values, weights, result[part], part, scratch):
            _mean(values, weights, result[part], scratch)


def leave_one_out(
    tensors: Sequence[Tensor],
    weights: Sequence[int],
    outs: Sequence[Tensor],
    *,
    chunk: int = CHUNK,
) -> None:
    """The means of all tensors but one: `outs[i]`, contiguous, without `tensors[i]`.

    Each has the very bits that `mean` makes of the others; where sums are exact each costs one
    subtraction. `weights` are positive. Raises as `mean`, for whichever tensor it is.
    """
    assert len(tensors) == len(weights) == len(outs) > 1, (len(tensors), len(weights), len(outs))
    assert min(weights) > 0, weights
    _check(tensors, weights, outs)
    total, flat = sum(weights), [tensor.reshape(-1) for tensor in tensors]
    results = [out.view(-1) for out in outs]
    scratch = Scratch(min(chunk, len(flat[0])))
    for start in range(0, len(flat[0]), chunk):
        part = slice(start, start + chunk)
        values = [tensor[part] for tensor in flat]
        span = span_of(values, scratch)
        if span.proves_exact(total):
            sums = _sums(values, weights, scratch)
            for value, weight, out in zip(values, weights, results, strict=True):
                # Exact as any sum of them: a multiple of the same power of two, and no larger.
                rest = scratch.rest(len(value)).copy_(sums)
                rest.add_(_wide(value, scratch), alpha=-weight)
                _divide(rest, total - weight, span, out[part], scratch)
            continue
        for i, out in enumerate(results):
            _mean(_without(values, i), _without(weights, i), out[part], scratch)
    for i, out in enumerate(outs):
        _check_finite(out, _without(tensors, i), _without(weights, i))


def check_denormals() -> None:
    """`RuntimeError` where torch was told to flush them, on this thread: that loses bits."""
    if float(torch.tensor(2.0**-149).double()) == 0:
        raise RuntimeError("torch.set_flush_denormal(False) is needed: soups keep every bit")


def _check(tensors: Sequence[Tensor], weights: Sequence[int], outs: Sequence[Tensor]) -> None:
    assert sum(map(abs, weights)) <= MAX_TOTAL, weights
    assert {each.dtype for each in (*tensors, *outs)} <= set(DTYPES)
    assert len({each.shape for each in (*tensors, *outs)}) == 1
    check_denormals()


def _check_finite(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[int]) -> None:
    # A mean lies among its values, unless some of them count negatively.
    bounded = min(weights) > 0 and all(tensor.dtype == out.dtype for tensor in tensors)
    if not bounded and not bool(torch.isfinite(out).all()):
        raise NotFiniteError(None)


def _without(values: Sequence[_Value], i: int) -> list[_Value]:
    return [*values[:i], *values[i + 1 :]]


class Scratch:
    """Memory for one chunk; taken once, as new pages cost more than what is computed in them."""

    def __init__(self, count: int) -> None:
        self._double = torch.empty(count, dtype=torch.float64)
        self._rest = torch.empty(count, dtype=torch.float64)
        self._long = torch.empty(count, dtype=torch.int64)
        self._single = torch.empty(count, dtype=torch.float32)
        self._more = torch.empty(count, dtype=torch.float32)
        self._least = torch.empty(count, dtype=torch.int16)
        self._magnitude = {
            integer: torch.empty(count, dtype=integer) for integer in (torch.int16, torch.int32)
        }

    def double(self, count: int) -> Tensor:
        return self._double[:count]

    def rest(self, count: int) -> Tensor:
        return self._rest[:count]

    def long(self, count: int) -> Tensor:
        return self._long[:count]

    def single(self, count: int) -> Tensor:
        return self._single[:count]

    def wide(self, count: int) -> Tensor:
        return self._more[:count]

    def least(self, count: int) -> Tensor:
        return self._least[:count]

    def magnitude(self, integer: torch.dtype, count: int) -> Tensor:
        return self._magnitude[integer][:count]


def _mean(values: list[Tensor], weights: Sequence[int], out: Tensor, scratch: Scratch) -> None:
    total, reach = sum(weights), sum(map(abs, weights))
    span = span_of(values, scratch)
    if span.proves_exact(reach):
        _divide(_sums(values, weights, scratch), total, span, out, scratch)
        return
    # Products are exact: 24 bits times 28 bits.
    checked, inexact = checked_sums(
        value.double().mul_(weight) for value, weight in zip(values, weights, strict=True)
    )
    out.copy_(rounded(checked / total, out.dtype))
    where = inexact.nonzero().reshape(-1)
    if len(where):
        columns = [value[where].double().tolist() for value in values]
        settled = [settle(column, weights) for column in zip(*columns, strict=True)]
        out[where] = rounded(torch.tensor(settled, dtype=torch.float64), out.dtype)


class _Narrow:
    """Means of bfloat16 in float32, which is twice as fast, for all elements but a few.

    Values of 8 bits have an exact float32 sum, in any order, if they are multiples of 2**(e - 7)
    and lie so close together that `reach` times the largest is below 2**(e + 17). Elements with a
    smaller value than 2**e, or a zero, whose sign might stay, are left over. One quotient of exact
    float32 is one rounding, and going on to bfloat16 is safe as below: c has 9 bits, and a total of
    15 leaves c * total a float32.
    """

    def __init__(self, count: int, reach: int, total: int) -> None:
        self._spread, self._total = (reach - 1).bit_length(), total
        self._left = np.zeros(-(-count // _GROUP) * _GROUP, dtype=bool)

    @classmethod
    def of(cls, flat: Sequence[Tensor], weights: Sequence[int], result: Tensor) -> _Narrow | None:
        """For these tensors; None where it is of no use."""
        total, reach = sum(weights), sum(map(abs, weights))
        dtypes = {tensor.dtype for tensor in flat}
        if dtypes != {torch.bfloat16} or result.dtype == torch.float16 or reach > _NARROW_REACH:
            return None
        return cls(len(result), reach, total)

    def mean(
        self, values: Sequence[Tensor], weights: Sequence[int], out: Tensor, part: slice,
        scratch: Scratch,
    ) -> bool:  # fmt: skip
        """The chunk `part` of the result; whether it was of use there."""
        count, layout = len(out), _FORMATS[torch.bfloat16]
        bits, least = scratch.magnitude(torch.int16, count), scratch.least(count)
        largest = 0
        for index, value in enumerate(values):
            torch.abs(value, out=bits.view(torch.bfloat16))
            top = int(torch.amax(bits))
            if top >= _INFINITY:
                raise NotFiniteError(index)
            largest = max(largest, top)
            if index:
                torch.minimum(least, bits, out=least)
            else:
                least.copy_(bits)
        lowest = (largest >> layout.bits) + self._spread - 16  # e, with its bias
        left = self._left[part]
        if lowest < _FAR_FROM_SUBNORMAL or largest + (self._spread << layout.bits) >= _INFINITY:
            return False
        np.less(least.numpy(), lowest << layout.bits, out=left)
        if np.count_nonzero(left) > count >> 5:
            left[:] = False
            return False
        sums, wide = scratch.single(count), scratch.wide(count)
        for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
            if index:
                sums.add_(wide.copy_(value), alpha=weight)
            else:
                sums.copy_(value)
                if weight != 1:
                    sums.mul_(weight)
        if self._total & (self._total - 1):
            sums.div_(self._total)
        elif self._total > 1:
            sums.mul_(1 / self._total)
        out.copy_(sums)
        return True

    def left_over(self) -> Tensor:
        """Which elements it has not made."""
        words = np.flatnonzero(self._left.view(np.uint64))
        rows, columns = self._left.reshape(-1, _GROUP)[words].nonzero()
        return torch.from_numpy(words[rows] * _GROUP + columns)


# -- 1. the sum, exact -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """All values are multiples of 2**bottom, and smaller than 2**top."""

    bottom: int
    top: int

    def proves_exact(self, reach: int) -> bool:
        """Whether every sum is exact in float64, whatever the order.

        Every partial sum is a multiple of 2**bottom too, and at most `reach` times the largest
        value. If these lie at most 53 bits apart, it is a float64.
        """
        return self.top - self.bottom + (reach - 1).bit_length() <= 53

    def normal_over(self, total: int) -> bool:
        """Whether a sum over `total` is 0 or a normal float32."""
        return self.bottom - total.bit_length() >= -126


def span_of(values: Sequence[Tensor], scratch: Scratch) -> Span:
    bottom, top = [], []
    for index, value in enumerate(values):
        layout = _FORMATS[value.dtype]
        largest_integer = torch.iinfo(layout.integer).max
        infinity = largest_integer >> layout.bits << layout.bits
        # Without the sign, floats are ordered as the integers of their bits.
        magnitude = scratch.magnitude(layout.integer, value.numel())
        torch.bitwise_and(value.view(layout.integer), largest_integer, out=magnitude)
        smallest, largest = (int(end) for end in torch.aminmax(magnitude))
        if largest >= infinity:
            raise NotFiniteError(index)
        if smallest == 0:  # zeros are multiples of everything
            smallest = int(torch.where(magnitude == 0, largest_integer, magnitude).min())
            if smallest == largest_integer:  # nothing else
                continue
        # Subnormal numbers have the last place of the smallest normal ones.
        low, high = (max(end >> layout.bits, 1) - layout.bias for end in (smallest, largest))
        bottom.append(low - layout.bits)
        top.append(high + 1)
    return Span(min(bottom, default=0), max(top, default=0))


def _sums(values: Sequence[Tensor], weights: Sequence[int], scratch: Scratch) -> Tensor:
    """The float64 sums, where all are proven exact."""
    sums = scratch.double(len(values[0])).zero_()  # from +0, to which -0 adds nothing
    for value, weight in zip(values, weights, strict=True):
        sums.add_(_wide(value, scratch), alpha=weight)
    return sums


def _wide(value: Tensor, scratch: Scratch) -> Tensor:
    """torch takes float16 to float64 an element at a time, and to float32 all at once."""
    return scratch.single(len(value)).copy_(value) if value.dtype == torch.float16 else value


def checked_sums(terms: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The float64 sums of terms without error, and which of them were rounded on the way.

    Of s = fl(a + b), one of s - a and s - b is computed without error (Dekker), so if they give b
    and a, then s = a + b.
    """
    first, *others = terms
    sums, inexact = first + 0.0, torch.zeros(len(first), dtype=torch.bool)
    for term in others:
        new = sums + term
        inexact |= (new - sums != term) | (new - term != sums)
        sums = new
    return sums, inexact


def settle(column: Sequence[float], weights: Sequence[int]) -> float:
    """One element's mean in integers, rounded to odd in float64.

    Round-to-odd keeps the side of every number of at most 51 bits, float32's midpoints among them.
    Only for the rare elements whose values lie too far apart for float64.
    """
    return rounded_to_odd(whole_sum(column, weights), sum(weights))


def rounded_to_odd(scaled: int, total: int) -> float:
    """`scaled * 2**-149 / total`, rounded to odd in float64."""
    # Shifted so that the quotient has 52 or 53 bits.
    shift = 52 + total.bit_length() - scaled.bit_length()
    odd, remainder = divmod(abs(scaled) << max(shift, 0), total << max(-shift, 0))
    odd |= remainder != 0
    return math.copysign(math.ldexp(odd, -149 - shift), scaled)


def units(value: float) -> int:
    """A float64 in units of 2**-149, of which every finite value of the dtypes is a multiple."""
    return int(math.ldexp(value, 149))


def whole_sum(column: Sequence[float], weights: Sequence[int]) -> int:
    """One element's sum in units of 2**-149, of which every finite value is a multiple."""
    return sum(weight * units(value) for value, weight in zip(column, weights, strict=True))


# -- 2. the quotient, on the right side; 3. one rounding -------------------------------------------
#
# Rounding sums / total first to float64 and then again is safe, because float64 never lands on a
# number c of 25 bits (a float32, or the midpoint of two) by rounding. Let q = sums / total round to
# c. c * total has 53 bits, so it is a float64, as sums is; if they differ, they differ by a last
# place of the smaller one at least, which is more than 2**-53 of it. So q differs from c by more
# than 2**-53 of the smaller one of q and c. But rounding moves q by no more than that. Hence
# sums = c * total. As rounding is monotone, q lies on its true side of every other such number.


def _divide(sums: Tensor, total: int, span: Span, out: Tensor, scratch: Scratch) -> None:
    """Exact sums over `total`, rounded to `out`; in place, so `sums` are lost."""
    if total & (total - 1):
        sums.div_(total)
    elif total > 1:
        sums.mul_(1 / total)  # exact, and three times as fast
    if span.normal_over(total):
        round_normal(sums, out, scratch)
    else:
        out.copy_(rounded(sums, out.dtype))


def round_normal(quotient: Tensor, out: Tensor, scratch: Scratch) -> None:
    """`rounded` where every quotient is 0 or a normal float32: in place, so `quotient` is lost."""
    if out.dtype == torch.float32:
        out.copy_(quotient)
        return
    # Round to odd in 24 bits: cut off the bits below, and set the last one if any of them was set.
    # Adding `_BELOW` to them carries exactly then. What is left is a float32, so this cast to 8 or
    # 11 bits rounds once, where torch's own from float64 would first round to 24.
    bits, rest = quotient.view(torch.int64), scratch.long(quotient.numel())
    torch.bitwise_and(bits, _BELOW, out=rest)
    bits.bitwise_or_(rest.add_(_BELOW)).bitwise_and_(~_BELOW)
    out.copy_(quotient)
    if out.dtype == torch.float16:
        out.add_(0.0)  # float16 alone can underflow, to -0


def rounded(quotient: Tensor, target: torch.dtype) -> Tensor:
    """Float64 to `target`, to nearest, ties to even; zeros become +0.

    `quotient` lies on the same side as the true mean of every number of 25 bits, or on it.
    """
    # This cast rounds once. Adding +0 turns -0, left by an underflow, into +0.
    if target == torch.float32:
        return quotient.float().add_(0.0)
    # From 24 odd bits to 8 or 11 is one rounding; torch's own cast from float64 would be two.
    return _odd_float32(quotient).to(target).add_(0.0)


def _odd_float32(quotient: Tensor) -> Tensor:
    """Float64 rounded to odd in float32: itself if exact, else its neighbour with an odd last bit.

    The bounds where float16 and bfloat16 rounding turns are even in float32, so that round-to-odd
    neither crosses nor meets one. A quotient that vanishes in float32 stays 0, as it would anyway.
    """
    near = quotient.float()
    # Of two neighbours one is odd; if the nearer is even, it is the one across. Away from zero
    # is upwards in the integers of the bits.
    outwards = torch.sign((quotient - near) * near).to(torch.int32)
    bits = near.view(torch.int32)
    return (bits + outwards * (~bits & 1)).view(torch.float32)
