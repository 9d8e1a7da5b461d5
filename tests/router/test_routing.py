"""Routings as sets and weights: every kind, against brute force, ties and permutations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core import seeds
from atoll.core.errors import ExitCode, UsageError
from atoll.router.routing import (
    KINDS,
    Rule,
    draw,
    mean_of_draws,
    parse_rule,
    renormalise,
    support,
)

SHARDS = ["ada", "bo", "cleo", "dan"]
# An argument for every kind that takes one; a new kind without an example fails here.
EXAMPLES = {
    "full": "full",
    "top-k": "top-k:2",
    "mass": "mass:0.9",
    "threshold": "threshold:0.05",
    "sample": "sample:3",
    "once": "once",
    "oracle": "oracle:cleo",
}
DETERMINISTIC = ("full", "top-k:1", "top-k:3", "mass:0.5", "mass:0.9", "threshold:0.2")


def rows(sizes: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[list[float]]:
    """One posterior over 1 to 7 shards, zeros and ties among its weights."""
    weight = st.one_of(st.just(0.0), st.sampled_from([0.5, 0.25, 0.125]), st.floats(2.0**-40, 1.0))
    lists = (sizes or st.integers(1, 7)).flatmap(lambda n: st.lists(weight, min_size=n, max_size=n))
    return lists.filter(lambda row: sum(row) > 0).map(lambda row: [w / sum(row) for w in row])


def tensor(row: list[float]) -> Tensor:
    return torch.tensor([row], dtype=torch.float64)


def chosen(text: str, row: list[float]) -> list[int]:
    routing = parse_rule(text, [str(k) for k in range(len(row))])
    return support(routing, tensor(row))[0].nonzero()[:, 0].tolist()


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_written_back(kind: str) -> None:
    routing = parse_rule(EXAMPLES[kind], SHARDS)
    assert routing.kind == kind
    assert str(routing) == EXAMPLES[kind]
    assert parse_rule(str(routing), SHARDS) == routing
    assert routing.draws == {"sample": 3, "once": 1}.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_refuses_a_wrong_argument(kind: str) -> None:
    wrong = {
        "": ["", "1"],
        "K": ["", "0", "-1", "1.5", "two", "nan"],
        "M": ["", "0", "-1", "1.5", "inf"],
        "P": ["", "0", "-0.1", "1.1", "nan", "inf", "half", "90%"],
        "Q": ["", "0", "-0.1", "1.1", "nan", "inf"],
        "SHARD": ["", "zoe", "ADA"],
    }[KINDS[kind].argument]
    for argument in wrong:
        with pytest.raises(UsageError) as caught:
            parse_rule(f"{kind}:{argument}", SHARDS)
        assert caught.value.allowed
        assert caught.value.exit_code == ExitCode.USAGE
        expected = ", ".join(SHARDS) if kind == "oracle" else kind
        assert expected in caught.value.allowed


@pytest.mark.parametrize("text", [k for k, v in KINDS.items() if v.argument])
def test_an_argument_that_is_needed_is_asked_for(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rule(text, SHARDS)


@pytest.mark.parametrize(
    ("text", "meant"), [("fill", "full"), ("topk:2", "top-k"), ("treshold:0.1", "threshold")]
)
def test_an_unknown_routing_lists_the_choices_and_the_nearest(text: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text, SHARDS)
    assert f"Did you mean '{meant}'?" in caught.value.what
    for kind, row in KINDS.items():
        assert (f"{kind}:{row.argument}" if row.argument else kind) in caught.value.allowed


def test_an_unknown_shard_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'cleo'"):
        parse_rule("oracle:cleoo", SHARDS)


def test_a_shard_may_have_a_colon_in_its_name() -> None:
    assert parse_rule("oracle:a:b", ["a:b"]).argument == "a:b"


# -- sets ------------------------------------------------------------------------------------------


@given(row=rows())
def test_full_runs_all_that_have_weight(row: list[float]) -> None:
    assert chosen("full", row) == [k for k, w in enumerate(row) if w > 0]


@given(row=rows(), more=st.integers(0, 3))
def test_a_wide_routing_is_full(row: list[float], more: int) -> None:
    everything = renormalise(tensor(row))
    for text in (f"top-k:{len(row) + more}", "mass:1", "threshold:1e-13"):
        weights = tensor(row) * support(parse_rule(text, []), tensor(row))
        assert torch.equal(renormalise(weights), everything), text


@given(row=rows())
def test_mass_1_is_full_in_float32_too(row: list[float]) -> None:
    weights = tensor(row).float()
    assert torch.equal(support(Rule("mass", 1.0), weights), weights > 0)
    # Beside 1, in any precision, such a weight is less than the rounding of the sum.
    tiny = torch.tensor([[0.75, 1e-30, 0.0, 0.25]])
    for each in (tiny, tiny.double()):
        assert support(Rule("mass", 1.0), each).tolist() == [[True, True, False, True]]


@given(row=rows(), k=st.integers(1, 8))
def test_top_k_runs_the_k_likeliest_and_ties_go_to_the_first(row: list[float], k: int) -> None:
    order = sorted(range(len(row)), key=lambda shard: (-row[shard], shard))
    assert chosen(f"top-k:{k}", row) == sorted(order[:k])


@given(row=rows(), share=st.floats(1e-3, 1, exclude_max=True))
@settings(max_examples=200)
def test_mass_is_the_smallest_set_that_holds_it(row: list[float], share: float) -> None:
    got = chosen(f"mass:{share!r}", row)
    held = sum(row[k] for k in got)
    assert got
    assert held >= share - 1e-12
    smaller = itertools.combinations(range(len(row)), len(got) - 1)
    assert all(sum(row[k] for k in some) < share + 1e-12 for some in smaller)
    # Among the smallest sets, the one of the likeliest.
    best = max(sum(row[k] for k in s) for s in itertools.combinations(range(len(row)), len(got)))
    assert held == pytest.approx(best)


@given(row=rows(), least=st.floats(1e-3, 1))
def test_threshold_is_all_above_it_and_always_the_likeliest(row: list[float], least: float) -> None:
    above = {k for k, w in enumerate(row) if w >= least}
    assert chosen(f"threshold:{least!r}", row) == sorted(above | {row.index(max(row))})


def test_ties() -> None:
    even = [0.25] * 4
    assert chosen("top-k:2", even) == [0, 1]
    assert chosen("mass:0.5", even) == [0, 1]
    assert chosen("mass:0.51", even) == [0, 1, 2]
    assert chosen("threshold:0.25", even) == [0, 1, 2, 3]
    assert chosen("threshold:0.26", even) == [0]


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_ties_fall_the_same_way_in_any_batch(text: str) -> None:
    routing = parse_rule(text, SHARDS)
    levels = torch.tensor([0.5, 0.25, 0.25, 0.125])
    weights = levels[seeds.uniform(0, "w", first=0, count=300, each=40).mul(4).long()]
    alone = torch.cat([support(routing, weights[i : i + 1]) for i in range(len(weights))])
    assert torch.equal(support(routing, weights), alone)


@pytest.mark.parametrize("text", DETERMINISTIC)
@given(data=st.data())
@settings(max_examples=40)
def test_index_after_sort(text: str, data: st.DataObject) -> None:
    """The order of the shards is a name only: permuted weights give the permuted set."""
    shards = data.draw(st.integers(2, 7))
    # Distinct weights: a tie is broken by place, which is what a permutation changes.
    levels = data.draw(
        st.lists(st.integers(1, 10**6), min_size=shards, max_size=shards, unique=True)
    )
    weights = renormalise(torch.tensor([levels], dtype=torch.float64))
    order = torch.tensor(data.draw(st.permutations(range(shards))))
    routing = parse_rule(text, [])
    assert torch.equal(support(routing, weights[:, order]), support(routing, weights)[:, order])


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_sets_are_chosen_per_sample(text: str) -> None:
    weights = torch.eye(4, dtype=torch.float64)[torch.tensor([2, 0, 3, 1])]
    assert torch.equal(support(parse_rule(text, SHARDS), weights) & (weights > 0), weights > 0)


@pytest.mark.parametrize("text", ["once", "sample:2", "oracle:bo"])
def test_a_routing_that_draws_has_no_set(text: str) -> None:
    with pytest.raises(ValueError, match="by drawing or by name"):
        support(parse_rule(text, SHARDS), torch.ones(1, 4) / 4)


@given(row=rows())
def test_renormalise(row: list[float]) -> None:
    weights = tensor(row)
    assert float(renormalise(weights * 7).sum()) == pytest.approx(1)
    for k, weight in enumerate(row):
        sole = torch.zeros_like(weights)
        sole[0, k] = weight
        if weight > 0:
            assert float(renormalise(sole)[0, k]) == 1.0


# -- draws -----------------------------------------------------------------------------------------


@given(row=rows(), uniform=st.floats(2**-54, 1.0))
def test_draw_inverts_the_distribution_and_never_draws_what_has_no_weight(
    row: list[float], uniform: float
) -> None:
    shard = int(draw(tensor(row), torch.tensor([[uniform]], dtype=torch.float64)))
    assert row[shard] > 0
    below, through = math.fsum(row[:shard]), math.fsum(row[: shard + 1])
    assert below - 1e-12 <= uniform <= through + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_uniform_draws_the_last_shard_with_weight(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0]], dtype=dtype)
    assert draw(weights, torch.ones(1, 2)).tolist() == [[1, 1]]


def test_draw_is_a_function_of_the_sample_alone() -> None:
    weights = renormalise(seeds.uniform(1, "w", first=0, count=64, each=5))
    uniform = seeds.uniform(2, "u", first=0, count=64, each=3)
    alone = [draw(weights[i : i + 1], uniform[i : i + 1]) for i in range(64)]
    assert torch.equal(draw(weights, uniform), torch.cat(alone))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_shares_of_draws_follow_the_weights_in_any_order(order: list[int]) -> None:
    weights = torch.tensor([0.55, 0.3, 0.1, 0.05], dtype=torch.float64)[order]
    n = 40_000
    drawn = draw(weights.expand(n, 4), seeds.uniform(3, "u", first=0, count=n))
    shares = torch.bincount(drawn[:, 0], minlength=4) / n
    deviation = (shares - weights).abs() / (weights * (1 - weights) / n).sqrt()
    assert float(deviation.max()) < 4


def test_mean_of_draws_counts() -> None:
    drawn = torch.tensor([[0, 2, 2, 1], [3, 3, 3, 3]])
    expected = torch.tensor([[0.25, 0.25, 0.5, 0], [0, 0, 0, 1]])
    assert torch.equal(mean_of_draws(drawn, 4), expected)
