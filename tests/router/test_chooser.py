"""Bands of t, batches of different wishes, and solvers that ask twice, with closed-form experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.errors import UsageError
from atoll.router.chooser import SampleSettings, sample_settings, x_noise
from atoll.router.ensemble import mix
from atoll.router.routing import Routing, parse_routing

World = Any  # what `make_world` makes; see conftest.py
ALL = (
    "full", "once", "top-k:2", "mass:0.8", "threshold:0.2", "sample:2", "oracle:shard-01",
    "full>0.5,once", "once>0.7,full>0.3,sample:1", "top-k:2>0.6,oracle:shard-00",
)  # fmt: skip
SHARDS = ["a", "b>c", "d,e"]


def at(t: float, count: int) -> Tensor:
    return torch.full((count,), t, dtype=torch.float64)


# -- text ------------------------------------------------------------------------------------------


@given(
    rules=st.lists(
        st.sampled_from(["full", "once", "top-k:2", "mass:0.9", "sample:3", "oracle:a"]),
        min_size=1,
        max_size=4,
    ),
    ends=st.lists(st.integers(1, 999), min_size=3, max_size=3, unique=True),
)
def test_bands_are_read_and_written_back(rules: list[str], ends: list[float]) -> None:
    above = sorted((end / 1000 for end in ends), reverse=True)[: len(rules) - 1]
    text = ",".join(f"{rule}>{end}" for rule, end in zip(rules, above, strict=False))
    text = ",".join(filter(None, [text, rules[-1]]))
    routing = parse_routing(text, SHARDS)
    assert [str(rule) for rule in routing.rules] == rules
    assert list(routing.above) == above
    assert parse_routing(str(routing), SHARDS) == routing
    for band, (low, high) in enumerate(zip([*above, 0.0], [1.0, *above], strict=True)):
        assert routing.band((low + high) / 2) == band
        assert routing.band(low) == min(band + 1, len(above)), "a band holds above its end"


@pytest.mark.parametrize(
    "text",
    ["full>0.5", "full,once", "full>0.3,once>0.5,full", "full>1,once", "full>0,once", ">0.5,once",
     "full>x,once", "full>nan,once", "full>0.5,once,full", "full>0.5,once>0.5,full"],
)  # fmt: skip
def test_bands_that_do_not_follow_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bands") as caught:
        parse_routing(text, SHARDS)
    assert "full>0.5,once" in (caught.value.allowed or "")


@pytest.mark.parametrize("text", ["full>0.5,", "full>0.5,twice", "ful>0.5,once", ""])
def test_a_band_of_an_unknown_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Unknown routing"):
        parse_routing(text, SHARDS)


@pytest.mark.parametrize("shard", SHARDS)
def test_an_oracle_of_any_name(shard: str) -> None:
    (rule,) = parse_routing(f"oracle:{shard}", SHARDS).rules
    assert rule.argument == shard


def test_spaces_between_bands_are_nothing() -> None:
    assert parse_routing("full>0.5, once", SHARDS) == parse_routing("full>0.5,once", SHARDS)


# -- bands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_band_is_its_own_rule(make_world: Callable[..., World], guidance: float) -> None:
    """At every t the velocity is bitwise that of the rule that holds there, alone."""
    captions, noise = [1, 2, 0] * 4, x_noise(sample_settings(12, []), (2,)).double()
    banded = "full>0.75,top-k:2>0.5,mass:0.8>0.25,threshold:0.3"
    routing = parse_routing(banded, [])
    world = make_world(2)
    trajectory = world.trajectory(banded, captions, guidance=guidance, seed=4)
    for t in (1.0, 0.8, 0.75, 0.6, 0.4, 0.2, 0.01):
        rule = str(routing.rules[routing.band(t)])
        alone = make_world(2).trajectory(rule, captions, guidance=guidance, seed=4)
        assert torch.equal(trajectory(noise, at(t, 12)), alone(noise, at(t, 12))), (t, rule)


def test_once_draws_where_its_band_begins_and_again_in_another(
    make_world: Callable[..., World], prompt: Any
) -> None:
    world, n = make_world(2), 2000
    trajectory = world.trajectory("once>0.7,full>0.3,once", [0] * n, trace=True, seed=1)
    x_t = world.points.mean(dim=0).expand(n, 2)
    for t in (1.0, 0.8, 0.5, 0.3, 0.2, 0.1):
        trajectory(x_t, at(t, n))
    first, kept, full, drawn, held, end = (step.weights for step in trajectory.trace)
    assert torch.equal(first, kept)
    assert torch.equal(drawn, held)
    assert torch.equal(held, end)
    assert not torch.equal(first, drawn)
    torch.testing.assert_close(full, world.posterior(x_t, at(0.5, n), prompt([0] * n)))
    wanted = world.posterior(x_t[:1], at(0.3, 1), prompt([0]))[0]
    spread = (wanted * (1 - wanted) / n).sqrt().clamp(min=1e-9)
    assert float(((drawn.mean(dim=0) - wanted).abs() / spread).max()) < 4


# -- batches of different wishes -------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40)
def test_a_mixed_batch_is_every_sample_alone(
    make_world: Callable[..., World], data: st.DataObject
) -> None:
    """Routings, guidance and seeds of their own: each sample is what it would be by itself."""
    n = data.draw(st.integers(1, 6), label="n")
    each = {
        "routing": st.sampled_from(ALL),
        "guidance": st.sampled_from([1.0, 0.0, 2.5]),
        "seed": st.integers(0, 3),
    }
    drawn = {
        name: data.draw(st.lists(values, min_size=n, max_size=n), label=name)
        for name, values in each.items()
    }
    captions = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n), label="captions")
    one_posterior = data.draw(st.booleans(), label="one posterior")
    world, grid = make_world(8), sampler.times(5).double()

    def made(rows: list[int]) -> tuple[Tensor, Any]:
        own = {name: [values[row] for row in rows] for name, values in drawn.items()}
        trajectory = world.trajectory(
            own.pop("routing"), [captions[row] for row in rows], first=6, trace=True,
            one_posterior=one_posterior, **own,
        )  # fmt: skip
        noise = x_noise(sample_settings(len(rows), [], seed=own["seed"], first=6), (2,)).double()
        return sampler.euler(trajectory, noise, grid), trajectory

    together, trajectory = made(list(range(n)))
    alone = [made([row]) for row in range(n)]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), rtol=1e-9, atol=1e-9)
    for step, noted in enumerate(trajectory.trace):
        for name in ("weights", "gate_weights", "x_data"):
            parts = torch.cat([getattr(one.trace[step], name) for _, one in alone])
            torch.testing.assert_close(getattr(noted, name), parts, rtol=1e-9, atol=1e-9)
    assert trajectory.experts_run == sum(one.experts_run for _, one in alone)
    assert trajectory.null_experts_run == sum(one.null_experts_run for _, one in alone)


def test_in_a_mixed_batch_an_expert_is_called_once_and_the_gate_only_where_it_matters(
    make_world: Callable[..., World],
) -> None:
    world = make_world(2)
    routings = ["full", "once", "oracle:shard-00", "sample:1"]
    trajectory = world.trajectory(routings, [1] * 4, guidance=[3.0, 1.0, 2.0, 1.0])
    noise = x_noise(sample_settings(4, []), (2,)).double()
    trajectory(noise, at(1.0, 4))
    # full asks for both branches, once and sample for one, oracle for none.
    assert world.asked == 4
    assert len(world.calls) == len({k for k, _, _ in world.calls})
    # full has every expert in both branches, oracle its own in both.
    assert sum(nulls for _, _, nulls in world.calls) == 4 + 1
    trajectory(noise, at(0.5, 4))
    assert world.asked == 4 + 3, "once has drawn"


def test_runs_are_every_item_alone() -> None:
    items = [(1, 5), (1, 6), (2, 7), (2, 7), (2, 8), (1, 9), (1, 8)]
    assert list(seeds.runs(items)) == [(1, 5, 2), (2, 7, 1), (2, 7, 2), (1, 9, 1), (1, 8, 1)]
    assert list(seeds.runs([])) == []
    wishes = [SampleSettings(Routing(()), seed=seed, number=number) for seed, number in items]
    alone = [seeds.normal(s, "x_noise", first=i, count=1, shape=(3, 2)) for s, i in items]
    assert torch.equal(x_noise(wishes, (3, 2)), torch.cat(alone))


def test_settings_are_one_for_all_or_one_for_each() -> None:
    numbered = sample_settings(3, [], seed=4, first=2)
    assert [(each.seed, each.number) for each in numbered] == [(4, 2), (4, 3), (4, 4)]
    own = sample_settings(2, [], seed=[4, 5], guidance=[1, 2.5], routing=["full", "once"])
    assert [(each.seed, each.number, each.guidance) for each in own] == [(4, 0, 1), (5, 0, 2.5)]
    assert [str(each.routing) for each in own] == ["full", "once"]
    with pytest.raises(UsageError, match="2 values of guidance for 3 pictures"):
        sample_settings(3, [], guidance=[1.0, 2.0])
    with pytest.raises(UsageError, match="inf"):
        sample_settings(1, [], guidance=float("inf"))


# -- solvers that ask more than once ---------------------------------------------------------------


@pytest.mark.parametrize("routing", ["sample:2", "once", "full>0.5,sample:1"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_drawn_is_held_within_a_step(
    make_world: Callable[..., World], routing: str, guidance: float
) -> None:
    """Heun's second question of a step comes at another x_t and t, and meets the same experts."""
    world, n = make_world(2), 200
    trajectory = world.trajectory(routing, [1] * n, guidance=guidance, trace=True, seed=2)
    noise = x_noise(sample_settings(n, []), (2,)).double()
    for step, (t, next_t) in enumerate([(0.49, 0.4), (0.4, 0.3)]):
        trajectory(noise, at(t, n), step)
        trajectory(0.7 * noise, at(next_t, n), step)
    first, again, other, other_again = (step.weights for step in trajectory.trace)
    assert torch.equal(first, again)
    assert torch.equal(other, other_again)
    assert torch.equal(first, other) == (routing == "once")


