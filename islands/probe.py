"""How fast this machine trains, asked once, to turn minutes into images_seen."""

from __future__ import annotations

import copy
import math
import time

import torch

from atoll.core.denoiser import Denoiser
from atoll.core.journal import log
from atoll.core.pack import Pack
from atoll.islands.compute import Device, computing
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import flow_matching, take_step

_SECONDS = 3.0
# What is kept for checkpoints, gate heads, previews and starting processes.
_SHARE = 0.75


def images_per_second(
    denoiser: Denoiser,
    pack: Pack,
    training: DenoiserTraining,
    *,
    batch: int,
    threads: int,
    device: Device,
) -> float:
    """Training speed of a copy of the denoiser in this process, after one step to warm up."""
    with computing(device, threads) as chosen:
        trial = Denoiser(copy.deepcopy(denoiser.network).to(chosen).train(), denoiser.card)
        parameters = list(trial.network.parameters())
        averaged = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        loss = flow_matching(trial, pack, training, seed=0, stream="probe")
        steps, started = -1, time.monotonic()
        while steps < 2 or time.monotonic() - started < _SECONDS:
            take_step(
                loss((steps + 1) * batch, batch), parameters, optimizer, averaged,
                learning_rate=1e-6, clip=1.0, ema_decay=0.9, step=steps + 1,
            )  # fmt: skip
            steps += 1
            if steps == 0:
                started = time.monotonic()
        speed = steps * batch / (time.monotonic() - started)
    log.info("probe: %.0f images per second on %d thread(s)", speed, threads)
    return speed


def passes_in(minutes: float, *, speed: float, islands_at_once: int, records: int) -> float:
    """How often every record is seen within the minutes, rounded to two digits."""
    passes = minutes * 60 * _SHARE * speed * islands_at_once / records
    return max(float(f"{passes:.2g}"), 1 / records) if math.isfinite(passes) else 1.0
