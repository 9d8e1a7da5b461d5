"""The training step against hand computation and against plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from atoll.core import flow, seeds
from atoll.core.denoiser import Denoiser
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.core.recipes import RECIPES
from atoll.core.schedule import NoiseSchedule
from atoll.islands.data import Ahead, Batches, times
from atoll.islands.ema import Averages
from atoll.islands.guard import Guard
from atoll.islands.learner import Learner
from atoll.islands.settings import (
    DenoiserTraining,
    GuardConfig,
    TimeConfig,
    WeightConfig,
    plan_for,
)
from atoll.islands.step import (
    Errors,
    Loss,
    Orders,
    flow_matching,
    held_out_loss,
    learning_rate_at,
    prepare,
    take_step,
    weigh,
)


@pytest.fixture(scope="module")
def base(made: Path) -> tuple[Denoiser, Pack]:
    return Denoiser.load(made / "base"), Pack(made / "shards" / "shard-00")


def loss_of(denoiser: Denoiser, pack: Pack, config: DenoiserTraining, *, seed: int = 0) -> Loss:
    """The loss on the training rows, as an island has it."""
    device = torch.device("cpu")
    batches = Batches(pack, config, rows=pack.train, seed=seed, stream="s", device=device)
    return flow_matching(denoiser, batches, config)


@pytest.mark.parametrize("kind", ["none", "cosmap", "min-snr"])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_loss_is_the_mean_square_of_what_the_network_missed(
    base: tuple[Denoiser, Pack], prediction: Prediction, kind: str
) -> None:
    denoiser, pack = base
    config = DenoiserTraining(
        prediction=prediction, condition_dropout=0.5, weight=WeightConfig(kind=kind)
    )
    errors = loss_of(denoiser, pack, config, seed=3)(40, 8)

    expected = []
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
            Prediction.V_PREDICTION: ((1 - t) * x_noise - t * x_data) / torch.hypot(1 - t, t),
        }[prediction]
        with torch.no_grad():
            output = denoiser.output((1 - t) * x_data + t * x_noise, t, cond)
        expected.append(float(((output - wanted) ** 2).mean()))
        assert float(errors.t[i - 40]) == pytest.approx(float(t))
    assert errors.each.tolist() == pytest.approx(expected, rel=1e-5)
    weights = weigh(config.weight, errors.t, prediction)
    assert float(errors.loss.detach()) == pytest.approx(
        float((weights * torch.tensor(expected)).mean()), rel=1e-5
    )


@pytest.mark.parametrize("prediction", list(Prediction))
def test_loss_on_a_schedule_is_that_of_its_own_path(
    base: tuple[Denoiser, Pack], prediction: Prediction
) -> None:
    """From alpha, sigma and the papers' own weights; times beyond the schedule are held at it."""
    denoiser, pack = base
    keys = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule(**keys)
    denoiser = Denoiser(denoiser.network, denoiser.card.model_copy(update={"schedule": schedule}))
    config = DenoiserTraining(
        prediction=prediction,
        schedule=schedule,
        condition_dropout=0.0,
        time=TimeConfig(std=4.0),
        weight=WeightConfig(kind="min-snr", gamma=5.0),
    )
    errors = loss_of(denoiser, pack, config, seed=3)(40, 16)

    share = DDIMScheduler(**keys).alphas_cumprod.double()
    sigmas = ((1 - share) / share).sqrt()
    rows = torch.from_numpy(seeds.order(3, "s", "order", first=40, count=16, n=pack.card.records))
    x_data = pack.x_data(rows)
    x_noise = seeds.normal(3, "s", "x_noise", first=40, count=16, shape=x_data.shape[1:])
    # sigma / alpha = t / (1 - t) = exp(4 z) for t = sigmoid(4 z).
    drawn = (4 * seeds.normal(3, "s", "time", first=40, count=16)).double().exp()
    ratio = drawn.clamp(sigmas[0], sigmas[-1])
    assert bool((drawn < ratio).any())
    assert bool((drawn > ratio).any())
    # Linear in t between the timesteps, as in `flow.timestep`.
    timestep = np.interp(ratio / (1 + ratio), sigmas / (1 + sigmas), np.arange(1000))
    alpha = (1 / (1 + ratio**2).sqrt()).float()[:, None, None, None]
    sigma = (ratio / (1 + ratio**2).sqrt()).float()[:, None, None, None]
    wanted = {
        Prediction.VELOCITY: x_noise - x_data,
        Prediction.EPSILON: x_noise,
        Prediction.X_DATA: x_data,
        Prediction.V_PREDICTION: alpha * x_noise - sigma * x_data,
    }[prediction]
    with torch.no_grad():
        output = FAMILIES["unet"].adapter(
            denoiser.network,
            alpha * x_data + sigma * x_noise,
            torch.tensor(timestep).float(),
            pack.cond(rows),
        )
    expected = (output - wanted).square().flatten(1).mean(1)
    torch.testing.assert_close(errors.each, expected, rtol=1e-3, atol=1e-5)
    snr = ratio**-2
    weight = (
        snr.clamp(max=5.0)
        * {
            Prediction.VELOCITY: (sigma / (alpha + sigma)).flatten().double() ** 2,
            Prediction.EPSILON: 1 / snr,
            Prediction.X_DATA: 1,
            Prediction.V_PREDICTION: 1 / (snr + 1),
        }[prediction]
    )
    torch.testing.assert_close(weigh(config.weight, errors.t, prediction).double(), weight)
    assert float(errors.loss.detach()) == pytest.approx(float((weight * expected).mean()), rel=1e-3)


