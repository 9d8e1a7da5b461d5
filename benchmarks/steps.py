"""The island's step without the loop around it, and with one of its features switched off.

What a feature brings is what the step loses without it. Of all that makes an island's step fast
these are what the usual loop has not, and what is lost for the sake of the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from atoll.core.denoiser import Denoiser
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.islands.data import Batch, ahead
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.step import Orders, flow_matching, take_step
from benchmarks.trainings import Case
from benchmarks.turns import Peer


@dataclass(frozen=True)
class Features:
    """What an island's step does for speed, and `deterministic` for the same bits."""

    compiled: bool = True
    fused: bool = True
    autocast: bool = True
    prefetch: bool = True
    foreach_average: bool = True
    deterministic: bool = True


ABLATIONS: dict[str, Features] = {
    "torch.compile": Features(compiled=False),
    "the fused optimiser": Features(fused=False),
    "autocast to bfloat16": Features(autocast=False),
    "batches made ahead": Features(prefetch=False),
    "the foreach average": Features(foreach_average=False),
    "deterministic kernels": Features(deterministic=False),
}


class _OneByOne(Averages):
    """The average as diffusers' EMAModel takes it unless told otherwise: a tensor at a time."""

    def __init__(self, parameters: Sequence[nn.Parameter], decays: Sequence[float]) -> None:
        super().__init__(parameters, decays)
        self._all = list(parameters)
        self._models = [EMAModel(self._all, decay=decay) for decay in decays]

    def update(self, step: int) -> None:
        for model in self._models:
            model.step(self._all)


class _Uncompiled(nn.Module):
    """A network whose compiled form, if it has one, is passed by."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.network.forward(*given, **named)


def stepping(case: Case, pack: Pack, denoiser: Denoiser, features: Features) -> Peer:
    """Trains a denoiser that is on its device; several may do so with one network in turns.

    What is compiled once then serves all of them.
    """
    network = denoiser.network
    learner, batch = Learner(network), case.batch
    if not features.compiled:
        denoiser = replace(denoiser, network=_Uncompiled(network))
    config = case.training
    if not features.autocast:
        config = config.model_copy(update={"precision": "float32"})
    optimizer = torch.optim.AdamW(
        learner.parameters, lr=1e-4, fused=features.fused, foreach=not features.fused
    )
    kind = Averages if features.foreach_average else _OneByOne
    averages = kind(learner.parameters, config.ema_decays)
    guard = Guard(config.guard, Plan(batch=batch, images_seen=batch), "the benchmark")
    orders = Orders(batch, config.accumulation, clip=1.0, learning_rate=1e-4)
    with ExitStack() as stack:
        coming: Callable[[int, int], Batch] = case.batches(pack)
        if features.prefetch:
            coming = stack.enter_context(ahead(coming, case.device, stride=batch))
        loss, seen = flow_matching(denoiser, coming, config), 0
        while True:
            yield
            case.deterministic(features.deterministic)
            take_step(loss, learner, optimizer, averages, guard, orders, first=seen)
            seen += batch
