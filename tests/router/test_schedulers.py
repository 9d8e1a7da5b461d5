"""Flow schedulers of diffusers on closed forms: their orders, and what routings make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import UsageError
from atoll.router.chooser import sample_settings, x_noise
from atoll.router.pipeline import AtollPipeline
from atoll.router.routing import draw, parse_rule, renormalise, support
from atoll.router.schedulers import FlowDPMSolver, FlowEuler, FlowHeun, FlowUniPC
from tests.router.flows import Captions, SmoothWorld, closed_form, smooth, solution

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "Euler": (FlowMatchEulerDiscreteScheduler, {}),
    "Heun": (FlowMatchHeunDiscreteScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, FLOW),
    "UniPC": (UniPCMultistepScheduler, FLOW),
}
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Euler": (FlowEuler, {}),
    "Heun": (FlowHeun, {}),
    "DPM-Solver++": (FlowDPMSolver, FLOW),
    "UniPC": (FlowUniPC, FLOW),
}
# DPM-Solver++ comes near its order late: its steps are in log-SNR, where ours are uneven.
ORDER = {"Euler": 1.0, "Heun": 2.0, "DPM-Solver++": 1.6, "UniPC": 2.0}
START = {"DPM-Solver++": 0.999}
MULTISTEP = ("DPM-Solver++", "UniPC")
COUNT = 48


@pytest.fixture(scope="module")
def world(make_world: Callable[..., Any]) -> SmoothWorld:
    return smooth(make_world(0, shape=(2, 1, 1)))


@pytest.fixture
def pipe(world: SmoothWorld) -> Any:
    return AtollPipeline(closed_form(world), FlowMatchEulerDiscreteScheduler(), Captions())


def swapped(pipe: Any, kinds: dict[str, tuple[Any, dict[str, Any]]], name: str) -> Any:
    """As users of diffusers do it."""
    kind, settings = kinds[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    return pipe


def sampled(pipe: Any, steps: int, **options: Any) -> Tensor:
    made: Tensor = pipe(
        ["1"] * COUNT, num_inference_steps=steps, output_type="pt", seed=3, **options
    ).images
    return made


def field(world: SmoothWorld, prompt: Any, routing: str, kept: Tensor | None = None) -> Any:
    """The exact velocity under a routing, float64."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        at, cond = t.expand(len(x_t)), prompt([1] * len(x_t))
        if kept is None:
            p = world.posterior(x_t, at, cond)
            p = renormalise(p * support(parse_rule(routing, world.names), p))
        else:
            p = torch.nn.functional.one_hot(kept, world.count).double()
        experts = [world.velocity_over(world.shard == k, x_t, at, cond) for k in range(world.count)]
        return torch.einsum("bk,kb...->b...", p, torch.stack(experts))

    return velocity


def error(made: Tensor, exact: Tensor) -> Tensor:
    return (made.double() - exact).flatten(1).norm(dim=1)


def x_data(velocity: Any, name: str = "", *, steps: int = 60) -> Tensor:
    noise = x_noise(sample_settings(COUNT, ["any"], seed=3), (2, 1, 1))
    return solution(velocity, noise, start=START.get(name, 1.0), steps=steps)


@pytest.fixture(scope="module")
def exact(world: SmoothWorld, prompt: Any) -> dict[str, Tensor]:
    """x_data of the ensemble, by solver: one of them begins later."""
    velocity = field(world, prompt, "full")
    made = {start: x_data(velocity, name) for name, start in {"": 1.0, **START}.items()}
    return {name: made[START.get(name, 1.0)] for name in STOCK}


@pytest.fixture(scope="module")
def top_1(world: SmoothWorld, prompt: Any) -> Tensor:
    """x_data under top-1, of which no solver of whatever order says more than a step's length."""
    return x_data(field(world, prompt, "top-k:1"), steps=600)


# -- orders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_full_converges_to_the_exact_solution_with_the_solvers_order(
    pipe: Any, exact: dict[str, Tensor], name: str
) -> None:
    swapped(pipe, STOCK, name)
    errors = [float(error(sampled(pipe, n), exact[name]).mean()) for n in (20, 40, 80)]
    slope = math.log2(errors[1] / errors[2])
    assert slope > ORDER[name] - 0.4, errors
    assert errors[-1] < (0.03 if name == "Euler" else 0.003), errors


