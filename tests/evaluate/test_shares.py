"""Shares of shards and the reader of labels, on sets whose answer is known."""

from __future__ import annotations

import pytest
import torch

from atoll.core import seeds
from atoll.evaluate import shares
from atoll.evaluate.reader import Reader

NAMES = ("one", "two", "three")


def test_nearest_centre_is_by_direction_not_by_length() -> None:
    instrument = shares.from_centroids(NAMES, torch.eye(3) * torch.tensor([[1.0], [9.0], [0.2]]))
    features = torch.tensor([[0.1, 0, 0], [50.0, 49, 0], [0, 1, 2.0], [0, 0, 0.01]])
    assert instrument.nearest(features).tolist() == [0, 0, 2, 2]
    assert instrument.count(features).tolist() == [2, 0, 2]


def test_owners_shards_are_measured_by_their_records_mean_direction() -> None:
    rows = {"ann": torch.tensor([[1.0, 0.1], [2.0, -0.2]]), "bob": torch.tensor([[0.0, 3.0]])}
    instrument = shares.from_records(rows)
    assert instrument.names == ("ann", "bob")
    assert instrument.nearest(torch.tensor([[5.0, 1.0], [1.0, 5.0]])).tolist() == [0, 1]


def test_what_is_read_as_its_own_is_counted_shard_by_shard() -> None:
    instrument = shares.from_centroids(NAMES, torch.eye(3))
    features = torch.eye(3)[[0, 1, 1, 1, 2, 0]]
    of = ["one", "one", "two", "two", "commons", "two"]
    # "three" has no records here, and the commons is nobody's.
    assert instrument.own(features, of) == {"one": 1 / 2, "two": 2 / 3}


def test_a_shard_of_unlike_contents_is_hardly_known_by_its_mean() -> None:
    def towards(*degrees: float) -> torch.Tensor:
        angle = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    features = {"mixed": towards(0, 90, 180), "right": towards(20, 21), "left": towards(160)}
    instrument = shares.from_records(features)
    of = [name for name, rows in features.items() for _ in rows]
    own = instrument.own(torch.cat(list(features.values())), of)
    assert own == {"mixed": 1 / 3, "right": 1, "left": 1}


def test_total_variation_is_half_the_absolute_difference() -> None:
    found = shares.compare(NAMES, torch.tensor([50, 50, 0]), torch.tensor([25, 25, 50]), seed=0)
    assert found.distance.value == 0.5
    assert found.counts == {"one": 50, "two": 50, "three": 0}
    assert found.distance.low < 0.5 < found.distance.high
    assert found.noise_level < found.distance.low


def test_equal_shares_stay_within_noise() -> None:
    found = shares.compare(NAMES, torch.tensor([52, 31, 17]), torch.tensor([50, 30, 20]), seed=0)
    assert found.distance.low <= found.noise_level
    # Mean absolute difference of two multinomials, by the normal approximation.
    assert found.noise_level == pytest.approx(0.073, abs=0.02)


def test_noise_falls_with_the_square_root_of_n() -> None:
    few = shares.compare(NAMES, torch.tensor([50, 30, 20]), torch.tensor([50, 30, 20]), seed=0)
    many = shares.compare(
        NAMES, torch.tensor([800, 480, 320]), torch.tensor([800, 480, 320]), seed=0
    )
    assert few.noise_level / many.noise_level == pytest.approx(4, rel=0.15)


def test_comparison_is_seeded() -> None:
    counts = torch.tensor([5, 3, 2]), torch.tensor([4, 4, 2])
    assert shares.compare(NAMES, *counts, seed=1) == shares.compare(NAMES, *counts, seed=1)
    assert shares.compare(NAMES, *counts, seed=1) != shares.compare(NAMES, *counts, seed=2)


def test_reader_reads_the_nearest_real_picture() -> None:
    real = torch.tensor([0, 10, 200, 210], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    reader = Reader(real, ["dark", "dark", "bright", "bright"])
    made = torch.tensor([0.9, -0.95, 0.2]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert reader.read_labels(made) == ["bright", "dark", "bright"]
    reading = reader.reading(made, ["bright", "dark", "dark"])
    assert reading.accuracy.value == pytest.approx(2 / 3)
    assert reading.accuracy.n == 3
    assert reading.by_label == {"bright": (1, 1), "dark": (1, 2)}
    assert reading.accuracy.low < 2 / 3 < reading.accuracy.high


def test_readers_own_accuracy_leaves_each_picture_out() -> None:
    noise = (seeds.normal(0, "test", first=0, count=8, shape=(1, 4, 4)) * 20).clamp(-60, 60)
    near = torch.cat([noise[:4] + 60, noise[4:] + 190]).to(torch.uint8)
    assert Reader(near, ["a"] * 4 + ["b"] * 4).own_accuracy().value == 1
    assert Reader(near, list("abcdefgh")).own_accuracy().value == 0


def test_reader_wants_a_label_a_picture() -> None:
    with pytest.raises(ValueError, match="one label a picture"):
        Reader(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), ["a"])
