"""Randomness against its definition, an independent Philox, and the laws that it should follow."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.core import seeds

_MASK = (1 << 64) - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10, written from Salmon et al. 2011, section 3.3; four words for one counter."""
    x = [(counter >> (64 * i)) & _MASK for i in range(4)]
    k = [key & _MASK, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [
            (second >> 64) ^ x[1] ^ k[0],
            second & _MASK,
            (first >> 64) ^ x[3] ^ k[1],
            first & _MASK,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) & _MASK, (k[1] + 0xBB67AE8584CAA73B) & _MASK]
    return x


def test_reference_gives_the_published_known_answer() -> None:
    # Random123, kat_vectors: philox4x64 10, counter 0 and key 0.
    assert philox(0, 0) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(("first", "each"), [(0, 1), (0, 4), (5, 3), (7, 6), (10**12, 9)])
def test_items_are_philox_of_their_own_counters(first: int, each: int) -> None:
    key = int.from_bytes(hashlib.sha256(b"7\x1fa\x1f3").digest()[:16], "little")
    got = seeds.uniform(7, "a", 3, first=first, count=3, each=each)
    blocks = -(-each // 4)
    for row in range(3):
        start = (first + row) * blocks + 1  # numpy counts up before it draws
        words = [w for block in range(blocks) for w in philox(start + block, key)][:each]
        assert got[row].tolist() == [((word >> 12) + 0.5) / 2**52 for word in words]


def test_uniform_numbers_never_reach_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.array([[0, _MASK]], dtype=np.uint64)
    monkeypatch.setattr(seeds, "_words", lambda *_: ends)
    low, high = seeds.uniform(0, first=0, count=1, each=2)[0].tolist()
    assert 0 < low < high < 1
    finite = seeds.normal(0, first=0, count=1, shape=(4,))
    assert torch.isfinite(finite).all()


shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@given(
    first=st.integers(0, 10**9),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    shape=shapes,
)
def test_noise_of_an_item_does_not_depend_on_its_batch(
    first: int, cuts: list[int], shape: tuple[int, ...]
) -> None:
    whole = seeds.normal(3, "noise", first=first, count=sum(cuts), shape=shape)
    parts, at = [], first
    for count in cuts:
        parts.append(seeds.normal(3, "noise", first=at, count=count, shape=shape))
        at += count
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (sum(cuts), *shape)
    assert whole.dtype == torch.float32


@given(first=st.integers(0, 10**6), count=st.integers(1, 9), each=st.integers(1, 9))
def test_uniforms_of_an_item_do_not_depend_on_their_batch(
    first: int, count: int, each: int
) -> None:
    whole = seeds.uniform(3, "u", first=first, count=count, each=each)
    alone = [seeds.uniform(3, "u", first=first + i, count=1, each=each) for i in range(count)]
    assert torch.equal(torch.cat(alone), whole)


def _ks(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n); above 1.95 once in a thousand."""
    n = len(values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps - cdf, cdf - steps + 1 / n).max()) * math.sqrt(n)


def test_normals_are_standard_normal() -> None:
    n = 200_000
    x = seeds.normal(11, "x", first=0, count=n // 2, shape=(2,)).flatten().double().sort().values
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * math.sqrt(spread / n)
    assert _ks(x, torch.special.ndtr(x)) < 1.95
    # The tails, which the statistic hardly sees.
    p = 2 * NormalDist().cdf(-3.5)
    assert abs(int((x.abs() > 3.5).sum()) - n * p) < 4 * math.sqrt(n * p)


def test_pairs_of_one_draw_are_independent() -> None:
    x = seeds.normal(12, "x", first=0, count=100_000, shape=(2,)).double()
    for left, right in ((x[:, 0], x[:, 1]), (x[:-1, 0], x[1:, 0]), (x[:, 0] ** 2, x[:, 1] ** 2)):
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 4 / math.sqrt(1e5)


def test_uniforms_are_uniform() -> None:
    u = seeds.uniform(13, "u", first=0, count=100_000).flatten().sort().values
    assert _ks(u, u) < 1.95


def test_streams_are_named_by_all_their_words() -> None:
    draws = [
        seeds.normal(*words, first=0, count=5_000)
        for words in ((0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "b", "a"))
    ]
    correlation = torch.corrcoef(torch.stack(draws).double()) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(5_000)


def test_words_do_not_run_into_each_other() -> None:
    keys = {seeds.key(1, "2"), seeds.key(12), seeds.key(1, "2", ""), seeds.key(1, "", "2")}
    assert len(keys) == 4
    assert all(0 <= key < 1 << 128 for key in keys)


def test_generator_is_a_function_of_seed_and_words() -> None:
    def draw(*words: str | int) -> list[float]:
        return torch.rand(3, generator=seeds.generator(5, *words)).tolist()

    assert draw("a") == draw("a")
    assert draw("a") != draw("b")


def test_drawing_touches_no_global_generator() -> None:
    torch.manual_seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    seeds.normal(0, first=0, count=3)
    seeds.order(0, first=0, count=9, n=4)
    torch.rand(1, generator=seeds.generator(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()


@given(n=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 3))
def test_every_epoch_has_each_record_once(n: int, epoch: int, seed: int) -> None:
    rows = seeds.order(seed, "order", first=epoch * n, count=n, n=n)
    assert sorted(rows.tolist()) == list(range(n))


@given(n=st.integers(1, 12), first=st.integers(0, 60), cuts=st.lists(st.integers(1, 9), max_size=8))
def test_order_does_not_depend_on_batch_cuts(n: int, first: int, cuts: list[int]) -> None:
    whole = seeds.order(2, "order", first=first, count=sum(cuts), n=n).tolist()
    at, parts = first, []
    for count in cuts:
        parts += seeds.order(2, "order", first=at, count=count, n=n).tolist()
        at += count
    assert parts == whole


def test_epochs_are_permutations_of_their_own() -> None:
    epochs = {tuple(seeds.order(0, "o", first=e * 20, count=20, n=20)) for e in range(20)}
    assert len(epochs) == 20
    first = np.array([seeds.order(s, "o", first=0, count=1, n=4)[0] for s in range(2000)])
    counts = np.bincount(first, minlength=4)
    assert float(((counts - 500) ** 2 / 500).sum()) < 16.3  # chi-square, 3 degrees, one in 1000


def test_permutations_are_kept_within_bounds_and_the_same_when_made_again() -> None:
    permutation = seeds._Permutations(8 * 250)
    kept = permutation(1, 100)
    assert permutation(1, 100) is kept
    permutation(2, 100)
    permutation(1, 100)
    permutation(3, 100)  # no room for three: the one used longest ago goes
    assert permutation.bytes == 8 * 200
    assert permutation(1, 100) is kept
    again = permutation(2, 100)
    assert sorted(again.tolist()) == list(range(100))
    assert np.array_equal(again, seeds._Permutations(0)(2, 100))
    assert len(permutation(4, 1000)) == 1000  # one that is larger than the bound stands alone
    assert permutation.bytes == 8 * 1000


def test_fraction_is_the_hash_that_it_says() -> None:
    digest = hashlib.sha256(b"held-out\x1frecord-1").digest()
    assert seeds.fraction("record-1", salt="held-out") == int.from_bytes(digest[:7], "little") / (
        1 << 56
    )


def test_fractions_are_uniform_and_salts_independent() -> None:
    texts = [str(i) for i in range(20_000)]
    a, b = (
        torch.tensor([seeds.fraction(t, salt=salt) for t in texts], dtype=torch.float64)
        for salt in ("commons", "held-out")
    )
    assert _ks(a.sort().values, a.sort().values) < 1.95
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(len(texts))
    assert float(a.min()) >= 0
    assert float(a.max()) < 1


def test_golden_values_so_that_no_split_and_no_noise_ever_moves() -> None:
    assert seeds.fraction("a record", salt="held-out") == GOLDEN_FRACTION
    assert seeds.key(0, "order") == GOLDEN_KEY
    assert seeds.order(0, "order", first=3, count=8, n=5).tolist() == GOLDEN_ORDER
    assert seeds.normal(0, "x_noise", first=9, count=1, shape=(3,)).tolist() == [GOLDEN_NORMAL]


GOLDEN_FRACTION = 0.12266580528716747
GOLDEN_KEY = 256676727900642648209720560929007441874
GOLDEN_ORDER = [0, 3, 2, 0, 4, 1, 3, 0]
GOLDEN_NORMAL = [-0.29050135612487793, -0.9202457666397095, -1.4608538150787354]