@pytest.mark.parametrize("name", STOCK)
def test_once_keeps_the_solvers_order(
    world: SmoothWorld, pipe: Any, prompt: Any, name: str
) -> None:
    """One smooth expert from noise to data, whatever the solver remembers of earlier steps."""
    kept = pipe.transformer.draw(Captions().condition(["1"] * COUNT), seed=3)
    sole = x_data(field(world, prompt, "once", kept), name)
    swapped(pipe, STOCK, name)
    errors = [float(error(sampled(pipe, n, routing="once"), sole).mean()) for n in (40, 160)]
    assert math.log2(errors[0] / errors[1]) / 2 > ORDER[name] - 0.4, errors
    assert errors[-1] < (0.02 if name == "Euler" else 0.003), errors
    assert len(kept.unique()) > 1


@pytest.mark.parametrize("name", STOCK)
def test_full_is_the_single_closed_form_expert(world: SmoothWorld, pipe: Any, name: str) -> None:
    whole = AtollPipeline(
        closed_form(world, whole=True), FlowMatchEulerDiscreteScheduler(), Captions()
    )
    # Where DPM-Solver++ begins, at .999, the gate is asked about 1.
    tolerance = 1e-3 if name in START else 1e-4
    for guidance in (1.0, 2.5):
        made = [sampled(swapped(p, STOCK, name), 8, guidance_scale=guidance) for p in (pipe, whole)]
        torch.testing.assert_close(made[0], made[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MULTISTEP)
def test_under_hard_routing_the_routing_is_the_error_and_not_the_solver(
    pipe: Any, exact: dict[str, Tensor], top_1: Tensor, name: str
) -> None:
    """Top-1 jumps where its expert changes: multistep solvers lose their order there, not more."""
    euler = error(sampled(pipe, 20, routing="top-k:1"), top_1).mean()
    swapped(pipe, STOCK, name)
    solver = error(sampled(pipe, 20, routing="top-k:1"), top_1).mean()
    smooth_error = error(sampled(pipe, 20), exact[name]).mean()
    bias = error(top_1, exact[name]).mean()
    assert smooth_error < solver < 0.5 * euler, (smooth_error, solver, euler)
    assert bias > 10 * solver, (bias, solver)


# -- our adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_an_adapter_takes_its_schedulers_path(pipe: Any, name: str) -> None:
    """Bit for bit in our pipeline, which asks for no timesteps."""
    stock = sampled(swapped(pipe, STOCK, name), 7)
    assert torch.equal(sampled(swapped(pipe, OURS, name), 7), stock)
    scheduler = pipe.scheduler
    assert scheduler.init_noise_sigma == 1
    x = torch.randn(2, 1, 2, 2)
    assert scheduler.scale_model_input(x, 500) is x


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_network_is_told_the_exact_time(name: str) -> None:
    for kinds, exact in ((OURS, True), (STOCK, False)):
        kind, settings = kinds[name]
        scheduler = kind(**settings)
        scheduler.set_timesteps(7)
        told = scheduler.timesteps.double() / 1000
        close = torch.allclose(told, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
        assert close is exact, "diffusers rounds no more: the adapters may go" if close else told
    with pytest.raises(UsageError, match="without flow sigmas"):
        OURS[name][0]().set_timesteps(7)


def test_sigmas_may_be_a_list() -> None:
    scheduler = FlowUniPC(**FLOW)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([900.0, 500.0, 200.0]))


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_is_saved_and_loaded(tmp_path: Path, name: str) -> None:
    kind, settings = OURS[name]
    kind(**settings).save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind
    assert all(again.config[key] == value for key, value in settings.items())


# -- the pipeline ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_another_kind_is_refused(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = scheduler
    with pytest.raises(UsageError, match=type(scheduler).__name__):
        pipe("1", num_inference_steps=2)


@pytest.mark.parametrize("setting", ["karras_sigmas", "exponential_sigmas", "beta_sigmas"])
@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowDPMSolver, FlowUniPC]
)
def test_times_that_do_not_lead_from_noise_to_data_are_refused(
    pipe: Any, kind: Any, setting: str
) -> None:
    """On a flow diffusers makes of these settings NaN, or a rising grid, and says nothing."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = kind(**flow, **{f"use_{setting}": True})
    with pytest.raises(UsageError, match=f"{kind.__name__} is set to go by sigmas of") as caught:
        pipe("1", num_inference_steps=4)
    assert f"use_{setting}=False" in (caught.value.cure or "")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_shift_of_the_end_takes_more_than_one_step(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    assert bool(pipe("1", num_inference_steps=2, output_type="latent").images.isfinite().all())
    with pytest.raises(UsageError, match="sigmas of nan"):
        pipe("1", num_inference_steps=1)


@pytest.mark.parametrize("setting", ["karras_sigmas", "exponential_sigmas", "beta_sigmas"])
def test_grids_that_do_lead_there_are_taken(pipe: Any, setting: str) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**{f"use_{setting}": True})
    assert bool(pipe("1", num_inference_steps=4, output_type="latent").images.isfinite().all())


def test_heun_draws_once_a_step(world: SmoothWorld, pipe: Any) -> None:
    """By the posterior of its first evaluation; the second, elsewhere, runs the same experts."""
    swapped(pipe, STOCK, "Heun")
    trace = pipe(["1"] * COUNT, num_inference_steps=4, routing="sample:2", seed=3, trace=True).trace
    assert len(trace) == 7
    for i, step in enumerate(trace):
        begun = trace[i - i % 2]
        uniform = seeds.uniform(3, "routing", i // 2, first=0, count=COUNT, each=2)
        drawn = draw(begun.gate_weights, uniform)
        counts = torch.nn.functional.one_hot(drawn, world.count).float().mean(dim=1)
        assert torch.equal(step.weights, counts)
    assert not torch.equal(trace[1].gate_weights, trace[0].gate_weights)


def test_where_a_solver_begins_the_gate_reads_the_caption_alone(
    world: SmoothWorld, pipe: Any
) -> None:
    """DPM-Solver++ begins at .999, and draws what Euler draws at 1."""
    first = {}
    for name in STOCK:
        swapped(pipe, STOCK, name)
        first[name] = pipe(["1", "2"] * 8, num_inference_steps=2, routing="once", trace=True).trace[
            0
        ]
    for step in first.values():
        torch.testing.assert_close(step.gate_weights, first["Euler"].gate_weights)
        assert torch.equal(step.weights, first["Euler"].weights)


def test_a_callback_sees_and_changes_every_step(pipe: Any) -> None:
    told: list[tuple[int, float]] = []
    swapped(pipe, STOCK, "DPM-Solver++")

    def halve(of: Any, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert of is pipe
        told.append((step, float(timestep)))
        return {"latents": given["latents"] * 0.5} if step == 2 else {}

    made = sampled(pipe, 3, callback_on_step_end=halve)
    assert [step for step, _ in told] == [0, 1, 2]
    assert told == sorted(told, key=lambda each: -each[1])
    assert torch.equal(made, sampled(pipe, 3) * 0.5)
    with pytest.raises(UsageError, match="prompt_embeds"):
        sampled(pipe, 1, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_stochastic_solver_draws_by_seed_and_number(pipe: Any) -> None:
    """Never from the global generator, so that a batch can be cut anywhere."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", **FLOW
    )
    options: dict[str, Any] = {"num_inference_steps": 6, "output_type": "pt"}
    state = torch.get_rng_state()
    whole = pipe(["1"] * 6, seed=4, **options).images
    assert torch.equal(torch.get_rng_state(), state)
    parts = [pipe(["1"] * n, seed=4, first=f, **options).images for n, f in ((2, 0), (4, 2))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(pipe(["1"] * 6, seed=5, **options).images, whole)


def test_the_schedulers_are_diffusers_own() -> None:
    """What the adapters add is missing there still; they go when it is not."""
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        assert not hasattr(kind(), "scale_model_input"), diffusers.__version__
