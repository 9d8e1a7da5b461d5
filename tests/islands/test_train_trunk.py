"""The trunk's labels and filters, its training against a closed-form posterior, and its resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from atoll.core import flow, seeds
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk, TrunkConfig, new_trunk
from atoll.islands import train_trunk
from atoll.islands.settings import HeadTraining, TrunkTraining
from atoll.islands.step import Errors
from atoll.islands.train_head import label_shares
from atoll.islands.train_trunk import Task, by_filter, by_label, label_loss, train_classifier
from tests.islands.test_train_head import SHIFT, STD, make_pack

SHAPE = {"channels": 1, "pooled": 4, "width": 8, "stride": 1}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Gaussian pictures, whose label says whether their mean is above 0."""
    return make_pack(tmp_path_factory.mktemp("packs") / "c", "c", 0.0, 1)


def train(place: Path, pack: Pack, task: Task, images: int = 19_200) -> Trunk:
    return train_classifier(
        Storage(place), "work", TrunkConfig(**SHAPE, labels=task.counts), pack, task,
        TrunkTraining(batch=64), Plan(batch=64, images_seen=images),
        seed=0, stream="trunk", threads=1, device="cpu",
    )  # fmt: skip


def bright(pack: Pack) -> Tensor:
    x_data = pack.x_data(torch.arange(len(pack)))
    return (x_data.mean(dim=(1, 2, 3)) > 0).long()


def test_labels_that_no_training_record_has_are_left_out(pack: Pack) -> None:
    labels = torch.full((2_000,), 4)
    labels[:500] = 1
    labels[1_500:] = 2  # held out
    task = by_label(list("abcdef"), labels, pack)
    assert task.counts == {"b": 500, "e": 1_000}
    rows = torch.tensor([0, 499, 500, 2_000 + 499])  # the last one is mirrored
    x_data, found = task.labelled(0, rows, torch.zeros(4, 1, 2, 2))
    assert found.tolist() == [0, 0, 1, 0]
    assert torch.equal(x_data, torch.zeros(4, 1, 2, 2))


def contents() -> Task:
    """Two contents, by whether a row's number is odd."""
    return Task({"even": 3, "odd": 2}, lambda _first, rows, x_data: (x_data, rows % 2))


def test_filters_are_linear_seeded_by_position_and_half_change_nothing() -> None:
    task = by_filter(contents(), 3, 2)
    x_data = seeds.normal(0, "x", first=0, count=1_024, shape=(2, 5, 6))
    rows = torch.arange(1_024) // 3
    made, label = task.labelled(1_000, rows, x_data)
    content, filtered = label // 16, label % 16
    assert torch.equal(content, rows % 2)
    assert set(filtered.tolist()) == set(range(16))
    same = (made == x_data).flatten(1).all(dim=1)
    assert torch.equal(same, filtered == 0)
    assert float(same.float().mean()) == pytest.approx(17 / 32, abs=0.05)
    again = by_filter(contents(), 3, 2).labelled(1_100, rows[100:], x_data[100:])
    assert torch.equal(again[0], made[100:])
    assert torch.equal(again[1], label[100:])
    zero, _ = task.labelled(1_000, rows, torch.zeros_like(x_data))
    double, _ = task.labelled(1_000, rows, 2 * x_data)
    torch.testing.assert_close(double - zero, 2 * (made - zero), rtol=1e-4, atol=1e-4)
    assert not torch.equal(by_filter(contents(), 4, 2).labelled(1_000, rows, x_data)[0], made)


def test_a_label_is_a_content_and_a_filter_at_their_shares() -> None:
    counts = by_filter(contents(), 3, 2).counts
    assert list(counts)[:2] == ["even/filter-00", "even/filter-01"]
    assert list(counts)[16] == "odd/filter-00"
    assert [counts[name] for name in ("even/filter-00", "even/filter-15")] == [3 * 17, 3]
    assert sum(counts.values()) == 32 * (3 + 2)


def test_the_loss_is_a_function_of_positions(pack: Pack) -> None:
    task = by_label(["dark", "bright"], bright(pack), pack)
    trunk = new_trunk(TrunkConfig(**SHAPE, labels=task.counts), seed=0)
    loss = label_loss(trunk, pack, task, TrunkTraining(), seed=0, stream="s")
    whole, parts = loss(0, 48), [loss(0, 20), loss(20, 28)]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    torch.testing.assert_close(whole.each, torch.cat([part.each for part in parts]))


def test_it_learns_the_posterior_of_a_label(pack: Pack, tmp_path: Path) -> None:
    """Two Gaussian halves at +-SHIFT, told apart by a row's number: the logit is linear in x_t."""
    side = torch.arange(2_000) % 2
    shifted = make_pack(tmp_path / "b", "b", 0.0, 1)

    def labelled(_first: int, rows: Tensor, x_data: Tensor) -> tuple[Tensor, Tensor]:
        return x_data + (SHIFT * (2 * side[rows] - 1))[:, None, None, None], side[rows]

    trunk = train(tmp_path, shifted, Task({"low": 750, "high": 750}, labelled))
    rows = torch.tensor(shifted.held_out)
    x_data, wanted = labelled(0, rows, shifted.x_data(rows))
    noise = seeds.normal(9, "test", first=0, count=len(rows), shape=(1, 4, 4))
    for t in (0.3, 0.7):
        times = torch.full((len(rows),), t)
        x_t = flow.interpolate(x_data, noise, times)
        variance = ((1 - t) * STD) ** 2 + t**2
        exact = 2 * (1 - t) * SHIFT * x_t.sum(dim=(1, 2, 3)) / variance
        best = functional.binary_cross_entropy_with_logits(exact, wanted.float())
        logits = trunk.logits(x_t, times, shifted.null.expand(len(rows)))
        assert float(functional.cross_entropy(logits, wanted)) < float(best) + 0.06
    # A shard of which three in four are high has just these shares of the labels.
    shares = label_shares(trunk, _three_in_four_high(tmp_path), HeadTraining(), seed=0).exp()
    assert shares.tolist() == pytest.approx([0.25, 0.75], abs=0.12)


def _three_in_four_high(folder: Path) -> Pack:
    pack = make_pack(folder / "d", "d", 0.0, 1)
    plain = pack.x_data
    high = torch.arange(2_000) % 4 > 0

    def x_data(rows: Tensor) -> Tensor:
        return plain(rows) + (SHIFT * (2.0 * high[rows] - 1))[:, None, None, None]

    pack.x_data = x_data  # type: ignore[method-assign]
    return pack


def test_a_killed_training_is_bitwise_the_undisturbed_one(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = by_filter(by_label(["dark", "bright"], bright(pack), pack), 0, 1)
    undisturbed = train(tmp_path / "one", pack, task, images=640)
    real, calls = label_loss, 0

    def dies(*given: object, **named: object):  # type: ignore[no-untyped-def]
        loss = real(*given, **named)  # type: ignore[arg-type]

        def stops(first: int, count: int) -> Errors:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise KeyboardInterrupt
            return loss(first, count)

        return stops

    monkeypatch.setattr(train_trunk, "label_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "two", pack, task, images=640)
    resumed = train(tmp_path / "two", pack, task, images=640)
    assert calls < 18  # from the commit half-way, not from the start
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
