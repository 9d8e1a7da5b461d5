"""The training step on one page: batch, loss, optimiser, average, counter.

Flow matching on the linear path (Lipman et al. 2022, arXiv 2210.02747, eq. 23): the network learns
E[x_noise - x_data | x_t, t, cond]. Everything random is a function of (seed, stream, images_seen),
so a resumed training sees the very batches that an uninterrupted one would have seen. Imports
nothing heavier than torch, diffusers and safetensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Denoiser
from atoll.core.pack import Pack
from atoll.islands.settings import DenoiserTraining, TimeConfig

Loss = Callable[[int, int], Tensor]
"""(images_seen before the batch, batch) -> scalar loss of that batch."""


def times(config: TimeConfig, seed: int, stream: str, *, first: int, count: int) -> Tensor:
    """Training times `(count,)` in (0, 1) of records `first` onwards of a stream."""
    if config.sampling == "uniform":
        return seeds.uniform(seed, stream, "time", first=first, count=count)[:, 0].float()
    normal = seeds.normal(seed, stream, "time", first=first, count=count)
    return flow.logit_normal(normal, mean=config.mean, std=config.std)


def drop(cond: Conditioning, null: Conditioning, uniform: Tensor, rate: float) -> Conditioning:
    """Condition dropout (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1)."""
    return cond.dropped(uniform[:, 0] < rate, null)


def flow_matching(
    denoiser: Denoiser, pack: Pack, config: DenoiserTraining, *, seed: int, stream: str
) -> Loss:
    """The loss of a base or an expert on the training rows of a pack.

    Randomness is drawn on the CPU, so that it is the same on every device.
    """
    device = next(denoiser.network.parameters()).device

    def loss(first: int, count: int) -> Tensor:
        where = {"first": first, "count": count}
        rows = torch.from_numpy(seeds.order(seed, stream, "order", n=len(pack.train), **where))
        x_data = pack.x_data(rows).to(device)
        uniform = seeds.uniform(seed, stream, "dropout", **where)
        cond = drop(pack.cond(rows), pack.null, uniform, config.condition_dropout)
        t = times(config.time, seed, stream, **where).to(device)
        x_noise = seeds.normal(seed, stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
        x_noise = x_noise.to(device)
        x_t = flow.interpolate(x_data, x_noise, t)
        wanted = flow.target(x_data, x_noise, config.prediction)
        return functional.mse_loss(denoiser.output(x_t, t, cond.to(x_t)), wanted)

    return loss


def take_step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averaged: list[Tensor],
    *,
    learning_rate: float,
    clip: float,
    ema_decay: float,
    step: int,
) -> float:
    """One update of the weights and of their exponential average; the norm of the gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    # Warmed up, so that a short training is not averaged with its random start.
    decay = min(ema_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
    return float(norm)


def learning_rate_at(peak: float, images_seen: int, total: int, warmup: float) -> float:
    """Linear warm-up over a share of the images, then linear decay to 0."""
    done = images_seen / total
    rise = min(1.0, done / warmup) if warmup > 0 else 1.0
    return peak * rise * (1 - done) / (1 - warmup) if done > warmup else peak * rise
