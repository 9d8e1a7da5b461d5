"""Promise 1 with closed-form experts: the identity, every routing's sets and calls, guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import flow, sampler, seeds
from atoll.router.ensemble import mix
from atoll.router.routing import KINDS, draw, parse_rule, renormalise, support

World = Any  # what `make_world` makes; see conftest.py
ROUTINGS = {
    "full": "full",
    "top-k": "top-k:2",
    "mass": "mass:0.8",
    "threshold": "threshold:0.2",
    "sample": "sample:3",
    "once": "once",
    "oracle": "oracle:shard-01",
}
# Ways to write "every expert", and so the identity.
EXACT = ("full", "top-k:99", "mass:1", "threshold:1e-300")


def x_noise(count: int, shape: tuple[int, ...] = (2,), seed: int = 7) -> Tensor:
    return seeds.normal(seed, "x_noise", first=0, count=count, shape=shape).double()


def times(t: float, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((count,), t, dtype=dtype)


def on_path(world: World, t: float, count: int, seed: int = 7) -> Tensor:
    """x_t of some records of the world."""
    rows = seeds.uniform(seed, "rows", first=0, count=count)[:, 0].mul(len(world.points)).long()
    noise = x_noise(count, tuple(world.points.shape[1:]), seed)
    return flow.interpolate(world.points[rows], noise.to(world.points), times(t, count))


def recorded(world: World, routing: str, x_t: Tensor, t: float, captions: list[int], **o: Any):
    """One step: its velocity and its trace."""
    trajectory = world.trajectory(routing, captions, trace=True, **o)
    v = trajectory(x_t, times(t, len(x_t), x_t.dtype))
    assert trajectory.trace is not None
    return v, trajectory.trace[0]


def test_the_closed_form_is_the_formula(make_world: Callable[..., World], prompt: Any) -> None:
    """The reference itself, against sums written out over three points on a line."""
    world = make_world(sizes=(2, 1), shape=(1,), captions=1, slip=0.0)
    a, b, c = (float(p) for p in world.points)
    x, t = 0.4, 0.7
    w = [math.exp(-((x - (1 - t) * p) ** 2) / (2 * t * t)) for p in (a, b, c)]
    mean = (w[0] * a + w[1] * b + w[2] * c) / sum(w)
    x_t = torch.tensor([[x]], dtype=torch.float64)
    # velocity = E[x_noise - x_data] with x_noise = (x_t - (1 - t) x_data) / t
    expected = (x - (1 - t) * mean) / t - mean
    assert float(world.velocity(x_t, times(t, 1), prompt([0]))) == pytest.approx(expected)
    share = (w[0] + w[1]) / sum(w)
    assert float(world.posterior(x_t, times(t, 1), prompt([0]))[0, 0]) == pytest.approx(share)


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    t=st.one_of(st.just(1.0), st.just(0.001), st.floats(0.001, 1)),
    caption=st.integers(0, 2),
    slip=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=60)
def test_full_is_the_global_velocity(
    make_world: Callable[..., World],
    prompt: Any,
    seed: int,
    sizes: list[int],
    t: float,
    caption: int,
    slip: float,
) -> None:
    """DFM identity (arXiv 2501.05450, eq. 7) for any data, number of shards and time."""
    world = make_world(seed, sizes=sizes, slip=slip)
    if not bool((world.likelihood[caption] > 0).any()):
        caption = 0  # no record has this caption: there is nothing to be equal to
    x_t = on_path(world, t, 5, seed)
    expected = world.velocity(x_t, times(t, 5), prompt([caption] * 5))
    for routing in EXACT:
        got, step = recorded(world, routing, x_t, t, [caption] * 5)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 / t)
        assert torch.allclose(step.weights.sum(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_the_identity_holds_in_float32(
    make_world: Callable[..., World], prompt: Any, t: float
) -> None:
    exact, world = make_world(3), make_world(3, dtype=torch.float32)
    x_t = on_path(exact, t, 32)
    expected = exact.velocity(x_t, times(t, 32), prompt([1] * 32))
    got, _ = recorded(world, "full", x_t.float(), float(torch.tensor(t)), [1] * 32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5 / t)


def test_the_identity_holds_for_pictures_and_mixed_captions(
    make_world: Callable[..., World], prompt: Any
) -> None:
    world = make_world(5, shape=(3, 4, 4), sizes=(5, 4, 3), spread=0.05)
    captions = [0, 1, 2, 1, 0, 2]
    x_t = on_path(world, 0.6, 6)
    got, _ = recorded(world, "full", x_t, 0.6, captions)
    expected = world.velocity(x_t, times(0.6, 6), prompt(captions))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_whole_trajectory_is_the_global_one(
    make_world: Callable[..., World], prompt: Any
) -> None:
    world = make_world(1)
    noise, cond = x_noise(20), prompt([1] * 20)
    got = sampler.euler(world.trajectory("full", [1] * 20), noise, sampler.times(25).double())
    expected = sampler.euler(
        lambda x_t, t: world.velocity(x_t, t, cond), noise, sampler.times(25).double()
    )
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


# -- every routing ---------------------------------------------------------------------------------


def expected_weights(routing: str, p: Tensor, world: World, seed: int) -> Tensor:
    """What a routing makes of a posterior, without the class under test."""
    parsed = parse_rule(routing, world.names)
    if parsed.kind == "oracle":
        weights = torch.zeros_like(p)
        weights[:, world.names.index(str(parsed.argument))] = 1
        return weights
    if parsed.draws:
        uniform = seeds.uniform(seed, "routing", 0, first=0, count=len(p), each=parsed.draws)
        one_hot = torch.nn.functional.one_hot(draw(p, uniform), p.shape[1])
        return one_hot.to(p).mean(dim=1)
    kept = p * support(parsed, p)
    return kept / kept.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1.0, 0.5, 0.2])
def test_every_routing_mixes_its_own_experts_and_calls_no_other(
    make_world: Callable[..., World], prompt: Any, kind: str, t: float
) -> None:
    world = make_world(2)
    captions = [1, 2, 0] * 5
    x_t, cond = on_path(world, t, 15), prompt(captions)
    p = world.posterior(x_t, times(t, 15), cond)
    v, step = recorded(world, ROUTINGS[kind], x_t, t, captions, seed=3)
    weights = expected_weights(ROUTINGS[kind], p, world, seed=3)
    torch.testing.assert_close(step.weights, weights, rtol=1e-6, atol=1e-7)
    assert torch.equal(step.gate_weights, p)
    assert torch.allclose(step.weights.sum(dim=1), torch.ones(15, dtype=torch.float64))
    # Each expert is called at most once, with exactly the rows that give it weight.
    wanted = {k: int((weights[:, k] > 0).sum()) for k in range(world.count)}
    assert {k: rows for k, rows, _ in world.calls} == {k: n for k, n in wanted.items() if n}
    assert len(world.calls) == len({k for k, _, _ in world.calls})
    assert step.experts_run == sum(wanted.values())
    each = [world.velocity_over(world.shard == k, x_t, times(t, 15), cond) for k in range(4)]
    summed = sum(weights[:, k : k + 1] * each[k] for k in range(4))
    torch.testing.assert_close(v, summed, rtol=1e-6, atol=1e-6)


def test_an_expert_without_data_for_the_caption_is_never_run(
    make_world: Callable[..., World],
) -> None:
    """Its velocity is NaN, and 0 * NaN would tell."""
    world = make_world(4, captions=3, slip=0.0, sizes=(6, 4, 1, 1))
    missing = (world.likelihood[1] * (world.shard == 3)).sum() == 0
    assert missing, "the last shard has no record with caption 1"
    for routing in ("full", "top-k:4", "mass:1", "threshold:0.01", "sample:4", "once"):
        v, _ = recorded(world, routing, x_noise(12), 0.4, [1] * 12, guidance=2.0)
        assert bool(v.isfinite().all()), routing


@pytest.mark.parametrize("routing", ["full", "top-k:2", "mass:0.8", "threshold:0.2"])
@pytest.mark.parametrize("order", [[3, 0, 2, 1], [1, 2, 3, 0]])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_index_after_sort_along_a_trajectory(
    make_world: Callable[..., World], routing: str, order: list[int], guidance: float
) -> None:
    """Shards in another order are the same ensemble: weights permuted, pictures equal."""
    world, places = make_world(6), torch.tensor(order)
    other = world.permuted(places)
    made = []
    for each in (world, other):
        trajectory = each.trajectory(routing, [1, 2] * 8, guidance=guidance, trace=True)
        x_data = sampler.euler(trajectory, x_noise(16), sampler.times(12).double())
        made.append((x_data, trajectory.trace))
    torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-9, atol=1e-9)
    for a, b in zip(made[0][1], made[1][1], strict=True):
        torch.testing.assert_close(a.weights[:, places], b.weights, rtol=1e-9, atol=1e-12)
        assert a.experts_run == b.experts_run


def test_oracle_is_the_shard_of_that_name_wherever_it_stands(
    make_world: Callable[..., World],
) -> None:
    world = make_world(6)
    for place, name in enumerate(world.names):
        world.calls.clear()
        recorded(world, f"oracle:{name}", x_noise(4), 0.5, [0] * 4)
        assert world.calls == [(place, 4, 4)]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_once_keeps_its_expert(make_world: Callable[..., World], guidance: float) -> None:
    world = make_world(2)
    trajectory = world.trajectory("once", [1] * 30, guidance=guidance, trace=True)
    sampler.euler(trajectory, x_noise(30), sampler.times(10).double())
    first = trajectory.trace[0].weights
    assert torch.equal(first.max(dim=1).values, torch.ones(30, dtype=torch.float64))
    assert all(torch.equal(step.weights, first) for step in trajectory.trace)
    assert len(first.sum(dim=0).nonzero()) > 1, "not everybody has the same expert"
    # The posterior of later steps is still told, and is not what was drawn from at the start.
    assert not torch.equal(trajectory.trace[-1].gate_weights, trajectory.trace[0].gate_weights)


def test_sample_draws_anew_at_every_step(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    trajectory = world.trajectory("sample:1", [1] * 30, trace=True)
    for _ in range(5):
        trajectory(x_noise(30), times(1.0, 30))
    drawn = torch.stack([step.weights.argmax(dim=1) for step in trajectory.trace])
    assert bool((drawn != drawn[0]).any(dim=0).float().mean() > 0.5)


@pytest.mark.parametrize("routing", ROUTINGS.values())
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cuts", [[5], [1, 2, 11], [4, 8]])
def test_a_batch_can_be_cut_anywhere(
    make_world: Callable[..., World], routing: str, guidance: float, cuts: list[int]
) -> None:
    world, grid = make_world(8), sampler.times(6).double()
    captions, noise = [1, 2, 0] * 4, x_noise(12)

    def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
        trajectory = world.trajectory(
            routing, captions[start:stop], guidance=guidance, seed=5, first=100 + start, trace=True
        )
        x_data = sampler.euler(trajectory, noise[start:stop], grid)
        return x_data, torch.stack([step.weights for step in trajectory.trace])

    whole, weights = part(0, 12)
    edges = [0, *cuts, 12]
    pieces = [part(a, b) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(
        torch.cat([w for _, w in pieces], dim=1), weights, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(torch.cat([x for x, _ in pieces]), whole, rtol=1e-9, atol=1e-9)


# -- guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["full", "top-k:1", "top-k:2", "mass:0.7", "threshold:0.3"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_has_two_posteriors_over_the_union_of_their_sets(
    make_world: Callable[..., World], prompt: Any, routing: str, scale: float
) -> None:
    world, n, t = make_world(9, slip=0.05), 25, 0.6
    x_t, cond, null = on_path(world, t, n), prompt([1, 2] * 12 + [1]), prompt([0] * n)
    at = times(t, n)
    p, q = world.posterior(x_t, at, cond), world.posterior(x_t, at, null)
    parsed = parse_rule(routing, world.names)
    sets = [[set(s.nonzero()[:, 0].tolist()) for s in support(parsed, w)] for w in (p, q)]
    v, step = recorded(world, routing, x_t, t, [1, 2] * 12 + [1], guidance=scale)
    differ = 0
    for row in range(n):
        union = sorted(sets[0][row] | sets[1][row])
        differ += sets[0][row] != sets[1][row]
        one = slice(row, row + 1)

        def branch(weights: Tensor, c: Any, union: list[int] = union, one: slice = one) -> Tensor:
            total = sum(float(weights[k]) for k in union)
            shares = {k: float(weights[k]) / total for k in union}
            return sum(
                share * world.velocity_over(world.shard == k, x_t[one], at[one], c[one])
                for k, share in shares.items()
            )

        v_c, v_0 = branch(p[row], cond), branch(q[row], null)
        torch.testing.assert_close(v[one], v_0 + scale * (v_c - v_0), rtol=1e-9, atol=1e-9)
    assert differ or routing == "full", "the union was never more than one of its sets"
    assert step.experts_run == 2 * sum(len(a | b) for a, b in zip(*sets, strict=True))
    # One call an expert, for the rows of both branches together.
    assert len(world.calls) == len({k for k, _, _ in world.calls})
    assert sum(nulls for _, _, nulls in world.calls) == step.experts_run // 2


@pytest.mark.parametrize("routing", ROUTINGS.values())
def test_guidance_1_skips_the_null_branch(make_world: Callable[..., World], routing: str) -> None:
    world = make_world(2)
    v, step = recorded(world, routing, x_noise(9), 0.5, [1] * 9, guidance=1.0)
    plain, _ = recorded(make_world(2), routing, x_noise(9), 0.5, [1] * 9)
    assert torch.equal(v, plain)
    assert all(nulls == 0 for _, _, nulls in world.calls)
    assert world.asked == 9, "the gate is asked about the caption alone"
    assert step.experts_run == sum(rows for _, rows, _ in world.calls)


@pytest.mark.parametrize("routing", ["once", "oracle:shard-00"])
def test_once_and_oracle_use_one_expert_for_both_branches(
    make_world: Callable[..., World], prompt: Any, routing: str
) -> None:
    world, n = make_world(2), 12
    x_t, at = on_path(world, 0.7, n), times(0.7, n)
    cond, null = prompt([1] * n), prompt([0] * n)
    v, step = recorded(world, routing, x_t, 0.7, [1] * n, guidance=3.0)
    for row, k in enumerate(step.weights.argmax(dim=1).tolist()):
        one, mine = slice(row, row + 1), world.shard == k
        v_c = world.velocity_over(mine, x_t[one], at[one], cond[one])
        v_0 = world.velocity_over(mine, x_t[one], at[one], null[one])
        torch.testing.assert_close(v[one], v_0 + 3 * (v_c - v_0), rtol=1e-9, atol=1e-9)
    # Half of the rows of every call are the null branch of the other half.
    assert all(rows == 2 * nulls for _, rows, nulls in world.calls)


def test_sample_draws_both_branches_with_the_same_uniforms(
    make_world: Callable[..., World], prompt: Any
) -> None:
    world, n, t = make_world(9, slip=0.3), 40, 0.7
    x_t, at = on_path(world, t, n), times(t, n)
    cond, null = prompt([1] * n), prompt([0] * n)
    v, step = recorded(world, "sample:2", x_t, t, [1] * n, guidance=3.0, seed=11)
    uniform = seeds.uniform(11, "routing", 0, first=0, count=n, each=2)
    branches = []
    for c in (cond, null):
        drawn = draw(world.posterior(x_t, at, c), uniform)
        weights = torch.nn.functional.one_hot(drawn, 4).double().mean(dim=1)
        branches.append((weights, mix(world.experts, weights, x_t, at, c)))
    (w_c, v_c), (w_0, v_0) = branches
    assert torch.equal(step.weights, w_c)
    assert float((w_c == w_0).all(dim=1).double().mean()) > 0.6, "close posteriors, equal draws"
    torch.testing.assert_close(v, v_0 + 3 * (v_c - v_0), rtol=1e-9, atol=1e-9)


def test_guidance_of_the_empty_caption_is_the_unguided_velocity(
    make_world: Callable[..., World],
) -> None:
    x_t = on_path(make_world(2), 0.5, 10)
    guided, _ = recorded(make_world(2), "full", x_t, 0.5, [0] * 10, guidance=5.0)
    plain, _ = recorded(make_world(2), "full", x_t, 0.5, [0] * 10)
    torch.testing.assert_close(guided, plain, rtol=1e-12, atol=1e-12)


# -- missing islands -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    left=st.sets(st.integers(0, 4), min_size=1, max_size=4),
    routing=st.sampled_from(
        [*ROUTINGS.values(), "top-k:1", "full>0.5,once", "once>0.3,mass:0.9", "sample:2>0.6,full"]
    ),
    guidance=st.sampled_from([1.0, 0.0, 2.5]),
)
@settings(max_examples=60)
def test_without_shards_the_ensemble_is_the_law_of_the_others_under_every_routing(
    make_world: Callable[..., World],
    seed: int,
    left: set[int],
    routing: str,
    guidance: float,
) -> None:
    """Promise 6: dropping experts and their heads is never having had their records."""
    # No two shards are equally likely by chance, where top-k would go by the last bit.
    world, kept = make_world(seed, sizes=(7, 5, 4, 3, 2), slip=0.2137), sorted(left)
    present = torch.isin(world.shard, torch.tensor(kept))
    rest = type(world)(
        world.points[present],
        torch.searchsorted(torch.tensor(kept), world.shard[present]),
        world.likelihood[:, present],
    )
    options = {"guidance": guidance, "seed": seed, "trace": True}
    routing = routing.replace("shard-01", rest.names[-1])
    alone = rest.trajectory(routing, [1, 2, 0] * 4, **options)
    # What is there of the whole: so many experts, and the odds of so many heads.
    among = rest.trajectory(routing, [1, 2, 0] * 4, **options)
    among._experts = [world.experts[k] for k in kept]
    among._gate = lambda *at: renormalise(world.posterior(*at)[:, kept])
    made = [sampler.euler(each, x_noise(12), sampler.times(6).double()) for each in (alone, among)]
    torch.testing.assert_close(*made, rtol=1e-7, atol=1e-7)
    for one, other in zip(alone.trace, among.trace, strict=True):
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-7, atol=1e-9)
        assert one.experts_run == other.experts_run
