"""Batches of conditioning: picking, dropping, repeating and joining rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.conditioning import Conditioning, concatenate

MakeCond = Callable[..., Conditioning]
FIELDS = ("tokens", "mask", "pooled", "is_null")


def same(one: Conditioning, other: Conditioning) -> bool:
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in FIELDS)


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), torch.tensor([3, 0, 3]), torch.tensor([True, False, True, False])],
    ids=["slice", "rows", "mask"],
)
def test_rows_are_picked_alike_in_every_part(index: Tensor | slice, cond: MakeCond) -> None:
    c = cond(4)
    for field in FIELDS:
        assert torch.equal(getattr(c[index], field), getattr(c, field)[index])
    assert len(c) == 4


@given(drop=st.lists(st.booleans(), min_size=5, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dropped_rows_are_null_and_the_others_untouched(drop: list[bool], cond: MakeCond) -> None:
    null, c = cond(1), cond(6)[1:]
    got = c.dropped(torch.tensor(drop), null)
    for row, dropped in enumerate(drop):
        assert same(got[row : row + 1], null if dropped else c[row : row + 1])
    assert got.is_null.tolist() == drop


def test_single_row_is_repeated(cond: MakeCond) -> None:
    repeated = cond(4)[2:3].expand(3)
    assert len(repeated) == 3
    for row in range(3):
        assert same(repeated[row : row + 1], cond(4)[2:3])


def test_joined_parts_are_split_again(cond: MakeCond) -> None:
    joined = concatenate([cond(2), cond(3)])
    assert same(joined[:2], cond(2))
    assert same(joined[2:], cond(3))


def test_to_follows_the_dtype_of_numbers_alone(cond: MakeCond) -> None:
    c = cond(3).to(torch.zeros(1, dtype=torch.float64))
    assert (c.tokens.dtype, c.pooled.dtype) == (torch.float64, torch.float64)
    assert (c.mask.dtype, c.is_null.dtype) == (torch.bool, torch.bool)
