"""The training step on one page: batch, loss, gradient, guard, optimiser, averages.

Flow matching on the linear path (Lipman et al. 2022, arXiv 2210.02747, eq. 23): the network learns
E[x_noise - x_data | x_t, t, cond], or another prediction of the same two ends; on a noise schedule
it is given that path's point in the place of x_t (`core/flow.py`). Everything random is a function
of (seed, stream, images_seen), so a resumed training sees the very batches that an uninterrupted
one would have seen. Imports nothing heavier than torch, diffusers and safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.core import flow
from atoll.core.denoiser import Denoiser
from atoll.core.flow import Prediction
from atoll.islands.data import Batch
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.settings import DenoiserTraining, WeightConfig

# Noised held-out records that the averages are compared on, and how many at once.
_HELD_OUT, HELD_OUT_BATCH = 512, 64


@dataclass(frozen=True)
class Errors:
    """What a batch cost: the loss, and each record's unweighted error `(batch,)` at its `t`."""

    loss: Tensor
    each: Tensor
    t: Tensor


Loss = Callable[[int, int], Errors]
"""(images_seen before the batch, batch) -> its errors."""


@dataclass(frozen=True)
class Orders:
    """What one step is told besides its batch."""

    batch: int
    accumulation: int
    clip: float
    learning_rate: float


@dataclass(frozen=True)
class Taken:
    """How a step went; `applied` is false where the guard refused the update."""

    loss: float
    norm: float
    applied: bool
    parts: list[Errors]


def weigh(config: WeightConfig, t: Tensor, prediction: Prediction) -> Tensor:
    """What the errors at `t` `(batch,)` weigh; `WeightConfig` has the formulas."""
    if config.kind == "none":
        return torch.ones_like(t)
    if config.kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
    # In units of x_data, whose error is t times that of the velocity.
    units = t / flow.error_scale(t, prediction)
    return flow.snr(t).clamp(max=config.gamma) * units.square()


def flow_matching(
    denoiser: Denoiser, batches: Callable[[int, int], Batch], config: DenoiserTraining
) -> Loss:
    """The loss of a base or an expert on its batches."""

    def loss(first: int, count: int) -> Errors:
        batch = batches(first, count)
        low = config.precision == "bfloat16"
        with torch.autocast(batch.x_t.device.type, torch.bfloat16, enabled=low):
            output = denoiser.output(batch.x_t, batch.t, batch.cond)
        each = (output.float() - batch.wanted).square().flatten(1).mean(1)
        weighted = each * weigh(config.weight, batch.t, config.objective)
        return Errors(weighted.mean(), each.detach(), batch.t)

    return loss


def prepare(denoiser: Denoiser, config: DenoiserTraining, device: torch.device) -> None:
    """Put the network on its device, and have it checkpoint and compile as it is told."""
    network: Any = denoiser.network
    network.to(device)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.compile:
        network.compile()  # in place: the names of its weights stay


def held_out_loss(
    denoiser: Denoiser,
    batches: Callable[[int, int], Batch],
    config: DenoiserTraining,
    *,
    batch: int = HELD_OUT_BATCH,
) -> Callable[[], float]:
    """The unweighted error on records that no training uses, at the same noise every time."""

    @torch.no_grad()
    def measured() -> float:
        loss = flow_matching(denoiser, batches, config)
        each = [loss(first, batch).each for first in range(0, _HELD_OUT, batch)]
        return float(torch.cat(each).double().mean())

    return measured


def take_step(
    loss: Loss,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    guard: Guard,
    orders: Orders,
    *,
    first: int,
) -> Taken:
    """One update from images `first` to `first + batch - 1`, unless the guard refuses it.

    A rank computes its share of each part of the batch; the gradient is that of the whole.
    """
    optimizer.zero_grad(set_to_none=True)
    group, end = learner.group, first + orders.batch
    part = orders.batch // orders.accumulation
    parts, losses = [], []
    for start in range(first, end, part):
        own, count = group.share(start, part)
        errors = loss(own, count)
        weighed = errors.loss * (count / orders.batch)
        learner.backward(weighed, last=start + part == end)
        parts.append(errors)
        losses.append(weighed.detach())
    norm = learner.clip(orders.clip)
    total = group.sum(torch.stack(losses).sum())
    # The one moment at which the accelerator is waited for.
    value, length = torch.stack([total, norm]).tolist()
    applied = guard.accepts(value, length)
    if applied:
        for settings in optimizer.param_groups:
            settings["lr"] = orders.learning_rate
        optimizer.step()
        averages.update(first // orders.batch)
    return Taken(value, length, applied, parts)


def learning_rate_at(peak: float, images_seen: int, total: int, warmup: float) -> float:
    """Linear warm-up over a share of the images, then linear decay to 0."""
    done = images_seen / total
    rise = min(1.0, done / warmup) if warmup > 0 else 1.0
    return peak * rise * (1 - done) / (1 - warmup) if done > warmup else peak * rise