def test_a_batch_is_the_same_however_it_was_reached(base: tuple[Denoiser, Pack]) -> None:
    denoiser, pack = base
    loss = loss_of(denoiser, pack, DenoiserTraining())
    with torch.no_grad():
        assert float(loss(64, 8).loss) == float(loss(64, 8).loss)
        assert float(loss(64, 8).loss) != float(loss(72, 8).loss)
        halves = torch.cat([loss(64, 4).each, loss(68, 4).each])
        torch.testing.assert_close(halves, loss(64, 8).each)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_min_snr_weighs_the_error_of_x_data_whatever_is_predicted(prediction: Prediction) -> None:
    t = torch.linspace(0.01, 0.99, 50).double()
    config = WeightConfig(kind="min-snr", gamma=5.0)
    v, wrong = torch.randn(50).double(), torch.randn(50).double()
    x_t = torch.randn(50).double()
    to = {
        Prediction.VELOCITY: lambda v: v,
        Prediction.EPSILON: lambda v: flow.velocity_to_epsilon(v, x_t, t),
        Prediction.X_DATA: lambda v: flow.velocity_to_x_data(v, x_t, t),
        Prediction.V_PREDICTION: lambda v: flow.velocity_to_v_prediction(v, x_t, t),
    }[prediction]
    x_data_error = (t * (wrong - v)).square()
    expected = (((1 - t) / t) ** 2).clamp(max=5) * x_data_error
    torch.testing.assert_close(
        weigh(config, t, prediction) * (to(wrong) - to(v)).square(), expected
    )
    if prediction is Prediction.EPSILON:  # as the paper states it, eq. 8
        snr = ((1 - t) / t) ** 2
        torch.testing.assert_close(weigh(config, t, prediction), snr.clamp(max=5) / snr)


def test_cosmap_is_a_density_over_t() -> None:
    t = torch.linspace(0, 1, 100_001).double()
    density = weigh(WeightConfig(kind="cosmap"), t, Prediction.VELOCITY)
    assert float(torch.trapezoid(density, t)) == pytest.approx(1, abs=1e-9)


def test_uniform_and_logit_normal_times() -> None:
    uniform = times(TimeConfig(sampling="uniform"), 0, "s", first=0, count=20_000)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    moved = times(TimeConfig(mean=1.0, std=0.5), 0, "s", first=0, count=20_000)
    assert float(moved.median()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.01)
    assert bool(((moved > 0) & (moved < 1)).all())
    mode = times(TimeConfig(sampling="mode", scale=1.29), 0, "s", first=0, count=20_000)
    assert bool(((mode > 0) & (mode < 1)).all())
    # At u = 1/2 both uniform and mode are 1/2, and there mode is the denser the larger its scale.
    near = ((mode - 0.5).abs() < 0.01).float().mean()
    assert float(near) == pytest.approx(0.02 / (1 + 1.29 * (1 - torch.pi / 2)), rel=0.1)
    flat = times(TimeConfig(sampling="mode", scale=0.0), 0, "s", first=0, count=20_000)
    torch.testing.assert_close(flat, 1 - uniform)


