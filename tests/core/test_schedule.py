"""Noise schedules against diffusers' schedulers, and what is no schedule against a refusal."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pydantic import ValidationError

from atoll.core import flow
from atoll.core.digest import canonical_json
from atoll.core.errors import Refused
from atoll.core.schedule import SCHEDULERS, NoiseSchedule, alphas_cumprod, schedule_of

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KEYS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "scaled_linear": STABLE_DIFFUSION,
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
    "zero snr": {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": [0.001, 0.02, 0.3], "num_train_timesteps": 3},
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_alphas_are_those_of_diffusers_schedulers(keys: dict[str, Any], scheduler: Any) -> None:
    theirs = scheduler(**keys)
    assert torch.equal(alphas_cumprod(NoiseSchedule(**keys)), theirs.alphas_cumprod)
    # What diffusers saves makes the schedule, and what the card has of it the scheduler.
    config = dict(theirs.config) | {"_class_name": scheduler.__name__}
    found = schedule_of(config, "here")
    assert found == NoiseSchedule(**keys)
    again = NoiseSchedule.model_validate_json(canonical_json(found.model_dump(mode="json")))
    assert (again, hash(again)) == (found, hash(found))
    assert torch.equal(
        scheduler(**again.model_dump(mode="json")).alphas_cumprod, theirs.alphas_cumprod
    )


def test_cosine_is_the_papers() -> None:
    """alphas_cumprod_s = f(s) / f(0), f = cos^2 (Nichol & Dhariwal 2021, eq. 17), but the last."""
    f = [math.cos((s / 400 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in range(401)]
    alphas = alphas_cumprod(NoiseSchedule(**KEYS["cosine"]))
    torch.testing.assert_close(alphas[:-1], torch.tensor(f[1:400]) / f[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("scaled_linear", 0.0283, 0.9360), ("zero snr", 0.0283, 1.0), ("ddpm", 0.0099, 0.9937)],
)
def test_span_on_our_path(name: str, first: float, last: float) -> None:
    assert flow.span(NoiseSchedule(**KEYS[name])) == pytest.approx((first, last), abs=5e-5)
    assert (flow.span(NoiseSchedule(**KEYS[name]))[1] == 1.0) == (name == "zero snr")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_absent_keys_are_those_of_the_scheduler(name: str) -> None:
    theirs = getattr(diffusers, name)
    if theirs.__module__ == "diffusers.utils.dummy_torch_and_torchsde_objects":
        pytest.skip(f"{name} needs torchsde")
    said = {key: value.default for key, value in inspect.signature(theirs).parameters.items()}
    ours = schedule_of({"_class_name": name}, "here").model_dump()
    assert ours == {key: said.get(key, value) for key, value in ours.items()}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "its scheduler is EDMEulerScheduler.*keep_path"),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, "is CogVideoX"),
        ({"_class_name": ["os", "system"]}, "is not known"),
        ({}, "its scheduler is None"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "secret"}, "beta_schedule"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"_class_name": "DDIMScheduler", "beta_end": float("nan")}, "beta_end"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000"),
    ],
)
def test_other_schedulers_are_refused_with_the_cure(config: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        schedule_of(config, "here")
    assert "keep_path" in caught.value.cure


@pytest.mark.parametrize(
    "keys",
    [
        {"trained_betas": [0.1, 1e-12], "num_train_timesteps": 2},  # noise that does not grow
        {"trained_betas": [1.0, 1.0], "num_train_timesteps": 2},
        {"trained_betas": [0.0, 0.1], "num_train_timesteps": 2},
        {"num_train_timesteps": 1},
        {"beta_start": 0.0},
        {"surprise": 1},
    ],
)
def test_what_is_no_path_is_no_schedule(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NoiseSchedule(**keys)


def test_a_schedule_in_words() -> None:
    assert str(NoiseSchedule(**KEYS["zero snr"])) == (
        "beta_schedule scaled_linear, beta_start 0.00085, beta_end 0.012, "
        "rescale_betas_zero_snr True"
    )
    assert str(NoiseSchedule(**KEYS["trained"])).endswith("trained_betas 3 of its own")
