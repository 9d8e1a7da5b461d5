"""Noise schedules of diffusers: how much noise a network was shown at each of its timesteps.

A schedule is written down by the keys that diffusers' scheduler configurations have for it, so that
what stands on a card makes a scheduler again: `DDIMScheduler(**card["schedule"])`. Its path is
variance-preserving (Ho et al. 2020, arXiv 2006.11239, eq. 4), `sqrt(a_s) x_data + sqrt(1 - a_s)
x_noise` with a_s its `alphas_cumprod` at timestep s; `flow.py` converts it to ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from atoll.core.config import Config
from atoll.core.errors import Refused

_Beta = Annotated[float, Field(gt=0, le=1)]


class NoiseSchedule(Config):
    """A discrete schedule by its keys in diffusers; absent ones are those of `DDPMScheduler`."""

    num_train_timesteps: int = Field(default=1000, ge=2, le=100_000)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = (
        "linear"
    )
    trained_betas: tuple[_Beta, ...] | None = None  # in the place of the three above
    rescale_betas_zero_snr: bool = False  # Lin et al. 2023, arXiv 2305.08891, algorithm 1

    @model_validator(mode="after")
    def _is_a_path(self) -> NoiseSchedule:
        betas, count = self.trained_betas, self.num_train_timesteps
        if betas is not None and len(betas) != count:
            raise ValueError(f"there are {len(betas)} trained_betas for {count} timesteps")
        alphas = alphas_cumprod(self)
        if not bool((alphas[1:] < alphas[:-1]).all()) or not 0 <= alphas[-1] < alphas[0] < 1:
            raise ValueError("noise must grow with every timestep, by what float32 can tell apart")
        return self

    def __str__(self) -> str:
        named = self.model_dump(exclude_defaults=True, exclude={"trained_betas"})
        shown = {"beta_schedule": self.beta_schedule, **named}
        if self.trained_betas is not None:
            shown["trained_betas"] = f"{len(self.trained_betas)} of its own"
        return ", ".join(f"{key} {value}" for key, value in shown.items())


@lru_cache(maxsize=64)
def alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    """The share of x_data in the variance at each timestep, `(num_train_timesteps,)`, float32.

    By diffusers itself, so that a network is asked at the very noise that its scheduler adds.
    """
    # Here because it takes seconds, and most of those who import `flow.py` have no schedule.
    from diffusers import DDPMScheduler

    alphas: Tensor = DDPMScheduler(**schedule.model_dump()).alphas_cumprod
    return alphas


# The schedulers of diffusers that add noise on such a path, and where the value of an absent key is
# not `DDPMScheduler`'s.
_KARRAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_LATENT: dict[str, Any] = {**_KARRAS, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "LCMScheduler": _LATENT,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": _LATENT,
    "UniPCMultistepScheduler": {},
}


def schedule_of(scheduler: Mapping[str, Any], source: str) -> NoiseSchedule:
    """The schedule in a scheduler's configuration; `Refused` where that is of another kind."""
    name = scheduler.get("_class_name")
    cure = "train on our linear path: leave out training.keep_path"
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise Refused(
            f"The path of {source} is not known: its scheduler is {name}",
            allowed=", ".join(SCHEDULERS),
            cure=cure,
        )
    if scheduler.get("timestep_type", "discrete") != "discrete":
        raise Refused(
            f"The network of {source} is told {scheduler['timestep_type']} timesteps",
            allowed="discrete",
            cure=cure,
        )
    given = {
        key: scheduler[key] for key in NoiseSchedule.model_fields if scheduler.get(key) is not None
    }
    try:
        return NoiseSchedule.model_validate({**SCHEDULERS[name], **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "betas"
        raise Refused(
            f"The noise schedule of {source} cannot be used: {where}: {first['msg']}", cure=cure
        ) from error
