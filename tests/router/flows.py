"""Closed-form worlds as networks: what a solver and an ensemble are held against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.manifest import Picture
from atoll.router.component import EnsembleConfig
from atoll.router.forward import TextProjection
from atoll.router.model import EnsembleModel
from tests.router.conftest import World, _prompt


class SmoothWorld(World):
    """Every point a Gaussian of standard deviation `width`, so that velocities stay smooth at 0.

    x_t given its point is Gaussian about (1 - t) point with variance (1 - t)^2 width^2 + t^2.
    """

    width = 0.25

    def _variance(self, t: Tensor) -> Tensor:
        return (1 - t).square() * self.width**2 + t.square()

    def log_joint(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        time = t.reshape(-1, *([1] * self.points.ndim))
        gap = x_t[:, None] - (1 - time) * self.points[None]
        energy = gap.square().flatten(2).sum(dim=2) / (2 * self._variance(t)[:, None])
        return self.likelihood.to(x_t)[cond.pooled[:, 0].long()].log() - energy

    def velocity_over(self, chosen: Tensor, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """E[x_noise - x_data | x_t, c], linear in the point given the point."""
        weights = self.log_joint(x_t, t, cond)[:, chosen].softmax(dim=1)
        mean = torch.einsum("bn,n...->b...", weights, self.points.to(x_t)[chosen])
        time = t.reshape(-1, *([1] * (x_t.ndim - 1)))
        slope = (time - (1 - time) * self.width**2) / self._variance(time)
        return slope * (x_t - (1 - time) * mean) - mean


def smooth(world: World) -> SmoothWorld:
    """The same points with a width."""
    return SmoothWorld(world.points, world.shard, world.likelihood)


class Captions:
    """An encoder whose captions are numbers: each of its tokens is (1, number)."""

    def condition(self, captions: Sequence[str]) -> Conditioning:
        """As `Encoder.condition`: "" has two tokens, others three, and a last is never used."""
        number = torch.tensor([float(caption or 0) for caption in captions])
        mask = torch.arange(4)[None] < torch.where(number == 0, 2, 3)[:, None]
        tokens = torch.stack([torch.ones_like(number), number], dim=1)[:, None] * mask[:, :, None]
        return Conditioning(tokens, mask, nn.functional.normalize(tokens[:, 0], dim=1), number == 0)


def _as_world(cond: Conditioning) -> Conditioning:
    return _prompt([round(float(token[0, 1])) for token in cond.tokens])


class _Expert(nn.Module):
    def __init__(self, world: World, shard: int | None) -> None:
        super().__init__()
        self.world, self.chosen = world, torch.ones_like(world.shard, dtype=torch.bool)
        if shard is not None:
            self.chosen = world.shard == shard
        # Whoever asks a module for its dtype is answered by a weight.
        self.weight = nn.Parameter(torch.zeros(1, dtype=world.points.dtype))
        height, width = world.points.shape[2:]
        self.config = FrozenDict(
            in_channels=world.points.shape[1],
            out_channels=world.points.shape[1],
            sample_size=(height, width),
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        cond = _prompt([round(float(tokens[0, 1])) for tokens in encoder_hidden_states])
        return (self.world.velocity_over(self.chosen, sample, timestep.to(sample) / 1000, cond),)


class _Gate(nn.Module):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        wide = self.world.posterior(x_t.double(), t.double(), _as_world(cond))
        return wide.to(x_t)


def closed_form(world: World, *, whole: bool = False) -> EnsembleModel:
    """A world of `(n, channel, height, width)` as an ensemble, or `whole`, as its one expert."""
    shards = {"all": None} if whole else {name: k for k, name in enumerate(world.names)}
    channels, height, width = world.points.shape[1:]
    config = EnsembleConfig(
        picture=Picture(channels=channels, height=height, width=width),
        records={
            name: len(world.shard) if k is None else int((world.shard == k).sum())
            for name, k in shards.items()
        },
        missing=[],
    )
    experts = {
        name: Denoiser(
            _Expert(world, k),
            Card(
                name=name,
                kind="expert",
                shard=name,
                base_sha256=None,
                family="unet",
                prediction="velocity",
                latent_space="pixels",
                images_seen=1,
            ),
        )
        for name, k in shards.items()
    }
    return EnsembleModel(config, list(experts.values()), _Gate(world), TextProjection({}))


def solution(velocity: Any, x_noise: Tensor, *, start: float = 1.0, steps: int) -> Tensor:
    """x_data of an exact velocity `(x_t, t) -> v` by the classical Runge-Kutta method, float64."""
    x, grid = x_noise.double(), torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    for t, after in itertools.pairwise(grid):
        h = after - t
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, after)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
