"""Training in this process: every family and objective learns, and a heartbeat says how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core import recipes
from atoll.core.checkpoint import Checkpoints
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.manifest import Manifest, Plan
from atoll.core.pack import Pack
from atoll.core.schedule import NoiseSchedule
from atoll.core.storage import Storage
from atoll.islands.base import new_base
from atoll.islands.data import Batches
from atoll.islands.lora import attach
from atoll.islands.settings import (
    BaseConfig,
    DenoiserTraining,
    GuardConfig,
    LoraConfig,
    OptimizerConfig,
    TimeConfig,
    WeightConfig,
)
from atoll.islands.step import held_out_loss
from atoll.islands.train_denoiser import course_of, train_here

CPU = torch.device("cpu")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "scaled linear": STABLE_DIFFUSION,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True},
}
# Another value of every key that decides the bits of a training.
OTHERWISE = DenoiserTraining(
    prediction=Prediction.EPSILON,
    schedule=NoiseSchedule(),
    condition_dropout=0.5,
    time=TimeConfig(mean=1.0),
    weight=WeightConfig(kind="cosmap"),
    optimizer=OptimizerConfig(learning_rate=0.5),
    guard=GuardConfig(share=0.5),
    accumulation=2,
    precision="bfloat16",
    gradient_checkpointing=True,
    compile=True,
)
# Those of the plan, those that make it another training, and those that alter nothing; what
# `keep_path` keeps is the prediction and the schedule.
ASIDE = {"batch", "passes", "ema_decays", "lora", "checkpoints", "checkpoint_seconds", "keep_path"}


@pytest.mark.parametrize("key", sorted(DenoiserTraining.model_fields.keys() - ASIDE))
def test_a_commit_tells_every_setting_from_another(key: str) -> None:
    plan, plain = Plan(batch=8, images_seen=8), DenoiserTraining()
    other = plain.model_copy(update={key: getattr(OTHERWISE, key)})
    assert course_of(plain, plan, 1e-3).settings() == course_of(plain, plan, 1e-3).settings()
    assert course_of(other, plan, 1e-3).settings() != course_of(plain, plan, 1e-3).settings()


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_objective_learns(made: Path, tmp_path, family: str, prediction) -> None:
    manifest = Manifest.load(Storage(made))
    pack = Pack(made / "shards" / "shard-00")
    training = DenoiserTraining(prediction=prediction, ema_decays=(0.9,), checkpoints=1)
    base = new_base(manifest, pack, BaseConfig(recipe=f"{family}-tiny", training=training))
    others = Batches(pack, training, rows=pack.held_out, seed=0, stream="held-out", device=CPU)
    measured = held_out_loss(base.denoiser, others, training)
    before = measured()
    train_here(
        Storage(tmp_path), "x", base.denoiser, pack, training,
        learning_rate=5e-3, plan=Plan(batch=16, images_seen=16 * 60), seed=0, stream="x",
        threads=1, device="cpu",
    )  # fmt: skip
    assert measured() < 0.9 * before


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("keys", SCHEDULES.values(), ids=SCHEDULES)
def test_every_objective_learns_on_every_schedule(
    made: Path, tmp_path: Path, keys: dict[str, Any], prediction: Prediction
) -> None:
    pack = Pack(made / "shards" / "shard-00")
    training = DenoiserTraining(
        prediction=prediction, schedule=NoiseSchedule(**keys), ema_decays=(0.9,), checkpoints=1
    )
    config = BaseConfig(recipe="dit-tiny", training=training)
    base = new_base(Manifest.load(Storage(made)), pack, config)
    others = Batches(pack, training, rows=pack.held_out, seed=0, stream="held-out", device=CPU)
    measured = held_out_loss(base.denoiser, others, training)
    before = measured()
    untold = DenoiserTraining(ema_decays=(0.9,), checkpoints=1)  # what the card says
    trained = train_here(
        Storage(tmp_path), "x", base.denoiser, pack, untold,
        learning_rate=5e-3, plan=Plan(batch=16, images_seen=16 * 20), seed=0, stream="x",
        threads=1, device="cpu",
    )  # fmt: skip
    assert measured() < 0.95 * before
    assert (trained.card.prediction, trained.card.schedule) == (prediction, training.schedule)


def test_moments_decay_as_they_are_told(made: Path, tmp_path: Path) -> None:
    """After one step they are (1 - beta1) g and (1 - beta2) g^2, here of the same gradient g."""
    pack, run = Pack(made / "shards" / "shard-00"), Storage(tmp_path)
    states = []
    for name, told in (("plain", {}), ("told", {"beta1": 0.5, "beta2": 0.75})):
        training = DenoiserTraining(optimizer=OptimizerConfig(**told))
        base = new_base(Manifest.load(Storage(made)), pack, BaseConfig(recipe="dit-tiny"))
        train_here(
            run, name, base.denoiser, pack, training,
            learning_rate=1e-3, plan=Plan(batch=8, images_seen=8), seed=0, stream="x",
            threads=1, device="cpu",
        )  # fmt: skip
        latest = Checkpoints(run, name).latest()
        assert latest is not None
        states.append(latest.tensors)
    plain, told = states
    for key, quotient in (("exp_avg", 0.5 / 0.1), ("exp_avg_sq", 0.25 / 0.01)):
        names = [name for name in plain if name.startswith(f"optimizer/{key}/")]
        assert any(plain[name].any() for name in names)
        for name in names:
            torch.testing.assert_close(told[name], quotient * plain[name], rtol=1e-4, atol=0)


def test_a_heartbeat_says_what_an_image_costs_and_what_the_device_does(made: Path) -> None:
    pack, run = Pack(made / "shards" / "shard-00"), Storage("memory://speeds")
    costs = {}
    for what, lora in (("full", LoraConfig()), ("adapters", LoraConfig(rank=2))):
        training = DenoiserTraining(accumulation=2, gradient_checkpointing=True, lora=lora)
        base = new_base(Manifest.load(Storage(made)), pack, BaseConfig(recipe="dit-tiny"))
        picture, network = pack.card.picture, base.denoiser.network
        forward = recipes.forward_flops(network, "dit", picture, pack.null)
        attach(network, lora, seed=0)
        train_here(
            run, what, base.denoiser, pack, training,
            learning_rate=1e-3, plan=Plan(batch=8, images_seen=16), seed=0, stream="x",
            threads=1, device="cpu",
        )  # fmt: skip
        beat = run.read_json(f"{what}/heartbeat.json")
        costs[what] = beat["flops_per_image"] / forward
        assert 1e8 < beat["matmul_flops_per_second"] < 1e16
    assert costs == {"full": 3, "adapters": 2}
