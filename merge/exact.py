"""The correctly rounded integer-weighted mean `sum(p_i theta_i) / sum(p_i)`, one rounding in all.

Reads tensors of float16, bfloat16 or float32 and returns one. The result is a mathematical
function of its inputs, so order, chunking, threads and history cannot show in a single bit; zeros
are +0. Three steps, each with its proof beside it: an exact sum, a quotient that lies on the right
side of every number where rounding could turn, and one rounding. The test for an exact sum is
Dekker's (Numer. Math. 18, 1971); round-to-odd is Boldo and Melquiond's (IEEE Trans. Computers 57,
2008).

Notation: total = sum(weights) <= 2**28; "24 bits" means a significand of that length, as float32's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# 25 bits of a float32 midpoint times 28 bits of total make 53, float64's significand.
MAX_TOTAL = 1 << 28
# Elements at a time: a chunk and its temporaries stay in the caches, and torch keeps so few on the
# calling thread (its grain size), where a busy second core cannot hold them up.
CHUNK = 1 << 15

# dtype -> (integer of the same width, bits of the stored significand)
_LAYOUT = {
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
    torch.float32: (torch.int32, 23),
}
DTYPES = tuple(_LAYOUT)


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
    chunk: int = CHUNK,
) -> Tensor:
    """The mean of CPU tensors of one shape and dtype, in `dtype` or their own.

    `weights` are positive integers with a sum of at most `MAX_TOTAL`. Raises `NotFiniteError` for
    NaN and infinities, in the inputs or, where `dtype` is narrower, in the result.
    """
    first = tensors[0]
    target = dtype or first.dtype
    assert len(tensors) == len(weights), (len(tensors), len(weights))
    assert all(weight > 0 for weight in weights), weights
    assert sum(weights) <= MAX_TOTAL, weights
    assert {first.dtype, target} <= set(DTYPES), (first.dtype, target)
    assert all(t.dtype == first.dtype and t.shape == first.shape for t in tensors)
    # Flushed denormals would lose bits silently, and only on the thread that asked for it.
    assert float(torch.tensor(2.0**-149).double()) > 0, "torch.set_flush_denormal(False) is needed"

    flat = [tensor.reshape(-1) for tensor in tensors]
    out = torch.empty(first.numel(), dtype=target)
    for start in range(0, out.numel(), chunk):
        stop = min(start + chunk, out.numel())
        out[start:stop] = _mean([tensor[start:stop] for tensor in flat], weights, target)
    if target != first.dtype and not bool(torch.isfinite(out).all()):
        raise NotFiniteError(None)
    return out.reshape(first.shape)


def _mean(values: list[Tensor], weights: Sequence[int], target: torch.dtype) -> Tensor:
    total = sum(weights)
    if _proven_exact(values, total):
        sums = torch.zeros(values[0].numel(), dtype=torch.float64)
        for value, weight in zip(values, weights, strict=True):
            sums.add_(value, alpha=weight)
        return _round(sums / total, target)
    sums, inexact = _checked_sums(values, weights)
    out = _round(sums / total, target)
    where = inexact.nonzero().reshape(-1)
    if len(where):
        columns = [value[where].double().tolist() for value in values]
        settled = [_settle(column, weights) for column in zip(*columns, strict=True)]
        out[where] = _round(torch.tensor(settled, dtype=torch.float64), target)
    return out


# -- 1. the sum, exact -----------------------------------------------------------------------------


def _proven_exact(values: list[Tensor], total: int) -> bool:
    """Whether every sum over this chunk is exact in float64, whatever the order.

    Every partial sum is a multiple of the last place of the smallest nonzero value, and at most
    `total` times the largest value. If these lie at most 53 bits apart, it is a float64.
    """
    integer, bits = _LAYOUT[values[0].dtype]
    largest_integer = torch.iinfo(integer).max
    infinity = largest_integer >> bits << bits
    low, high = largest_integer, 0
    for index, value in enumerate(values):
        # Without the sign, floats are ordered as the integers of their bits.
        magnitude = value.view(integer) & largest_integer
        smallest, largest = (int(end) for end in torch.aminmax(magnitude))
        if largest >= infinity:
            raise NotFiniteError(index)
        if smallest == 0:  # zeros are multiples of everything
            smallest = int(torch.where(magnitude == 0, largest_integer, magnitude).min())
        low, high = min(low, smallest), max(high, largest)
    # A subnormal's last place is one exponent higher than its field says: on the safe side.
    exponents = (high >> bits) - (low >> bits)
    return exponents + 1 + bits + (total - 1).bit_length() <= 53


def _checked_sums(values: list[Tensor], weights: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The float64 sums, and which of them were rounded on the way.

    Products are exact: 24 bits times 28 bits. Of s = fl(a + b), one of s - a and s - b is computed
    without error (Dekker), so if they give b and a, then s = a + b.
    """
    sums = torch.zeros(values[0].numel(), dtype=torch.float64)
    inexact = torch.zeros(values[0].numel(), dtype=torch.bool)
    for value, weight in zip(values, weights, strict=True):
        term = value.double().mul_(weight)
        new = sums + term
        inexact |= (new - sums != term) | (new - term != sums)
        sums = new
    return sums, inexact


def _settle(column: Sequence[float], weights: Sequence[int]) -> float:
    """One element's mean in integers, rounded to odd in float64.

    Round-to-odd keeps the side of every number of at most 51 bits, float32's midpoints among them.
    Only for the rare elements whose values lie too far apart for float64.
    """
    # Every finite value of the three dtypes is a multiple of 2**-149.
    scaled = sum(
        weight * int(math.ldexp(value, 149)) for value, weight in zip(column, weights, strict=True)
    )
    total = sum(weights)
    # Shifted so that the quotient has 52 or 53 bits.
    shift = 52 + total.bit_length() - scaled.bit_length()
    odd, remainder = divmod(abs(scaled) << max(shift, 0), total << max(-shift, 0))
    odd |= remainder != 0
    return math.copysign(math.ldexp(odd, -149 - shift), scaled)


# -- 2. the quotient, on the right side; 3. one rounding -------------------------------------------
#
# Rounding sums / total first to float64 and then again is safe, because float64 never lands on a
# number c of 25 bits (a float32, or the midpoint of two) by rounding. Let q = sums / total round to
# c. c * total has 53 bits, so it is a float64, as sums is; if they differ, they differ by a last
# place of the smaller one at least, which is more than 2**-53 of it. So q differs from c by more
# than 2**-53 of the smaller one of q and c. But rounding moves q by no more than that. Hence
# sums = c * total. As rounding is monotone, q lies on its true side of every other such number.


def _round(quotient: Tensor, target: torch.dtype) -> Tensor:
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
