"""How fast this machine trains, asked once, to turn minutes into images_seen."""

from __future__ import annotations

import copy
import math
import time

import torch

from atoll.core.denoiser import Denoiser
from atoll.core.journal import log
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.islands.compute import Device, computing
from atoll.islands.data import Batches
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.lora import attach
from atoll.islands.settings import DenoiserTraining, check_accumulation
from atoll.islands.step import Orders, flow_matching, prepare, take_step

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
    """Training speed of a copy of the denoiser in this process, after one step to warm up.

    Raises `ConfigError` for a batch that accumulation does not divide.
    """
    check_accumulation(batch, training.accumulation)
    training = training.of(denoiser.card)
    with computing(device, threads) as chosen:
        trial = Denoiser(copy.deepcopy(denoiser.network).train(), denoiser.card)
        attach(trial.network, training.lora, seed=0)
        prepare(trial, training, chosen)
        learner = Learner(trial.network)
        averages = Averages(learner.parameters, training.ema_decays)
        optimizer = torch.optim.AdamW(learner.parameters, lr=1e-6, fused=True)
        batches = Batches(
            pack, training, rows=pack.train, seed=0, stream="probe", device=chosen, batch=batch
        )
        loss = flow_matching(trial, batches, training)
        orders = Orders(batch, training.accumulation, clip=1.0, learning_rate=1e-6)
        guard = Guard(training.guard, Plan(batch=batch, images_seen=batch), "the probe")
        steps, started = -1, time.monotonic()
        while steps < 2 or time.monotonic() - started < _SECONDS:
            first = (steps + 1) * batch
            take_step(loss, learner, optimizer, averages, guard, orders, first=first)
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