def test_a_step_is_clipped_adamw_and_an_exponential_average() -> None:
    torch.manual_seed(0)
    ours, reference = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    reference.load_state_dict(ours.state_dict())
    parameters = list(ours.parameters())
    expected = [p.detach().clone() for p in parameters]
    averages = Averages(parameters, (0.9,))
    guard = Guard(GuardConfig(), Plan(batch=7, images_seen=35), "x")
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    orders = Orders(batch=7, accumulation=1, clip=0.5, learning_rate=1e-2)
    for step in range(5):
        x = torch.randn(7, 5)

        def loss(first: int, count: int, x: torch.Tensor = x) -> Errors:
            return Errors(ours(x).square().sum(), torch.zeros(count), torch.zeros(count))

        taken = take_step(loss, Learner(ours), optimizer, averages, guard, orders, first=7 * step)
        assert taken.applied
        norm = taken.norm
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
    for p, q in zip(parameters, reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    averages.publish(0)
    for a, e in zip(parameters, expected, strict=True):
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


def test_what_is_made_ahead_is_what_would_be_made() -> None:
    made: list[tuple[int, int]] = []

    def make(first: int, count: int) -> tuple[int, int]:
        made.append((first, count))
        return first, count

    ahead = Ahead(make, stride=4)
    asked = [(0, 4), (4, 4), (8, 4), (20, 4), (24, 2), (26, 2), (0, 4)]  # going back and skipping
    assert [ahead(*position) for position in asked] == asked
    ahead.close()
    assert made.count((8, 4)) == 1  # guessed right: once


def test_what_went_wrong_ahead_is_raised_where_it_is_asked_for() -> None:
    def make(first: int, count: int) -> int:
        if first == 4:
            raise ValueError("a broken pack")
        return first

    ahead = Ahead(make, stride=4)
    assert ahead(0, 4) == 0
    with pytest.raises(ValueError, match="broken"):
        ahead(4, 4)
    ahead.close()


def test_checkpointing_changes_no_gradient(base: tuple[Denoiser, Pack]) -> None:
    denoiser, pack = base
    results = []
    for config in (DenoiserTraining(), DenoiserTraining(gradient_checkpointing=True)):
        trial = Denoiser(copy.deepcopy(denoiser.network).train(), denoiser.card)
        prepare(trial, config, torch.device("cpu"))
        loss_of(trial, pack, config)(0, 8).loss.backward()
        results.append([p.grad for p in trial.network.parameters()])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_the_networks_arithmetic_alone(base: tuple[Denoiser, Pack]) -> None:
    denoiser, pack = base
    full = loss_of(denoiser, pack, DenoiserTraining())(0, 32)
    low = loss_of(denoiser, pack, DenoiserTraining(precision="bfloat16"))(0, 32)
    assert low.each.dtype == low.loss.dtype == torch.float32
    assert not torch.equal(low.each, full.each)
    torch.testing.assert_close(low.each, full.each, rtol=0.05, atol=0.01)
    low.loss.backward()
    assert all(
        p.grad is None or p.grad.dtype == torch.float32 for p in denoiser.network.parameters()
    )
    denoiser.network.zero_grad(set_to_none=True)


def test_held_out_loss_is_of_held_out_records_and_the_same_again(
    base: tuple[Denoiser, Pack],
) -> None:
    denoiser, pack = base
    config = DenoiserTraining()
    asked: list[torch.Tensor] = []
    x_data = pack.x_data

    class Spy(Pack):
        def __init__(self) -> None:
            self.__dict__.update(pack.__dict__)

        def x_data(self, rows: torch.Tensor) -> torch.Tensor:
            asked.append(rows)
            return x_data(rows)

    others = Batches(
        Spy(), config, rows=pack.held_out, seed=0, stream="held-out", device=torch.device("cpu")
    )
    measured = held_out_loss(denoiser, others, config)
    assert measured() == measured()
    rows = torch.cat(asked)
    assert set(rows.tolist()) == set(pack.held_out)