def test_the_rule_of_a_step_is_that_of_its_beginning(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    trajectory = world.trajectory("oracle:shard-00>0.5,oracle:shard-01", [0] * 3)
    noise = x_noise(sample_settings(3, []), (2,)).double()
    for t, step in ((0.6, 0), (0.5, 0), (0.5, 1)):
        trajectory(noise, at(t, 3), step)
    assert [k for k, _, _ in world.calls] == [0, 0, 1]


# -- one posterior for both branches ---------------------------------------------------------------


@pytest.mark.parametrize("routing", ["full", "top-k:2", "sample:2"])
def test_one_posterior_mixes_both_branches_by_the_conditional_one(
    make_world: Callable[..., World], prompt: Any, routing: str
) -> None:
    world, n, t = make_world(9, slip=0.05), 20, 0.6
    x_t, cond, null = (
        x_noise(sample_settings(n, []), (2,)).double(),
        prompt([1] * n),
        prompt([0] * n),
    )
    trajectory = world.trajectory(
        routing, [1] * n, guidance=3.0, one_posterior=True, trace=True, seed=3
    )
    v = trajectory(x_t, at(t, n))
    assert world.asked == n, "the gate is asked about the caption alone"
    weights = trajectory.trace[0].weights
    v_c = mix(world.experts, weights, x_t, at(t, n), cond)
    v_0 = mix(world.experts, weights, x_t, at(t, n), null)
    torch.testing.assert_close(v, v_0 + 3 * (v_c - v_0), rtol=1e-9, atol=1e-9)
    both = world.trajectory(routing, [1] * n, guidance=3.0, seed=3)(x_t, at(t, n))
    assert not torch.allclose(v, both), "another law"
