"""Which routing `auto` is, from figures made up for it."""

from __future__ import annotations

import pytest

from atoll.evaluate.choice import SHARE_MARGIN, choose_routing
from atoll.evaluate.evaluation import Evaluation, Row
from atoll.evaluate.features import ENCODER
from atoll.evaluate.metrics import Estimate, Quality
from atoll.evaluate.shares import Shares
from atoll.evaluate.verdict import verdict
from atoll.router.calibrate import GateCalibration

Made = tuple[str, float, float | None, float]  # name, KID, excess of shares, passes


def estimate(value: float, half: float = 0.01) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=50, n_reference=40)


def row(name: str, kid: float, excess: float | None, passes: float, kind: str = "ensemble") -> Row:
    quality = Quality(
        frechet=estimate(2), kid=estimate(kid), precision=estimate(0.8), recall=estimate(0.7)
    )
    shares = None
    if excess is not None:
        counts = {"a": 20, "b": 30}
        distance = estimate(0.02 + excess)
        shares = Shares(counts=counts, reference=counts, distance=distance, noise_level=0.02)
    return Row.model_validate({
        "name": name, "kind": kind, "shard": None, "about": "", "n": 50, "steps": 5,
        "guidance": 1.0, "experts_per_step": passes / 5, "passes_per_picture": passes,
        "spaces": {ENCODER: quality}, "shares": shares,
        "ensemble": "ours" if kind == "ensemble" else None,
        "routing": name if kind == "ensemble" else None,
    })  # fmt: skip


def evaluation(*rows: Row) -> Evaluation:
    return Evaluation(
        seed=0, n=50, n_reference=40, reference="held-out records", spaces={ENCODER: "embeddings"},
        dimensions={ENCODER: 64}, control=None, rows=list(rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected", "why"),
    [
        # As good as the best, and cheaper.
        ([("full", 0.10, 0, 20), ("once", 0.11, 0, 5)], "once", "5 passes"),
        # Cheaper, and surely worse.
        ([("full", 0.10, 0, 20), ("once", 0.13, 0, 5)], "full", "further from real"),
        # The best of all by KID starves shards.
        ([("full", 0.2, 0, 20), ("once", 0.2, 0, 5), ("top-k:1", 0.1, 0.2, 5)], "once", "top-k:1"),
        ([("full", 0.2, SHARE_MARGIN - 1e-9, 20), ("once", 0.1, 0.051, 5)], "full", "once starved"),
        # None has the shares right: the nearest, whatever it costs.
        ([("full", 0.1, 0.2, 20), ("top-k:1", 0.1, 0.3, 5)], "full", "none has shares"),
        # Nothing is known of shares.
        ([("full", 0.1, None, 20), ("mass:0.9", 0.1, None, 9)], "mass:0.9", "9 passes"),
        # Level in everything: of one law with the ensemble, and the first that was asked for.
        ([("top-k:1", 0.1, 0, 5), ("once", 0.1, 0, 5)], "once", "of 2 routings"),
        ([("top-k:1", 0.1, 0, 5), ("mass:0.9", 0.1, 0, 5)], "top-k:1", "of 2 routings"),
    ],
)
def test_the_cheapest_of_the_good_ones(rows: list[Made], expected: str, why: str) -> None:
    made = evaluation(*(row(*each) for each in rows), row("soup", 0.01, 0, 1, kind="soup"))
    chosen = choose_routing(made, "ours", "e" * 64)
    assert chosen is not None
    assert (chosen.routing, chosen.ensemble_sha256) == (expected, "e" * 64)
    assert why in chosen.why
    said = verdict(made.model_copy(update={"auto": chosen}))
    assert any(f"“{expected}” from now on: {chosen.why}" in sentence for sentence in said)


def test_without_an_ensemble_there_is_none() -> None:
    made = evaluation(row("soup", 0.01, 0, 1, kind="soup"), row("once", 0.1, 0, 5))
    assert choose_routing(made, "another", "e" * 64) is None


def test_a_gate_that_is_not_to_be_trusted_decides() -> None:
    gate = GateCalibration(
        n=9, shards=["a"], prompted=[], unprompted=[], warnings=["it is off"], recommended="once"
    )
    rows = [row("full", 0.1, 0, 5), row("once", 0.2, 0.3, 20)]
    made = evaluation(*rows).model_copy(update={"gates": {"ours": gate}})
    chosen = choose_routing(made, "ours", "e" * 64)
    assert chosen is not None
    assert (chosen.routing, "not to be trusted" in chosen.why) == ("once", True)
    # Though it was not measured: what was asks a gate that is not to be trusted.
    unmeasured = choose_routing(made.model_copy(update={"rows": rows[:1]}), "ours", "e" * 64)
    assert unmeasured == chosen
