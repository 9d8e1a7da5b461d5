"""The order of records of several shapes: one shape a batch, every record its due, no state."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core import seeds
from atoll.core.buckets import Bucket, buckets_among
from atoll.core.manifest import Picture
from atoll.islands.turns import Turns, places

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
BATCH = st.integers(1, 24)
SEED = st.integers(0, 10)


def buckets_of(sizes: list[int]) -> list[Bucket]:
    """Buckets of these sizes behind one another, from row 3 on, each of a shape of its own."""
    shapes, end = [], 3
    for number, size in enumerate(sizes):
        start, end = end, end + size
        shapes.append((range(start, end), Picture(channels=1, height=4, width=4 + number)))
    return buckets_among(shapes, range(3, end))


def drawn(sizes: list[int], batch: int, seed: int, *, first: int, count: int) -> torch.Tensor:
    return places(buckets_of(sizes), seed, "s", "order", first=first, count=count, batch=batch)


@given(SIZES, BATCH, SEED, st.integers(1, 6))
def test_after_any_number_of_epochs_every_bucket_had_its_due_within_a_batch(
    sizes: list[int], batch: int, seed: int, epochs: int
) -> None:
    turns = Turns(tuple(sizes), batch, seed, ("s",))
    counts = np.array([turns.counts(epoch) for epoch in range(epochs)])
    whole = np.array(sizes) // batch
    assert ((counts == whole) | (counts == whole + 1)).all()
    had = np.cumsum(counts, axis=0)
    due = np.outer(np.arange(1, epochs + 1), sizes) / batch
    assert (np.abs(had - due) < 1).all()
    # What the turns say one by one is what they say of whole epochs.
    seen = [0] * len(sizes)
    by_epoch = [seen.copy()]
    for turn in range(int(had[-1].sum())):
        bucket, before = turns.at(turn)
        assert before == seen[bucket]
        seen[bucket] += 1
        by_epoch.append(seen.copy())
    for row in had:
        assert by_epoch[row.sum()] == row.tolist()


@given(SIZES, BATCH, SEED, st.integers(1, 8))
@settings(max_examples=50)
def test_every_record_is_seen_as_often_as_its_bucket_had_batches_for(
    sizes: list[int], batch: int, seed: int, epochs: int
) -> None:
    turns = Turns(tuple(sizes), batch, seed, ("s", "order"))
    batches = sum(sum(turns.counts(epoch)) for epoch in range(epochs))
    rows = drawn(sizes, batch, seed, first=0, count=batches * batch)
    seen = Counter(rows.tolist())
    for bucket in buckets_of(sizes):
        often = [seen[row] for run in bucket.runs for row in run]
        assert max(often) - min(often) <= 1
        # Never a batch away from one time an epoch.
        assert abs(sum(often) - epochs * len(bucket)) < max(batch, 2)
    assert set(seen) <= set(range(3, 3 + sum(sizes)))


def test_a_bucket_smaller_than_a_batch_has_its_due_on_average_over_seeds() -> None:
    """3 and 29 of 32 records, after one epoch; of 4,000 seeds the mean is 3/16 within 0.02."""
    had = [Turns((3, 29), 16, seed, ("s",)).counts(0) for seed in range(4_000)]
    assert np.abs(np.mean(had, axis=0) - np.array([3, 29]) / 16).max() < 0.02


@given(SIZES, BATCH, SEED, st.integers(0, 400), st.lists(st.integers(0, 24), max_size=4))
def test_every_batch_is_of_one_bucket_and_is_its_parts(
    sizes: list[int], batch: int, seed: int, turn: int, cuts: list[int]
) -> None:
    first = turn * batch
    whole = drawn(sizes, batch, seed, first=first, count=batch)
    assert sum(any(int(r) in run for r in whole for run in b.runs) for b in buckets_of(sizes)) == 1
    ends = [0, *sorted(min(cut, batch) for cut in cuts), batch]
    parts = [drawn(sizes, batch, seed, first=first + a, count=b - a) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)


@given(SIZES, BATCH, SEED, st.integers(0, 300), st.integers(0, 80))
def test_positions_that_are_no_whole_batches_are_those_of_the_batches(
    sizes: list[int], batch: int, seed: int, first: int, count: int
) -> None:
    whole = drawn(sizes, batch, seed, first=0, count=first + count)
    assert torch.equal(drawn(sizes, batch, seed, first=first, count=count), whole[first:])


@given(st.integers(1, 60), BATCH, SEED, st.integers(0, 300), st.integers(1, 80))
def test_one_bucket_is_the_order_of_its_records_whatever_the_batch(
    size: int, batch: int, seed: int, first: int, count: int
) -> None:
    plain = seeds.order(seed, "s", "order", first=first, count=count, n=size)
    rows = drawn([size], batch, seed, first=first, count=count)
    assert (rows.numpy() == plain + 3).all()


def test_epochs_have_turns_of_their_own() -> None:
    turns = Turns((64, 64), 8, 0, ("s",))
    one, two = ([turns.at(16 * epoch + turn)[0] for turn in range(16)] for epoch in range(2))
    assert Counter(one) == Counter(two) == {0: 8, 1: 8}
    assert one != two
    assert one != sorted(one)
    other = Turns((64, 64), 8, 1, ("s",))
    assert [other.at(turn)[0] for turn in range(16)] != one
