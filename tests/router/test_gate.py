"""The gate: a softmax over heads and record counts, from which a shard can be taken exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.head import Band, GateHead, HeadCalibration, HeadConfig, new_head
from atoll.core.trunk import Features, Trunk, TrunkConfig, new_trunk
from atoll.router.gate import Gate, JointGate
from atoll.router.routing import renormalise

RECORDS = {"a": 700, "b": 31, "c": 4, "d": 1}
BAND = Band(t=0.5, slope=1.3, intercept=-0.2, loss=0.5, overlap=0.5, mean_ratio=1.0)


SHAPE = TrunkConfig(channels=1, pooled=6, width=8, stride=1, labels={"x": 5, "y": 2})
TRUNK = new_trunk(SHAPE, seed=0).eval()


def head(shard: str) -> GateHead:
    told = HeadCalibration(prompted=[BAND], unprompted=[BAND], text=BAND)
    config = HeadConfig(shard=shard, trunk_sha256="0", calibration=told)
    made = new_head(config, TRUNK).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=seeds.generator(0, shard, name)))
    return made


def question(n: int, t: float, *, null: bool = False) -> tuple[Tensor, Tensor, Conditioning]:
    pooled = torch.nn.functional.normalize(
        seeds.normal(2, "pooled", first=0, count=n, shape=(6,)), dim=1
    )
    cond = Conditioning(
        torch.zeros(n, 3, 4), torch.ones(n, 3, dtype=torch.bool), pooled,
        torch.full((n,), null),
    )  # fmt: skip
    x_t = seeds.normal(3, "x_t", first=0, count=n, shape=(1, 8, 8))
    return x_t, torch.full((n,), t), cond


@pytest.fixture(scope="module")
def heads() -> dict[str, GateHead]:
    return {shard: head(shard) for shard in RECORDS}


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_weights_are_counts_times_density_ratios(heads: dict[str, GateHead], t: float) -> None:
    asked = question(20, t)
    with torch.no_grad():
        p = Gate(TRUNK, heads, RECORDS)(*asked)
        features = TRUNK.features(*asked)
        f = {shard: made(features, *asked[1:]).double() for shard, made in heads.items()}
        odds = torch.stack([RECORDS[shard] * f[shard].exp() for shard in RECORDS], dim=1)
    torch.testing.assert_close(p.double(), renormalise(odds), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(20))
    assert float(p.std(dim=1).min()) > 0


def test_at_noise_without_a_caption_the_gate_is_the_prior(heads: dict[str, GateHead]) -> None:
    """The text head is calibrated, and the empty caption still says nothing at all."""
    with torch.no_grad():
        p = Gate(TRUNK, heads, RECORDS)(*question(5, 1.0, null=True))
    prior = torch.tensor([float(n) for n in RECORDS.values()])
    torch.testing.assert_close(p, (prior / prior.sum()).expand(5, 4))


@pytest.mark.parametrize("gone", RECORDS)
def test_taking_out_a_shard_renormalises_the_others(heads: dict[str, GateHead], gone: str) -> None:
    asked = question(20, 0.4)
    rest = {shard: made for shard, made in heads.items() if shard != gone}
    kept = [k for k, shard in enumerate(heads) if shard != gone]
    with torch.no_grad():
        # As log weights, where a small share keeps its digits beside a large one.
        whole = Gate(TRUNK, heads, RECORDS).log_weights(*asked)[:, kept].double()
        less = Gate(TRUNK, rest, RECORDS).log_weights(*asked).double()
    torch.testing.assert_close(whole.log_softmax(dim=1), less, rtol=1e-5, atol=1e-5)
    # The odds among those who stay are not touched by who left: heads see no other head.
    torch.testing.assert_close(whole.diff(dim=1), less.diff(dim=1), rtol=1e-5, atol=2e-5)


def test_the_order_of_the_heads_is_irrelevant(heads: dict[str, GateHead]) -> None:
    asked, order = question(20, 0.4), ["c", "a", "d", "b"]
    with torch.no_grad():
        p = Gate(TRUNK, heads, RECORDS)(*asked)
        q = Gate(TRUNK, {shard: heads[shard] for shard in order}, RECORDS)(*asked)
    torch.testing.assert_close(q, p[:, [list(RECORDS).index(shard) for shard in order]])


def test_counts_are_looked_up_by_name(heads: dict[str, GateHead]) -> None:
    asked = question(4, 0.4)
    with torch.no_grad():
        p = Gate(TRUNK, heads, RECORDS)(*asked)
        q = Gate(TRUNK, heads, dict(reversed(RECORDS.items())))(*asked)
    assert torch.equal(p, q)


def test_confident_heads_do_not_overflow() -> None:
    class Sure(torch.nn.Module):
        def __init__(self, f: float) -> None:
            super().__init__()
            self.f = torch.nn.Parameter(torch.tensor([f]), requires_grad=False)

        def forward(self, features: Features, _t: Tensor, _cond: Conditioning) -> Tensor:
            return self.f.expand(len(features.map))

    sure = {"a": Sure(-1e4), "b": Sure(1e4), "c": Sure(1e4), "d": Sure(0.0)}
    p = Gate(TRUNK, sure, RECORDS)(*question(2, 0.4))  # type: ignore[arg-type]
    expected = torch.tensor([[0.0, 31 / 35, 4 / 35, 0.0]]).expand(2, 4)
    # Beside 10,000 nats a count's logarithm has three digits left in float32.
    torch.testing.assert_close(p, expected, rtol=1e-2, atol=1e-6)


def test_odds_stay_in_float32() -> None:
    asked = question(4, 0.4)
    made = {shard: head(shard) for shard in RECORDS}
    gate = Gate(copy.deepcopy(TRUNK), made, RECORDS)
    with torch.no_grad():
        before = gate(*asked)
        gate.to(torch.bfloat16).half().to("cpu", torch.float64)
        assert torch.equal(gate(*asked), before)
        x_t, t, cond = asked
        wide = gate(x_t.double(), t.double(), cond.to(x_t.double()))
    assert torch.equal(wide, before)


def test_the_gate_moves_to_another_device() -> None:
    made = {shard: head(shard) for shard in RECORDS}
    gate = Gate(copy.deepcopy(TRUNK), made, RECORDS).to("meta", torch.bfloat16)
    assert {(w.device.type, w.dtype) for w in gate.parameters()} == {("meta", torch.float32)}


def test_the_trunk_runs_once_for_all_heads(heads: dict[str, GateHead]) -> None:
    class Counted(Trunk):
        calls = 0

        def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Features:
            Counted.calls += 1
            return super().features(x_t, t, cond)

    trunk = copy.deepcopy(TRUNK)
    trunk.__class__ = Counted
    with torch.no_grad():
        Gate(trunk, heads, RECORDS)(*question(4, 0.4))
    assert Counted.calls == 1


# -- the joint gate --------------------------------------------------------------------------------


def joint() -> Trunk:
    config = TrunkConfig(channels=1, pooled=6, width=8, stride=1, labels=RECORDS)
    made = new_trunk(config, seed=0).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeds.generator(4, "joint")))
    return made


def test_a_joint_gate_is_its_classifier_and_the_prior_at_noise() -> None:
    classifier = joint()
    gate, asked = JointGate(classifier, RECORDS), question(8, 0.4)
    torch.testing.assert_close(gate(*asked), classifier.logits(*asked).softmax(1))
    asked = question(8, 1.0)
    torch.testing.assert_close(gate(*asked), classifier.text_logits(asked[2]).softmax(1))
    prior = torch.tensor([float(n) for n in RECORDS.values()])
    said = gate(*question(5, 1.0, null=True))
    torch.testing.assert_close(said, (prior / prior.sum()).expand(5, 4))


@pytest.mark.parametrize("t", [0.4, 1.0])
def test_a_joint_gate_without_a_shard_is_renormalised(t: float) -> None:
    rest = {shard: count for shard, count in reversed(RECORDS.items()) if shard != "b"}
    p = JointGate(joint(), RECORDS)(*question(8, t))
    q = JointGate(joint(), rest)(*question(8, t))
    torch.testing.assert_close(q, renormalise(p[:, [3, 2, 0]]))
