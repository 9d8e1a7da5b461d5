"""Flow schedulers of diffusers, for `AtollPipeline` and for stock pipelines.

What FlowMatch Euler and Heun lack in diffusers 0.42.1, which the stock pipelines of PixArt and
Stable Diffusion call, and what DPM-Solver++ (arXiv 2211.01095) and UniPC (arXiv 2302.04867) round:
they hand timesteps over as whole numbers, cut off, while they integrate at the exact ones.
diffusers loads a class of another library only from a module that has `SchedulerMixin` too.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from atoll.core import sampler
from atoll.core.errors import UsageError

_FLOW = "flow_prediction"
_NOISE = 0.99  # a solver in log-SNR cannot begin at 1, where that is infinite, but close to it


class _Unscaled:
    """Nothing is scaled: the path begins at noise of unit variance."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample


class FlowEuler(_Unscaled, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's method, for stock pipelines."""


class FlowHeun(_Unscaled, FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Heun's method, for stock pipelines; two evaluations a step."""


class FlowDPMSolver(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++ that tells a network the exact time."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers', with fractions; a configuration that is of no flow is refused."""
        check_flow(self)
        super().set_timesteps(num_inference_steps, device=device, mu=mu, timesteps=timesteps)
        check_grid(self, given=timesteps is not None)
        self.timesteps = _exact(self).to(device)


class FlowUniPC(UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC that tells a network the exact time."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As diffusers', with fractions; a configuration that is of no flow is refused."""
        check_flow(self)
        grid = None if sigmas is None else np.asarray(sigmas)
        super().set_timesteps(num_inference_steps, device=device, sigmas=grid, mu=mu)
        check_grid(self, given=sigmas is not None)
        self.timesteps = _exact(self).to(device)


def _exact(scheduler: SchedulerMixin) -> Tensor:
    exact: Tensor = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    return exact


def check_flow(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that takes no velocity, or is not on the linear path."""
    config = scheduler.config
    kind, flow = config.get("prediction_type", _FLOW), config.get("use_flow_sigmas", True)
    if kind != _FLOW or not flow or config.get("invert_sigmas"):
        name = type(scheduler).__name__
        raise UsageError(
            f"The scheduler {name} is set to {kind}, {'with' if flow else 'without'} flow sigmas",
            allowed="FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, and "
            "DPMSolverMultistepScheduler or UniPCMultistepScheduler for a flow",
            cure=f"{name}.from_config(pipe.scheduler.config, use_flow_sigmas=True, "
            f'prediction_type="{_FLOW}")',
        )


def check_grid(scheduler: SchedulerMixin, *, given: bool = False) -> None:
    """Refuse times that do not lead from noise to data, once a scheduler has set them.

    Some settings of diffusers' are meant for schedules whose sigmas go far beyond 1; on a flow they
    give NaN, or take pure noise for a picture that is nearly done, and nothing is said. Times that
    were `given` may begin on the way.
    """
    sigmas = torch.as_tensor(scheduler.sigmas)
    first, least = float(sigmas[0]), 0.0 if given else _NOISE
    # All false of NaN. Shifts may round the first one to just above 1.
    falling = bool((sigmas.diff() <= 0).all())
    if not (falling and least <= first <= 1 + 1e-6 and float(sigmas[-1]) >= 0):
        name = type(scheduler).__name__
        shown = ", ".join(f"{value:.3g}" for value in sigmas.tolist())
        raise UsageError(
            f"The scheduler {name} is set to go by sigmas of {shown}",
            allowed="sigmas that fall from 1, noise, to 0, data",
            cure=f"{name}.from_config(pipe.scheduler.config, use_karras_sigmas=False, "
            "use_exponential_sigmas=False, use_beta_sigmas=False), use_lu_lambdas=False and no "
            "shift_terminal where it knows them",
        )


def set_times(scheduler: SchedulerMixin, steps: int, device: torch.device) -> None:
    """Ready a scheduler for a number of steps from noise to data, on our grid if it takes one."""
    check_flow(scheduler)
    grid = sampler.times(steps)[:-1].numpy()  # an array: UniPC multiplies what it is given
    try:
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=grid, device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise UsageError(
            f"The scheduler {type(scheduler).__name__} does not take {steps} steps: {error}"
        ) from error
    check_grid(scheduler)
    # It would look its place up by the timestep, and some have two of the same.
    scheduler.set_begin_index(0)
