"""The exact mean against `fractions.Fraction`, on inputs made to break every shortcut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.merge import exact, sums
from benchmarks.rounding import FORMATS, reference, rounded

DTYPES = exact.DTYPES
INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
SIZES = (2, 3, 5, 7)


def bits(tensor: Tensor) -> list[int]:
    return tensor.reshape(-1).view(INTEGER[tensor.dtype]).tolist()


TOO_LARGE = "too large for the dtype"


def mean_bits(tensors: Sequence[Tensor], weights: Sequence[int], **how: Any) -> list[int] | str:
    try:
        return bits(exact.mean(tensors, weights, **how))
    except exact.NotFiniteError as error:
        if error.index is None:
            return TOO_LARGE
        raise


def check(tensors: Sequence[Tensor], weights: Sequence[int], dtype: torch.dtype | None = None):
    expected = reference(tensors, weights, dtype)
    fits = bool(torch.isfinite(expected).all())
    assert mean_bits(tensors, weights, dtype=dtype) == (bits(expected) if fits else TOO_LARGE)


def any_bits(dtype: torch.dtype, count: int, *, seed: int) -> Tensor:
    """Finite values of all exponents, subnormals and both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.iinfo(INTEGER[dtype])
    raw = torch.randint(width.min, width.max + 1, (count,), generator=generator)
    value = raw.to(INTEGER[dtype]).view(dtype)
    return torch.where(torch.isfinite(value), value, torch.zeros((), dtype=dtype))


def like_weights(dtype: torch.dtype, count: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(count, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [like_weights, any_bits])
def test_mean_is_the_rounded_fraction(make, dtype, size):
    tensors = [make(dtype, 1500, seed=10 * size + i) for i in range(size)]
    check(tensors, [1] * size)
    check(tensors, [1 + (3 * i) % 7 for i in range(size)])


@pytest.mark.parametrize(("source", "target"), itertools.permutations(DTYPES, 2))
def test_other_target_dtypes_are_rounded_once(source, target):
    tensors = [like_weights(source, 1500, seed=i) for i in range(3)]
    check(tensors, [1, 1, 1], target)
    check(tensors, [2, 5, 4], target)
    tiny = [tensor * 2.0**-20 for tensor in tensors]
    check(tiny, [2, 5, 4], target)


@pytest.mark.parametrize("target", [None, *DTYPES])
@pytest.mark.parametrize("make", [like_weights, any_bits])
def test_mixed_dtypes_are_rounded_once(make, target):
    tensors = [make(dtype, 1500, seed=i) for i, dtype in enumerate([*DTYPES, *DTYPES])]
    for chosen in (tensors, tensors[:2], tensors[1:3], tensors[::2]):
        weights = [1 + i % 4 for i in range(len(chosen))]
        check(chosen, weights, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1, 1, -1), (3, -2), (-1, 2, -3, 7), (2**27, -(2**27) + 1)])
def test_negative_weights_are_rounded_once(dtype, weights):
    tensors = [like_weights(dtype, 1500, seed=i) for i in range(len(weights))]
    check(tensors, weights)
    check([tensors[0], tensors[0] * (1 + 2.0**-6), *tensors[2:]], weights)  # most cancels


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_negative_weights_make_too_large_is_refused(dtype):
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(exact.NotFiniteError) as caught:
        exact.mean([largest, -largest], [2, -1])
    assert caught.value.index is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1, 1), (2, 3), (1, 2, 4), (1,) * 7])
