"""The training step against hand computation and against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atoll.core import seeds
from atoll.core.denoiser import Denoiser
from atoll.core.flow import Prediction
from atoll.core.pack import Pack
from atoll.core.recipes import RECIPES
from atoll.islands.settings import DenoiserTraining, TimeConfig, plan_for
from atoll.islands.step import flow_matching, learning_rate_at, take_step, times


@pytest.fixture(scope="module")
def base(made: Path) -> tuple[Denoiser, Pack]:
    return Denoiser.load(made / "base"), Pack(made / "shards" / "shard-00")


@pytest.mark.parametrize("prediction", list(Prediction))
def test_loss_is_the_mean_square_of_what_the_network_missed(
    base: tuple[Denoiser, Pack], prediction: Prediction
) -> None:
    denoiser, pack = base
    config = DenoiserTraining(prediction=prediction, condition_dropout=0.5)
    loss = flow_matching(denoiser, pack, config, seed=3, stream="s")(40, 8)

    total = 0.0
    for i in range(40, 48):  # one record at a time, from the definitions
        row = torch.from_numpy(seeds.order(3, "s", "order", first=i, count=1, n=pack.card.records))
        x_data, cond = pack.x_data(row), pack.cond(row)
        if float(seeds.uniform(3, "s", "dropout", first=i, count=1)) < 0.5:
            cond = pack.null
        t = torch.sigmoid(seeds.normal(3, "s", "time", first=i, count=1))
        x_noise = seeds.normal(3, "s", "x_noise", first=i, count=1, shape=x_data.shape[1:])
        wanted = {
            Prediction.VELOCITY: x_noise - x_data,
            Prediction.EPSILON: x_noise,
            Prediction.X_DATA: x_data,
        }[prediction]
        with torch.no_grad():
            output = denoiser.output((1 - t) * x_data + t * x_noise, t, cond)
        total += float(((output - wanted) ** 2).mean()) / 8
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


def test_a_batch_is_the_same_however_it_was_reached(base: tuple[Denoiser, Pack]) -> None:
    denoiser, pack = base
    loss = flow_matching(denoiser, pack, DenoiserTraining(), seed=0, stream="s")
    with torch.no_grad():
        assert float(loss(64, 8)) == float(loss(64, 8))
        assert float(loss(64, 8)) != float(loss(72, 8))


def test_uniform_and_logit_normal_times() -> None:
    uniform = times(TimeConfig(sampling="uniform"), 0, "s", first=0, count=20_000)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    moved = times(TimeConfig(mean=1.0, std=0.5), 0, "s", first=0, count=20_000)
    assert float(moved.median()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.01)
    assert bool(((moved > 0) & (moved < 1)).all())


def test_a_step_is_clipped_adamw_and_an_exponential_average() -> None:
    torch.manual_seed(0)
    ours, reference = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    reference.load_state_dict(ours.state_dict())
    parameters = list(ours.parameters())
    averaged = [p.detach().clone() for p in parameters]
    expected = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        x = torch.randn(7, 5)
        norm = take_step(
            ours(x).square().sum(), parameters, optimizer, averaged,
            learning_rate=1e-2, clip=0.5, ema_decay=0.9, step=step,
        )  # fmt: skip
        plain.zero_grad()
        reference(x).square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in reference.parameters()])
        assert norm == pytest.approx(float(grads.norm()), rel=1e-5)
        for p in reference.parameters():
            p.grad *= min(1.0, 0.5 / (float(grads.norm()) + 1e-6))
        plain.step()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [
            decay * e + (1 - decay) * p.detach()
            for e, p in zip(expected, ours.parameters(), strict=True)
        ]
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    for a, e in zip(averaged, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-6)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    assert learning_rate_at(2.0, 0, 100, 0.1) == 0
    assert learning_rate_at(2.0, 5, 100, 0.1) == pytest.approx(1.0)
    assert learning_rate_at(2.0, 10, 100, 0.1) == pytest.approx(2.0)
    assert learning_rate_at(2.0, 55, 100, 0.1) == pytest.approx(1.0)
    assert learning_rate_at(2.0, 100, 100, 0.1) == 0
    assert learning_rate_at(2.0, 0, 100, 0.0) == 2.0
    assert learning_rate_at(2.0, 100, 100, 1.0) == 2.0


def test_a_plan_follows_from_the_records_alone() -> None:
    recipe = RECIPES["unet-tiny"]
    plan = plan_for(DenoiserTraining(batch=16, passes=3), recipe, 100, base=False)
    assert (plan.batch, plan.images_seen) == (16, 304)  # 19 whole batches hold 300 images
    defaults = plan_for(DenoiserTraining(), recipe, 4, base=True)
    assert (defaults.batch, defaults.images_seen) == (recipe.batch, recipe.batch)
