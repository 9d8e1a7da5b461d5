"""Batches: each record once an epoch, and mirrored by a coin of its position."""

from __future__ import annotations

from pathlib import Path

import torch

from atoll.core.pack import Pack
from atoll.islands.data import Batches, rows_at
from atoll.islands.settings import DenoiserTraining

CPU = torch.device("cpu")


def test_each_record_is_seen_once_an_epoch(made: Path) -> None:
    pack = Pack(made / "shards" / "shard-00")
    seen: list[int] = []

    class Spy(Pack):
        def __init__(self) -> None:
            self.__dict__.update(pack.__dict__)

        def x_data(self, rows: torch.Tensor) -> torch.Tensor:
            seen.extend(rows.tolist())
            return pack.x_data(rows)

    config = DenoiserTraining()
    batches = Batches(Spy(), config, rows=pack.train, seed=0, stream="s", device=CPU)
    n = len(pack.train)
    for first in range(0, 2 * n, 5):
        batches(first, min(5, 2 * n - first))
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(pack.train)
    assert seen[:n] != seen[n:]


def test_flips_are_a_coin_of_the_position_and_spare_the_held_out(made: Path) -> None:
    pack = Pack(made / "shards" / "shard-00")
    plain = rows_at(pack, pack.train, 0, "s", first=0, count=400)
    pack.card = pack.card.model_copy(update={"flips": True})
    rows = rows_at(pack, pack.train, 0, "s", first=0, count=400)
    assert torch.equal(rows % len(pack), plain)  # the order is as it was
    mirrored = rows >= len(pack)
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(rows[37:90], rows_at(pack, pack.train, 0, "s", first=37, count=53))
    n = len(pack.train)
    first, second = mirrored[: 2 * n].chunk(2)
    assert not torch.equal(first, second)  # another coin in another epoch
    held_out = rows_at(pack, pack.held_out, 0, "s", first=0, count=400)
    assert set(held_out.tolist()) == set(pack.held_out)
    batches = Batches(pack, DenoiserTraining(), rows=pack.train, seed=0, stream="s", device=CPU)
    rows = rows_at(pack, pack.train, 0, "s", "order", first=8, count=8)
    batch, x_data = batches(8, 8), pack.x_data(rows)
    # x_t - t * velocity is x_data again.
    found = batch.x_t - batch.t[:, None, None, None] * batch.wanted
    assert torch.allclose(found, x_data, atol=1e-5)
