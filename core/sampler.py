"""Euler's method along any velocity, from noise to data.

Reads nothing and writes nothing: the velocity is a function, so that a base, an expert, a soup and
an ensemble are sampled by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atoll.core import flow

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t `(batch, ...)`, t `(batch,)`) -> velocity `(batch, ...)`."""

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, t `(batch,)`, x_t, velocity), called before each step is taken."""


def times(steps: int, *, shift: float = 1.0) -> Tensor:
    """The `steps + 1` times from 1 to 0 of a solver, float32, shifted towards noise by `shift`.

    In the arithmetic of diffusers' flow-matching schedulers, whose Euler then takes the same path,
    bit for bit. Only the first time is set: some shifts round it to just below 1 or above, and at 1
    alone x_t says nothing.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed: 1 or more; cure: ask for at least one step")
    grid = flow.shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64).float(), shift)
    grid[0] = 1
    return grid


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance v = v_0 + s (v_c - v_0) (Ho & Salimans 2022, arXiv 2207.12598).

    `scale` is one for all, or broadcasts over the others.
    """
    return null + scale * (conditional - null)


def euler(
    velocity: Velocity, x_noise: Tensor, grid: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """Integrate dx/dt = velocity from `grid[0]` to `grid[-1]`, starting at `x_noise`."""
    x_t = x_noise
    for step in range(len(grid) - 1):
        t = torch.full((len(x_t),), float(grid[step]), dtype=x_t.dtype, device=x_t.device)
        v = velocity(x_t, t)
        if watch is not None:
            watch(step, t, x_t, v)
        x_t = x_t + (grid[step + 1] - grid[step]).to(x_t) * v
    return x_t
