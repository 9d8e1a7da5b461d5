"""Shares of a batch, and what one process by itself says to itself."""

from __future__ import annotations

import pytest
import torch

from atoll.core.checkpoint import Piece
from atoll.islands.group import Group


def rank_of(rank: int, world: int) -> Group:
    group = Group()
    group.rank, group.world = rank, world
    return group


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [7, 8, 64])
def test_shares_are_the_batch_in_order_and_as_equal_as_can_be(world: int, count: int) -> None:
    shares = [rank_of(rank, world).share(100, count) for rank in range(world)]
    positions = [first + i for first, part in shares for i in range(part)]
    assert positions == list(range(100, 100 + count))
    sizes = [part for _, part in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_agrees_with_itself() -> None:
    group = Group()
    assert group.leads
    assert group.any(True, False) == (True, False)
    assert group.gather("x") == group.gather_files("x") == ["x"]
    assert float(group.sum(torch.tensor(3.0))) == 3.0
    assert group.alone().leave is group.leave


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_pieces_are_the_whole_as_torch_chunks_it(rows: int, count: int) -> None:
    whole = torch.arange(rows * 3).reshape(rows, 3)
    pieces = [Piece(index, count).of(whole) for index in range(count)]
    assert torch.equal(torch.cat(pieces), whole)
    chunks = whole.chunk(count)
    assert [len(piece) for piece in pieces[: len(chunks)]] == [len(chunk) for chunk in chunks]
    assert all(len(piece) == 0 for piece in pieces[len(chunks) :])
    assert Piece(count - 1, count).of(torch.tensor(2.0)) == 2.0
