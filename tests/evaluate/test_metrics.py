"""Distances against closed forms, and intervals against what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import DataError
from atoll.evaluate import metrics


def _normal(word: str, n: int, dim: int) -> Tensor:
    return seeds.normal(0, "test", word, first=0, count=n, shape=(dim,)).double()


def _exactly(word: str, n: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Rows whose sample mean and covariance are the given ones to rounding."""
    rows = _normal(word, n, len(mean))
    rows = rows - rows.mean(dim=0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T)))
    coloured: Tensor = rows @ whiten.T @ torch.linalg.cholesky(covariance).T + mean
    return coloured


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    a = _exactly("a", 50, torch.zeros(3).double(), torch.diag(torch.tensor([4.0, 1, 9]).double()))
    b = _exactly("b", 70, mean, torch.diag(torch.tensor([1.0, 16, 9]).double()))
    # Diagonal covariances commute: sum of (sqrt a - sqrt b)^2, here 1 + 9 + 0.
    assert metrics.frechet_distance(a, b) == pytest.approx(5.25 + 10, rel=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    first = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double()
    second = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    zero = torch.zeros(2).double()
    found = metrics.frechet_distance(
        _exactly("a", 40, zero, first), _exactly("b", 40, zero, second)
    )
    # In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)).
    product = first @ second
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    assert found == pytest.approx(float(first.trace() + second.trace()) - 2 * root, rel=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(200, 8), (20, 64)])
def test_frechet_distance_to_itself_is_0_also_when_singular(n: int, dim: int) -> None:
    rows = _normal("a", n, dim)
    assert metrics.frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_moves_with_a_shift_when_singular() -> None:
    rows = _normal("a", 12, 40)
    assert metrics.frechet_distance(rows, rows + 0.5) == pytest.approx(40 * 0.25, rel=1e-9)


def test_kid_is_the_double_sum_it_is_defined_by() -> None:
    a, b = _normal("a", 12, 3), _normal("b", 15, 3) + 0.3

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (12 * 11)
    within += sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (15 * 14)
    across = sum(k(x, y) for x in a for y in b) / (12 * 15)
    assert metrics.kid(a, b, seed=0).value == pytest.approx(within - 2 * across, rel=1e-10)


def test_kid_of_one_law_covers_0_and_of_two_laws_does_not() -> None:
    a, b = _normal("a", 150, 8), _normal("b", 150, 8)
    low, high = metrics.kid(a, b, seed=0).interval()
    assert low < 0 < high
    low, _ = metrics.kid(a + 1, b, seed=0).interval()
    assert low > 0


def test_kid_interval_covers_the_truth_as_often_as_it_says() -> None:
    """KID is unbiased, so the mean over many repetitions stands for the truth."""
    values, intervals = [], []
    for i in range(100):
        a, b = _normal(f"a{i}", 60, 4) + 0.5, _normal(f"b{i}", 60, 4)
        found = metrics.kid(a, b, seed=1)
        values.append(found.value)
        intervals.append(found.interval())
    truth = sum(values) / len(values)
    assert sum(low <= truth <= high for low, high in intervals) >= 88


def test_kid_interval_is_about_as_wide_as_the_spread_of_values() -> None:
    found = [
        metrics.kid(_normal(f"a{i}", 80, 4) + 1, _normal(f"b{i}", 80, 4), seed=0) for i in range(60)
    ]
    spread = torch.tensor([j.value for j in found]).std().item()
    said = math.sqrt(sum(j.variance for j in found) / len(found))
    assert 0.7 < said / spread < 1.5


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    noise, real = _normal("noise", 100, 8), _normal("real", 100, 8)
    better, worse = metrics.kid(noise + 0.30, real, seed=0), metrics.kid(noise + 0.34, real, seed=0)
    assert better.interval()[1] > worse.interval()[0]
    assert (better - worse).interval()[1] < 0


def test_precision_and_recall_on_constructed_sets() -> None:
    real = torch.cat([_normal("a", 40, 2), _normal("b", 40, 2) + 100])
    half = real[:40] + 1e-6
    quality, _ = metrics.measure(half, real, seed=0)
    assert quality.precision.value == 1
    assert quality.recall.value == 0.5
    far, _ = metrics.measure(real + 1000, real, seed=0)
    assert far.precision.value == far.recall.value == 0
    assert far.precision.high > 0  # 0 of N is no proof of 0


def test_a_copy_of_a_repeated_row_lies_in_its_ball_of_radius_0() -> None:
    repeated = torch.full((12, 3), 0.1).double()
    assert metrics.coverage(repeated[:5], repeated, seed=0).value == 1


def test_an_estimate_says_n_and_contains_its_value() -> None:
    quality, _ = metrics.measure(_normal("a", 30, 64), _normal("b", 40, 64), seed=0)
    for estimate in (quality.kid, quality.frechet, quality.precision, quality.recall):
        assert (estimate.n, estimate.n_reference) == (30, 40)
        assert estimate.low <= estimate.value <= estimate.high
    assert "mostly bias" in quality.frechet.note


def test_too_few_pictures_are_refused_with_a_cure() -> None:
    with pytest.raises(DataError, match="too few"):
        metrics.measure(_normal("a", 9, 2), _normal("b", 50, 2), seed=0)


def test_groups_are_seeded_balanced_and_the_same_for_every_system() -> None:
    group = metrics.groups(50, seed=3, side=0)
    assert torch.equal(group, metrics.groups(50, seed=3, side=0))
    assert not torch.equal(group, metrics.groups(50, seed=4, side=0))
    assert set(torch.bincount(group).tolist()) == {2, 3}


@pytest.mark.parametrize(("freedom", "table"), [(9, 2.262), (19, 2.093), (99, 1.984)])
def test_student_is_the_tabled_quantile(freedom: int, table: float) -> None:
    assert metrics.student(freedom) == pytest.approx(table, abs=2e-3)


def test_wilson_is_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263.
    low, high = metrics.wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert metrics.wilson(0, 20)[0] == 0
    assert metrics.wilson(20, 20)[1] == 1
