"""The one convention against closed forms, inverses and derivatives."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.flow import Prediction

EPS = torch.finfo(torch.float32).eps
numbers = st.floats(-8, 8, width=32, allow_subnormal=False)
inner_times = st.floats(2.0**-10, 1 - 2.0**-10, width=32)


def _f32(*values: float) -> list[Tensor]:
    return [torch.tensor([[value]], dtype=torch.float32) for value in values]


@given(velocity=numbers, x_t=numbers, t=inner_times)
def test_x_data_round_trip_is_within_ulp_over_t(velocity: float, x_t: float, t: float) -> None:
    v, x = _f32(velocity, x_t)
    times = torch.tensor([t])
    back = flow.x_data_to_velocity(flow.velocity_to_x_data(v, x, times), x, times)
    ulp = EPS * (abs(x_t) + abs(t * velocity))
    assert abs(float(back - v)) <= 2 * ulp / t


@given(velocity=numbers, x_t=numbers, t=inner_times)
def test_epsilon_round_trip_is_within_ulp_over_1_minus_t(
    velocity: float, x_t: float, t: float
) -> None:
    v, x = _f32(velocity, x_t)
    times = torch.tensor([t])
    back = flow.epsilon_to_velocity(flow.velocity_to_epsilon(v, x, times), x, times)
    ulp = EPS * (abs(x_t) + abs((1 - t) * velocity))
    assert abs(float(back - v)) <= 2 * ulp / (1 - t)


@given(velocity=numbers, x_t=numbers, t=st.floats(0, 1, width=32))
def test_v_prediction_round_trip_is_within_ulp_at_every_t(
    velocity: float, x_t: float, t: float
) -> None:
    v, x = _f32(velocity, x_t)
    times = torch.tensor([t])
    back = flow.v_prediction_to_velocity(flow.velocity_to_v_prediction(v, x, times), x, times)
    # 1 / norm is at most the root of 2.
    assert abs(float(back - v)) <= 8 * EPS * (abs(x_t) + abs(velocity))


@given(x_data=numbers, x_noise=numbers, t=st.floats(0, 1, width=32))
def test_conversions_recover_both_ends_of_the_path(x_data: float, x_noise: float, t: float) -> None:
    data, noise = (value.double() for value in _f32(x_data, x_noise))
    times = torch.tensor([t], dtype=torch.float64)
    x_t = flow.interpolate(data, noise, times)
    velocity = flow.target(data, noise, times, Prediction.VELOCITY)
    torch.testing.assert_close(flow.velocity_to_x_data(velocity, x_t, times), data)
    torch.testing.assert_close(flow.velocity_to_epsilon(velocity, x_t, times), noise)
    v = flow.target(data, noise, times, Prediction.V_PREDICTION)
    torch.testing.assert_close(flow.velocity_to_v_prediction(velocity, x_t, times), v)
    # x = alpha z - sigma v of the variance-preserving point z = x_t / norm (Salimans & Ho 2022).
    length = flow.norm(times)
    torch.testing.assert_close(((1 - times) * x_t / length - times * v) / length, data)


def test_path_begins_at_data_and_ends_at_noise_bitwise() -> None:
    x = seeds.normal(0, "x", first=0, count=2, shape=(6, 3, 4, 4))
    data, noise = x[0], x[1]
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(6)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(6)), noise)


def test_times_belong_to_batch_rows_and_not_to_channels() -> None:
    data, noise = torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2)
    got = flow.interpolate(data, noise, torch.tensor([0.25, 0.75]))
    assert got[0].unique().tolist() == [0.25]
    assert got[1].unique().tolist() == [0.75]


def test_velocity_is_the_derivative_of_the_path() -> None:
    x = seeds.normal(1, "x", first=0, count=2, shape=(5, 1, 2, 2)).double()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    _, slope = torch.func.jvp(
        lambda times: flow.interpolate(x[0], x[1], times), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(slope, flow.target(x[0], x[1], t, Prediction.VELOCITY))


def _gaussian(x_t: Tensor, t: Tensor, *, mean: float, std: float) -> dict[Prediction, Tensor]:
    """Best predictions for data N(mean, std^2): linear regression on x_t, in closed form."""
    t = flow.expand(t, x_t)
    variance = (1 - t) ** 2 * std**2 + t**2
    away = (x_t - (1 - t) * mean) / variance
    x_data, epsilon = mean + (1 - t) * std**2 * away, t * away
    return {
        Prediction.X_DATA: x_data,
        Prediction.EPSILON: epsilon,
        Prediction.VELOCITY: epsilon - x_data,
        Prediction.V_PREDICTION: ((1 - t) * epsilon - t * x_data) / torch.hypot(1 - t, t),
    }


@pytest.mark.parametrize("prediction", list(Prediction))
def test_every_prediction_of_a_gaussian_gives_its_closed_form_velocity(
    prediction: Prediction,
) -> None:
    t = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    x_t = seeds.normal(2, "x", first=0, count=200, shape=(3,)).double()
    best = _gaussian(x_t, t, mean=0.4, std=0.3)
    torch.testing.assert_close(
        flow.to_velocity(best[prediction], x_t, t, prediction),
        best[Prediction.VELOCITY],
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("prediction", list(Prediction))
def test_target_is_what_the_conversion_expects(prediction: Prediction) -> None:
    x = seeds.normal(3, "x", first=0, count=2, shape=(9, 4)).double()
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x_t = flow.interpolate(x[0], x[1], t)
    wanted = flow.target(x[0], x[1], t, prediction)
    torch.testing.assert_close(flow.to_velocity(wanted, x_t, t, prediction), x[1] - x[0])


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_velocity_is_finite_at_both_ends(prediction: Prediction, end: float) -> None:
    output, x_t, t = torch.full((1, 4), 1.5), torch.full((1, 4), 0.5), torch.tensor([end])
    asked = flow.ask(x_t, t, prediction)
    velocity = flow.answer(output, asked, x_t, t, prediction)
    # Where the kind says nothing, its x_data a little away from the end is used instead.
    wanted = {
        (Prediction.EPSILON, 0.0): 1.0,
        (Prediction.EPSILON, 1.0): 0.5 - (0.5 * math.hypot(0.02, 0.98) - 0.98 * 1.5) / 0.02,
        (Prediction.X_DATA, 0.0): -1.0 / 5e-4,
        (Prediction.X_DATA, 1.0): -1.0,
        (Prediction.V_PREDICTION, 0.0): 1.0,
        (Prediction.V_PREDICTION, 1.0): 2.0,
    }.get((prediction, end), 1.5)
    torch.testing.assert_close(velocity, torch.full((1, 4), wanted), rtol=1e-4, atol=0)


@given(t=st.floats(0, 1), shift=st.floats(0.125, 8))
def test_shift_is_undone_by_its_inverse_and_keeps_the_ends(t: float, shift: float) -> None:
    times = torch.tensor([0.0, t, 1.0], dtype=torch.float64)
    there = flow.shift_times(times, shift)
    torch.testing.assert_close(flow.shift_times(there, 1 / shift), times, rtol=0, atol=1e-14)
    torch.testing.assert_close(there[[0, 2]], times[[0, 2]], rtol=0, atol=1e-15)
    # Signal to noise falls by the shift: t' / (1 - t') = shift t / (1 - t) (SD3, section 5.3.2).
    if 1e-6 < t < 1 - 1e-6:
        odds = float(there[1] / (1 - there[1]))
        assert math.isclose(odds, shift * t / (1 - t), rel_tol=1e-8)


def test_shift_1_changes_nothing() -> None:
    t = torch.linspace(0, 1, 101)
    assert torch.equal(flow.shift_times(t, 1.0), t)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.5)])
def test_logit_normal_has_its_closed_form_quantiles(mean: float, std: float) -> None:
    n = 40_000
    t = flow.logit_normal(seeds.normal(4, "t", first=0, count=n), mean=mean, std=std)
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        p = NormalDist(mean, std).cdf(math.log(q / (1 - q)))
        assert abs(float((t < q).float().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
