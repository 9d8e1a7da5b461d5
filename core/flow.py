"""The one convention: the linear path, its velocity, and conversions between predictions.

t = 0 is data and t = 1 is noise; x_t = (1 - t) x_data + t x_noise and
velocity = dx_t/dt = x_noise - x_data (rectified flow, Liu et al. 2022, arXiv 2209.03003, eq. 1;
flow matching, Lipman et al. 2022, arXiv 2210.02747). Only this file interpolates, forms targets or
converts predictions. Times are `(batch,)` and broadcast over the trailing dimensions of x.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor


class Prediction(StrEnum):
    """What a denoiser's network puts out."""

    VELOCITY = "velocity"
    EPSILON = "epsilon"
    X_DATA = "x_data"


def expand(t: Tensor, like: Tensor) -> Tensor:
    """View times `(batch,)` so that they broadcast over `like` `(batch, ...)`."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x_data: Tensor, x_noise: Tensor, t: Tensor) -> Tensor:
    """The point x_t on the straight path from data to noise."""
    t = expand(t, x_data)
    return (1 - t) * x_data + t * x_noise


def target(x_data: Tensor, x_noise: Tensor, prediction: Prediction) -> Tensor:
    """What a network of this kind should have put out."""
    match prediction:
        case Prediction.VELOCITY:
            return x_noise - x_data
        case Prediction.EPSILON:
            return x_noise
        case Prediction.X_DATA:
            return x_data


def velocity_to_x_data(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x_data = x_t - t velocity; exact for every t."""
    return x_t - expand(t, x_t) * velocity


def velocity_to_epsilon(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """epsilon = x_t + (1 - t) velocity; exact for every t."""
    return x_t + (1 - expand(t, x_t)) * velocity


def epsilon_to_velocity(epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """velocity = (epsilon - x_t) / (1 - t); undefined at t = 1, where x_t is the noise itself."""
    return (epsilon - x_t) / (1 - expand(t, x_t))


def x_data_to_velocity(x_data: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """velocity = (x_t - x_data) / t; undefined at t = 0, where x_t is the data itself."""
    return (x_t - x_data) / expand(t, x_t)


_TO_VELOCITY: dict[Prediction, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Prediction.VELOCITY: lambda output, _x_t, _t: output,
    Prediction.EPSILON: epsilon_to_velocity,
    Prediction.X_DATA: x_data_to_velocity,
}

# A conversion stays away from the end where its kind of prediction says nothing about the velocity.
# Epsilon is asked for at t = 1 by every trajectory: an error of it is divided by 1 - t and taken
# over a whole solver step, so t is held a step of 50 away. Nobody asks for a velocity at t = 0.
_SPAN: dict[Prediction, tuple[float, float]] = {
    Prediction.VELOCITY: (0.0, 1.0),
    Prediction.EPSILON: (0.0, 0.98),
    Prediction.X_DATA: (5e-4, 1.0),
}


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """A network's output as velocity, with t held inside the span where that is defined."""
    low, high = _SPAN[prediction]
    return _TO_VELOCITY[prediction](output, x_t, t.clamp(low, high))


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise by t' = s t / (1 + (s - 1) t) (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times from standard normals: t = sigmoid(mean + std z) (SD3, eq. 19)."""
    return torch.sigmoid(mean + std * normal)


def mode(uniform: Tensor, *, scale: float) -> Tensor:
    """Training times from uniforms in (0, 1), with heavy tails where `scale` is above 0.

    t = 1 - u - s (cos^2(pi u / 2) - 1 + u) (SD3, eq. 20); monotone for s in [-1, 2 / (pi - 2)].
    """
    bend = torch.cos(torch.pi / 2 * uniform).square() - 1 + uniform
    return 1 - uniform - scale * bend


def snr(t: Tensor) -> Tensor:
    """Signal-to-noise ratio ((1 - t) / t)^2 of the path at `t`."""
    return ((1 - t) / t).square()


def error_scale(t: Tensor, prediction: Prediction) -> Tensor:
    """How large an error of the velocity is in a prediction's own units; exact on this path.

    From x_data = x_t - t v and epsilon = x_t + (1 - t) v.
    """
    match prediction:
        case Prediction.VELOCITY:
            return torch.ones_like(t)
        case Prediction.EPSILON:
            return 1 - t
        case Prediction.X_DATA:
            return t
