"""The measuring instrument: gates whose error is known, closed-form posteriors on real packs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.head import Band, HeadCalibration, HeadConfig
from atoll.core.manifest import Picture
from atoll.core.pack import Pack, ShardCard, write_pack, write_shard_card
from atoll.router.calibrate import calibration_error, measure_gate

MEANS = {"a": -0.4, "b": 0.0, "c": 0.4}
STD = 0.3
SIZES = {"a": 300, "b": 900, "c": 600}  # held out, of twice as many


def answers(seed: int, n: int, off: float = 0.0, *, bins: int = 15) -> tuple[float, float]:
    """Squared error and noise of a confidence that is `off` too high, everywhere alike."""
    confidence = 0.4 + 0.5 * seeds.uniform(seed, "confidence", first=0, count=n)[:, 0]
    right = seeds.uniform(seed, "right", first=0, count=n)[:, 0] < confidence - off
    found = calibration_error(confidence, right, bins=bins)
    return found.error, found.noise


def test_a_perfect_gate_shows_no_more_than_chance() -> None:
    found = [answers(seed, 2_000) for seed in range(60)]
    noise = sum(noise for _, noise in found) / len(found)
    # One deviation of the square is what noise promises: by chance a sixth lies beyond it.
    beyond = sum(error > noise for error, _ in found) / len(found)
    assert 0.05 < beyond < 0.3
    assert sum(error == 0 for error, _ in found) > 20  # else it would be biased upwards
    assert answers(0, 10_000)[0] < 0.015


@pytest.mark.parametrize("off", [0.05, 0.1, 0.3])
def test_a_known_error_is_found(off: float) -> None:
    found = [answers(seed, 2_000, off)[0] ** 2 for seed in range(20)]
    assert sum(found) / len(found) == pytest.approx(off**2, abs=0.0008 + 0.01 * off)


def test_a_known_error_in_one_half_is_not_averaged_away() -> None:
    confidence = torch.cat([torch.full((20_000,), 0.5), torch.full((20_000,), 0.9)])
    uniform = seeds.uniform(0, "right", first=0, count=40_000)[:, 0]
    right = uniform < torch.cat([torch.full((20_000,), 0.6), torch.full((20_000,), 0.8)])
    assert calibration_error(confidence, right).error == pytest.approx(0.1, abs=0.005)


def test_records_in_order_of_their_shards_are_no_error_where_all_weights_are_one() -> None:
    right = torch.arange(3_000) < 1_200
    wobble = 1e-9 * seeds.normal(0, "last bits", first=0, count=3_000)
    found = calibration_error(0.4 + wobble, right)
    assert found.error < 0.001


# -- a gate on packs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    """Gaussian 2x2 pictures about three means; the caption names one of two, at even odds."""
    made = {}
    for name, mean in MEANS.items():
        folder, count = tmp_path_factory.mktemp(name), 2 * SIZES[name]
        x = mean + STD * seeds.normal(0, name, first=0, count=count, shape=(1, 2, 2))
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        table = Conditioning(
            torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.bool), torch.eye(3, 2),
            torch.tensor([True, False, False]),
        )  # fmt: skip
        write_pack(folder / "pack-00000.safetensors", pixels, torch.arange(count) % 2 + 1, table)
        card = ShardCard(
            name=name, records=count // 2, held_out=count // 2, encoder="none", files={},
            picture=Picture(channels=1, height=2, width=2), packs={"pack-00000.safetensors": count},
        )  # fmt: skip
        write_shard_card(folder, card)
        made[name] = Pack(folder)
    return made


def gate(tempered: float = 1.0, turned: bool = False) -> Callable[..., Tensor]:
    """The exact posterior; likelihoods to a power, or two of the shards mistaken for each other."""

    def weights(x_t: Tensor, t: Tensor, _cond: Conditioning) -> Tensor:
        means = torch.tensor(list(MEANS.values())).flip(0) if turned else list(MEANS.values())
        variance = ((1 - t) * STD) ** 2 + t**2
        away = [(x_t - ((1 - t) * m)[:, None, None, None]).square().sum((1, 2, 3)) for m in means]
        f = -torch.stack(away, 1) / (2 * variance[:, None])
        counts = torch.tensor([float(n) for n in SIZES.values()]).log()
        return (tempered * f + counts).softmax(1)

    return weights


def test_the_exact_posterior_is_calibrated_and_no_worse_than_its_prior(packs) -> None:
    found = measure_gate(gate(), packs, seed=0)
    assert found.n == sum(SIZES.values())
    assert [band.t for band in found.prompted] == [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert (found.warnings, found.recommended) == ([], None)
    for band in (*found.prompted, *found.unprompted):
        assert band.calibration_error < 2 * band.calibration_noise
        assert band.nll < band.prior_nll + 1e-6
    losses = [band.nll for band in found.unprompted]
    assert losses == sorted(losses)
    shares = torch.tensor([n / 1_800 for n in SIZES.values()])
    assert found.unprompted[-1].nll == pytest.approx(float(-(shares * shares.log()).sum()))
    assert found.unprompted[-1].accuracy == pytest.approx(0.5)
    assert found.unprompted[-1].calibration_error < 1e-3


def test_a_tempered_posterior_is_found_out(packs) -> None:
    exact, sharp = (measure_gate(gate(power), packs, seed=0) for power in (1.0, 2.0))
    for good, bad in zip(exact.prompted[:4], sharp.prompted[:4], strict=True):
        assert bad.nll > good.nll
        assert bad.accuracy == pytest.approx(good.accuracy, abs=0.06)
        assert bad.calibration_error > max(0.04, 2 * bad.calibration_noise)
    assert (exact.warnings, exact.recommended) == ([], None)
    assert [warning[:26] for warning in sharp.warnings] == ["the weights are off by up "] * 2
    assert sharp.recommended == "once"


def test_a_gate_that_is_worse_than_its_prior_is_named_with_what_to_do(packs) -> None:
    found = measure_gate(gate(turned=True), packs, seed=0)
    assert found.unprompted[0].worse_than_prior == ["a", "c"]
    assert found.recommended == "once"
    assert any("weight of a is worse than its prior at t = 0.1" in w for w in found.warnings)
    assert not any("weight of b" in w for w in found.warnings)


def test_a_head_out_of_sight_is_named(packs) -> None:
    def head(shard: str, overlap: float) -> HeadConfig:
        band = Band(t=0.1, slope=1, intercept=0, loss=0.1, overlap=overlap, mean_ratio=1)
        told = HeadCalibration(prompted=[band], unprompted=[band])
        return HeadConfig(shard=shard, trunk_sha256="0", calibration=told)

    heads = {"a": head("a", 0.3), "b": head("b", 0.001), "c": head("c", 0.3)}
    found = measure_gate(gate(), packs, heads=heads, seed=0)
    said = "b has no overlap with the anchor at t = 0.1, "
    assert found.warnings == [f"{said}with prompt", f"{said}without prompt"]
    assert found.recommended == "once"
    assert found.heads["b"].prompted[0].overlap == 0.001


@pytest.mark.parametrize("how", ["found", "told"])
def test_where_captions_mislead_too_no_routing_is_recommended(packs, how: str) -> None:
    """`once` would draw by them."""

    def misled(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        first = torch.tensor([0.9, 0.05, 0.05]).expand(len(t), -1)
        return torch.where(((t == 1) & ~cond.is_null)[:, None], first, gate()(x_t, t, cond))

    apart = Band(t=1, slope=1, intercept=0, loss=0.1, overlap=0.001, mean_ratio=1)
    config = HeadConfig(shard="b", trunk_sha256="0", calibration=HeadCalibration(text=apart))
    asked, heads = (misled, {}) if how == "found" else (gate(), {"b": config})
    found = measure_gate(asked, packs, heads=heads, seed=0)
    if how == "found":
        assert all("at t = 1, with prompt" in warning for warning in found.warnings)
    else:
        assert found.warnings == ["b has no overlap with the anchor by captions alone"]
    assert found.recommended is None


def test_captions_that_say_nothing_of_shards_mislead_nobody(packs) -> None:
    """Styles share their captions: `once` draws by the record counts, which is right."""
    flat = Band(t=1, slope=0, intercept=0, loss=0.69, overlap=1, mean_ratio=1)
    told = HeadCalibration(text=flat)
    heads = {shard: HeadConfig(shard=shard, trunk_sha256="0", calibration=told) for shard in MEANS}
    found = measure_gate(gate(), packs, heads=heads, seed=0)
    assert found.warnings == [f"{s} was worse than its prior by captions alone" for s in MEANS]
    assert found.recommended == "once"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, []),
        (Band(t=1, slope=0, intercept=0, loss=0.69, overlap=1, mean_ratio=0), []),  # no captions
        (
            Band(t=1, slope=1, intercept=0, loss=0.1, overlap=0.001, mean_ratio=1),
            ["has no overlap with the anchor by captions alone"],
        ),
    ],
)
def test_what_captions_say_alone_is_warned_of(text: Band | None, said: list[str]) -> None:
    assert HeadCalibration(text=text).warnings() == said


def test_fewer_records_are_a_seeded_choice_of_all(packs) -> None:
    few = [measure_gate(gate(), packs, seed=seed, count=200) for seed in (0, 0, 1)]
    assert few[0].n == 200
    assert few[0] == few[1] != few[2]
    assert few[0].unprompted[0].nll == pytest.approx(
        measure_gate(gate(), packs, seed=0).unprompted[0].nll, abs=0.15
    )


def test_without_held_out_records_nothing_is_said() -> None:
    found = measure_gate(gate(), {}, seed=0)
    assert (found.n, found.prompted, found.recommended) == (0, [], None)