def test_midpoints_and_their_neighbours(dtype, weights):
    """Means at a midpoint of the target, and a last place of some ingredient beside it."""
    precision, _ = FORMATS[dtype]
    last = 2.0 ** (1 - precision)
    near = [1.0, 1 + last, 1 + 2 * last, 1 - last / 2, -1.0, 2.0, last, 2.0**-14, -(2.0**-14), 0.0]
    columns = list(itertools.product(near, repeat=min(len(weights), 3)))
    columns = [column + (1.0,) * (len(weights) - len(column)) for column in columns]
    tensors = [torch.tensor(row, dtype=dtype) for row in zip(*columns, strict=True)]
    check(tensors, weights)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_no_double_rounding_through_float32(target):
    """1 + half a last place + 2**-40 is above a tie; torch's cast from float64 makes it one."""
    precision, _ = FORMATS[target]
    up = 1 + 2.0**-precision
    assert torch.tensor(up + 2.0**-40, dtype=torch.float64).to(target) == 1.0
    for sign, tail in itertools.product((1, -1), (2.0**-40, -(2.0**-40), 2.0**-80, -(2.0**-80))):
        tensors = [torch.tensor([sign * value]) for value in (2 * up, 2 * tail)]
        expected = sign * (1 + 2.0 ** (1 - precision) if tail > 0 else 1.0)
        assert exact.mean(tensors, [1, 1], dtype=target) == expected
        check(tensors, [1, 1], target)


def test_no_double_rounding_through_float64():
    """A float32 tie that is broken only beyond float64's last place."""
    tie = 1 + 2.0**-24
    for tail in (2.0**-60, -(2.0**-60), 2.0**-126, -(2.0**-149), 0.0):
        parts = [1.0, 2.0**-24, tail]
        tensors = [torch.tensor([3 * part]) for part in parts]
        assert float(Fraction(tie) + Fraction(tail)) == tie
        check(tensors, [1, 1, 1])
        check([*tensors, torch.tensor([0.0])], [1, 1, 1, 3])


@pytest.mark.parametrize("total", [3, 5, 7, 2**27 + 1, 2**28 - 1])
def test_quotients_next_to_float32_midpoints(total):
    """Sums a last place of float64 beside total * midpoint: the closest that a quotient comes."""
    found = 0
    for numerator in (2**24 + 1, 2**25 - 1, 2**24 + 12345):
        midpoint = Fraction(numerator, 2**24)
        sums = float(midpoint * total)
        assert Fraction(sums) == midpoint * total
        for near in (math.nextafter(sums, 0.0), sums, math.nextafter(sums, math.inf)):
            # Three float32 pieces hold any 53 bits.
            pieces, rest = [], Fraction(near)
            for _ in range(3):
                pieces.append(rounded(rest, torch.float32))
                rest -= Fraction(pieces[-1])
            assert rest == 0
            tensors = [torch.tensor([piece]) for piece in pieces]
            if total == 3:
                check(tensors, [1, 1, 1])
            else:
                check([*tensors, torch.tensor([0.0])], [1, 1, 1, total - 3])
            found += 1
    assert found == 9


