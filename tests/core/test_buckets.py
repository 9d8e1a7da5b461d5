"""Buckets: the rows of one shape, wherever they stand in a pack."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.core.buckets import buckets_among
from atoll.core.manifest import Picture

RUNS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=6)


@given(RUNS, st.integers(0, 30), st.integers(0, 30))
def test_a_bucket_knows_its_rows_wherever_they_stand(
    runs: list[tuple[int, int]], start: int, stop: int
) -> None:
    shapes, kinds = [], []
    for length, kind in runs:
        picture = Picture(channels=1, height=4, width=4 + kind)
        shapes.append((range(len(kinds), len(kinds) + length), picture))
        kinds += [kind] * length
    asked = range(start, min(stop, len(kinds)))
    wanted: dict[int, list[int]] = {}
    for row in asked:
        wanted.setdefault(kinds[row], []).append(row)
    found = buckets_among(shapes, asked)
    assert [bucket.picture.width - 4 for bucket in found] == list(wanted)
    for bucket, rows in zip(found, wanted.values(), strict=True):
        assert len(bucket) == len(rows)
        assert bucket.rows(torch.arange(len(bucket))).tolist() == rows
        assert bucket.rows(torch.arange(len(bucket)).flip(0)).tolist() == rows[::-1]