def test_stragglers_beside_float32_midpoints():
    """Means that miss a midpoint by less than 53 bits show, with and without a remainder."""
    for total, tail in itertools.product((4, 5, 7, 2**28 - 1), (2.0**-149, 2.0**-90, 0.0)):
        for sign in (1, -1):
            midpoint = Fraction(2**24 + 1, 2**24)
            big = rounded(midpoint * total, torch.float32)
            rest = float(midpoint * total - Fraction(big))
            column = [big, rest, sign * tail, 0.0]
            assert sum(map(Fraction, column[:2])) == midpoint * total
            tensors = [torch.tensor([value]) for value in column]
            check(tensors, [1, 1, 1, total - 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancellation_and_wide_exponents(dtype):
    huge = torch.finfo(dtype).max
    small = 2.0 ** {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}[dtype]
    rows = [
        [huge, -huge, small],
        [huge, -huge, -small],
        [huge, small, -huge],
        [huge, huge, huge],
        [huge, small, small],
        [1.0, -1.0, small],
        [1.0, 1.0, small],
        [1.0, small, -small],
    ]
    tensors = [torch.tensor(row, dtype=dtype) for row in zip(*rows, strict=True)]
    for weights in ([1, 1, 1], [5, 5, 1], [1, 2, 3]):
        check(tensors, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals(dtype):
    generator = torch.Generator().manual_seed(3)
    low = [torch.randint(-40, 41, (2000,), generator=generator) for _ in range(5)]
    smallest = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}[dtype]
    tensors = [(value.double() * 2.0**smallest).to(dtype) for value in low]
    check(tensors, [1] * 5)
    check(tensors[:2], [1, 1])
    check(tensors, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_positive(dtype):
    smallest = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}[dtype]
    zero, below = torch.tensor([-0.0], dtype=dtype), torch.tensor([-(2.0**smallest)], dtype=dtype)
    assert bits(exact.mean([zero, zero], [1, 1])) == [0]
    assert bits(exact.mean([zero], [1])) == [0]
    assert bits(exact.mean([below, -below], [1, 1])) == [0]
    assert bits(exact.mean([below, zero], [1, 1])) == [0]  # -2**-150 rounds to -0 elsewhere


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_of_exactness_is_not_too_generous(dtype):
    """At the edge of the condition the sum needs all 53 bits, and one more would break it."""
    fraction = exact._FORMATS[dtype].bits
    smallest = torch.finfo(dtype).smallest_normal
    for exponents in range(24, 53 - fraction):
        top = smallest * 2.0**exponents * (2 - torch.finfo(dtype).eps)
        if top > torch.finfo(dtype).max:
            break
        values = [torch.tensor([value], dtype=dtype) for value in (top, smallest, smallest)]
        for total in (3, 4, 5, 2**10, 2**15 + 1, 2**20, 2**28):
            weights = [total - 2, 1, 1]
            proven = exact.span_of(values, exact.Scratch(1)).proves_exact(total)
            assert proven == (exponents + 1 + fraction + (total - 1).bit_length() <= 53)
            if proven:
                true = sum(w * Fraction(float(v)) for w, v in zip(weights, values, strict=True))
                assert Fraction(float(true)) == true
            check(values, weights)


def test_stragglers_are_few_on_real_scales():
    tensors = [like_weights(torch.float32, 200_000, seed=i) for i in range(4)]
    _, inexact = exact.checked_sums(t.double() * weight for weight, t in enumerate(tensors, 1))
    assert int(inexact.sum()) < 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_by_index(dtype, bad):
    good = torch.ones(100_000, dtype=dtype)
    worse = good.clone()
    worse[77_777] = bad
    with pytest.raises(exact.NotFiniteError) as caught:
        exact.mean([good, good, worse], [1, 1, 1])
    assert caught.value.index == 2


def test_overflow_of_a_narrower_dtype_is_refused():
    with pytest.raises(exact.NotFiniteError) as caught:
        exact.mean([torch.full((3,), 1e5)], [1], dtype=torch.float16)
    assert caught.value.index is None


def test_shapes_are_kept():
    for shape in ((), (0,), (3, 0), (2, 3, 4)):
        tensors = [torch.ones(shape), torch.zeros(shape)]
        assert exact.mean(tensors, [1, 1]).shape == shape
    turned = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(exact.mean([turned, turned], [1, 2]), turned)


def _value(dtype: torch.dtype) -> st.SearchStrategy[float]:
    width = torch.iinfo(INTEGER[dtype])
    raw = st.integers(width.min, width.max)
    value = raw.map(lambda r: float(torch.tensor(r, dtype=INTEGER[dtype]).view(dtype)))
    return value.filter(math.isfinite)


values = {dtype: _value(dtype) for dtype in DTYPES}


@st.composite
def mixtures(draw: st.DrawFn, *, negative: bool = True) -> tuple[list[Tensor], list[int]]:
    """Tensors of one dtype or several, and weights of which some may be negative."""
    size = draw(st.sampled_from(SIZES))
    count = draw(st.integers(1, 6))
    several = st.lists(st.sampled_from(DTYPES), min_size=size, max_size=size)
    dtypes = draw(st.one_of(st.sampled_from(DTYPES).map(lambda dtype: [dtype] * size), several))
    tensors = [
        torch.tensor(draw(st.lists(values[dtype], min_size=count, max_size=count)), dtype=dtype)
        for dtype in dtypes
    ]
    weight = st.one_of(st.integers(1, 9), st.integers(1, exact.MAX_TOTAL // 8))
    weights = [draw(weight) for _ in range(size)]
    if negative and draw(st.booleans()):
        weights = [-w if draw(st.booleans()) else w for w in weights]
        assume(sum(weights) > 0)
    return tensors, weights


@settings(max_examples=400)
@given(mixtures())
def test_any_mixture(mixture):
    check(*mixture)


@settings(max_examples=150)
@given(mixtures(), st.randoms(use_true_random=False), st.integers(1, 7))
def test_order_and_chunking_do_not_show(mixture, random, chunk):
    tensors, weights = mixture
    pairs = list(zip(tensors, weights, strict=True))
    random.shuffle(pairs)
    again = mean_bits([t for t, _ in pairs], [w for _, w in pairs], chunk=chunk)
    assert mean_bits(tensors, weights) == again


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_threads_and_order_do_not_show_on_long_tensors(dtype):
    tensors = [like_weights(dtype, 300_001, seed=i) for i in range(3)]
    tensors[0][::97] *= 2.0**-20
    weights = [3, 1, 7]
    expected = exact.mean(tensors, weights)
    assert torch.equal(expected, exact.mean(tensors, weights, chunk=1 << 18))
    torch.set_num_threads(2)
    assert torch.equal(expected, exact.mean(tensors[::-1], weights[::-1], chunk=99_991))


# -- leave one out ---------------------------------------------------------------------------------


@settings(max_examples=200)
@given(mixtures(negative=False), st.sampled_from(DTYPES), st.integers(1, 7))
def test_without_one_it_is_the_mean_of_the_others(mixture, target, chunk):
    tensors, weights = mixture
    outs = [torch.empty(tensors[0].shape, dtype=target) for _ in tensors]
    alone = [
        mean_bits(without(tensors, i), without(weights, i), dtype=target)
        for i in range(len(tensors))
    ]
    if TOO_LARGE in alone:
        with pytest.raises(exact.NotFiniteError) as caught:
            exact.leave_one_out(tensors, weights, outs, chunk=chunk)
        assert caught.value.index is None
    else:
        exact.leave_one_out(tensors, weights, outs, chunk=chunk)
        assert [bits(out) for out in outs] == alone


def without(values: Sequence[Any], i: int) -> list[Any]:
    return [*values[:i], *values[i + 1 :]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_leaving_one_out_names_what_is_not_finite(dtype):
    tensors = [like_weights(dtype, 1000, seed=i) for i in range(3)]
    tensors[1][7] = float("nan")
    with pytest.raises(exact.NotFiniteError) as caught:
        exact.leave_one_out(tensors, [1, 1, 1], [torch.empty_like(t) for t in tensors])
    assert caught.value.index == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_weights_of_their_own_in_every_element(data):
    """Means and signs by definition, where sums are exact and where they are not."""
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4))
    target = data.draw(st.sampled_from(DTYPES))
    draw = data.draw(st.sampled_from([any_bits, like_weights]))
    seed = data.draw(st.integers(0, 2**31))
    tensors = [draw(dtype, 40, seed=seed + i) for i, dtype in enumerate(dtypes)]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-3, 9, (40,), generator=generator).double() for _ in dtypes]
    cancels = data.draw(st.booleans())
    if cancels:  # where weights add up to 0 values do, nearly
        tensors[1] = tensors[0].to(tensors[1].dtype)
        tensors[1][~torch.isfinite(tensors[1])] = 0
    votes = [weights[0], -weights[0], *weights[2:]] if cancels else weights
    found = sums.signs(tensors, votes).tolist()
    columns = list(zip(*(t.double().tolist() for t in tensors), strict=True))
    for i, column in enumerate(columns):
        total = sum(Fraction(v) * int(w[i]) for v, w in zip(column, votes, strict=True))
        assert found[i] == (total > 0) - (total < 0)
    weights[0] += 13  # the sum is positive
    out = torch.empty(40, dtype=target)
    means = []
    for i, column in enumerate(columns):
        counts = [int(w[i]) for w in weights]
        total = sum(Fraction(v) * n for v, n in zip(column, counts, strict=True))
        means.append(rounded(total / sum(counts), target) + 0.0)
    wanted = torch.tensor(means, dtype=torch.float64).to(target)
    if bool(torch.isfinite(wanted).all()):
        sums.mean_by_element(tensors, weights, out)
        assert bits(out) == bits(wanted)
        return
    with pytest.raises(exact.NotFiniteError) as raised:
        sums.mean_by_element(tensors, weights, out)
    assert raised.value.index is None


def test_what_is_not_finite_is_refused_by_element_too():
    values = [torch.tensor([1.0]), torch.tensor([math.inf])]
    ones = [torch.ones(1, dtype=torch.float64)] * 2
    for call in (
        lambda: sums.signs(values, ones),
        lambda: sums.mean_by_element(values, ones, torch.empty(1)),
    ):
        with pytest.raises(exact.NotFiniteError) as raised:
            call()
        assert raised.value.index == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_means_of_bfloat16_in_float32(data):
    """The fast way, with what it must leave over: zeros, small values, and what lies on a tie."""
    weights = data.draw(st.lists(st.integers(-3, 9).filter(bool), min_size=1, max_size=7))
    assume(sum(weights) > 0 and sum(map(abs, weights)) <= exact._NARROW_REACH)
    seed, count = data.draw(st.integers(0, 2**31)), 4096
    scale = data.draw(st.sampled_from([0.0, -80.0, -60.0, 100.0, 124.0]))
    draw = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(count, generator=draw) * 0.5 * 2.0**scale).bfloat16() for _ in weights]
    for tensor in tensors:  # few enough that the rest is not given up
        where = torch.randperm(count, generator=draw)[: 64 // len(weights)]
        odd = any_bits(torch.bfloat16, len(where), seed=seed)
        small = odd.abs() < 2.0**scale
        tensor[where] = torch.where(small, odd, torch.tensor(-0.0, dtype=torch.bfloat16))
    if len(weights) > 1:  # pairs whose mean lies between two neighbours, or next to that
        near = (
            tensors[0][::7].view(torch.int16) + torch.randint(-2, 3, (1,), generator=draw).short()
        )
        tensors[1][::7] = near.view(torch.bfloat16)
        tensors[1][~torch.isfinite(tensors[1])] = 2.0**scale
    used = []
    usual = exact._Narrow.mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact._Narrow, "mean", lambda *given: used.append(usual(*given)) or used[-1])
        for dtype in (torch.bfloat16, torch.float32):
            check(tensors, weights, dtype)
    assert len(used) == 2
    if scale in (0.0, -60.0) and len(weights) == 4:
        assert all(used)


def test_the_fast_way_is_the_usual_one():
    for count in (2, 3, 4, 7):
        tensors = [like_weights(torch.bfloat16, 1 << 17, seed=i) for i in range(count)]
        narrow = exact._Narrow.of(tensors, [1] * count, tensors[0])
        assert narrow is not None
        scratch = exact.Scratch(exact.CHUNK)
        out = torch.empty(1 << 17, dtype=torch.bfloat16)
        for start in range(0, 1 << 17, exact.CHUNK):
            part = slice(start, start + exact.CHUNK)
            values = [tensor[part] for tensor in tensors]
            assert narrow.mean(values, [1] * count, out[part], part, scratch)
        assert 0 < len(narrow.left_over()) < 1 << 12
