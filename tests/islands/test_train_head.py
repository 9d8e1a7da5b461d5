"""A gate head against closed-form log density ratios, and its calibration against known scales."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.head import GateHead, HeadConfig, new_head
from atoll.core.manifest import Picture, Plan
from atoll.core.pack import Pack, ShardCard, write_pack, write_shard_card
from atoll.core.storage import Storage
from atoll.core.trunk import Features, Trunk, TrunkConfig, new_trunk
from atoll.islands.course import Course
from atoll.islands.island import head_course
from atoll.islands.loop import Loop
from atoll.islands.settings import (
    DenoiserTraining,
    HeadTraining,
    TrainConfig,
    TrunkTraining,
    plan_beside,
)
from atoll.islands.train_head import _band, anchor_of, calibrate, head_loss, label_shares
from atoll.islands.train_trunk import by_filter, by_label, train_classifier

SHIFT = 0.25  # of the shard's pixels up and the commons' down, in units of [-1, 1]
STD = 0.3


def make_pack(
    folder: Path, name: str, mean: float, caption: int, *, shared: bool = True, every: int = 1
) -> Pack:
    """Gaussian 4x4 pictures about a mean, under two captions, or one that the other side lacks.

    One in `every` has a caption.
    """
    folder.mkdir()
    count = 2_000
    x = mean + STD * seeds.normal(0, name, first=0, count=count, shape=(1, 4, 4))
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    table = Conditioning(
        torch.zeros(3, 2, 4),
        torch.ones(3, 2, dtype=torch.bool),
        torch.nn.functional.normalize(torch.eye(3, 4) + 0.1, dim=1),
        torch.tensor([True, False, False]),
    )
    # Two captions on both sides, the shard's own three times as often as the other.
    other = 3 - caption if shared else caption
    captions = torch.where(torch.arange(count) % 4 == 0, other, caption)
    captions = torch.where(torch.arange(count) % every == 0, captions, 0)
    write_pack(folder / "pack-00000.safetensors", pixels, captions, table)
    card = ShardCard(
        name=name, records=1_500, held_out=500, picture=Picture(channels=1, height=4, width=4),
        encoder="none", packs={"pack-00000.safetensors": count}, files={},
    )  # fmt: skip
    write_shard_card(folder, card)
    return Pack(folder)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Pack]:
    folder = tmp_path_factory.mktemp("packs")
    return make_pack(folder / "a", "a", SHIFT, 1), make_pack(folder / "c", "commons", -SHIFT, 2)


SETTINGS = HeadTraining(
    images=16_000, batch=64, broad=0.0, bands=3, condition_dropout=1.0, learning_rate=4e-3
)
SHAPE = {"channels": 1, "pooled": 4, "width": 16, "stride": 1}
HEAD = HeadConfig(shard="a", trunk_sha256="0")


@pytest.fixture(scope="module")
def trunk(packs: tuple[Pack, Pack], tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    """One that has learnt to tell filters apart on the commons alone."""
    one = by_label(["content"], torch.zeros(len(packs[1]), dtype=torch.long), packs[1])
    task = by_filter(one, 0, 1)
    return train_classifier(
        Storage(tmp_path_factory.mktemp("trunk")), "work", TrunkConfig(**SHAPE, labels=task.counts),
        packs[1], task, TrunkTraining(batch=64), Plan(batch=64, images_seen=9_600),
        seed=0, stream="trunk", threads=1, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def head(packs: tuple[Pack, Pack], trunk: Trunk, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    shard, commons = packs
    trained = new_head(HEAD, trunk)
    course = Course(
        plan=plan_beside(SETTINGS, Plan(batch=1, images_seen=1)),
        learning_rate=4e-3,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        warmup=0.05,
        clip=1.0,
        ema_decays=(0.99,),
        checkpoints=1,
    )
    loss = head_loss(
        trained, trunk, shard, anchor_of(commons, 0.0, held_out=False), SETTINGS, seed=0
    )
    place = Storage(tmp_path_factory.mktemp("head"))
    Loop(place, "head", trained, course, name="head").run(loss)
    return calibrate(trained, trunk, shard, commons, SETTINGS, seed=0)


def exact_ratio(x_t: Tensor, t: Tensor) -> Tensor:
    """log N(x_t; (1-t) m, v) - log N(x_t; -(1-t) m, v) = 2 (1-t) m sum(x_t) / v."""
    variance = ((1 - t) * STD) ** 2 + t**2
    return 2 * (1 - t) * SHIFT * x_t.sum(dim=(1, 2, 3)) / variance


def test_a_shard_that_is_easily_told_from_the_anchor_fails_no_head(
    tmp_path: Path, trunk: Trunk
) -> None:
    shard = make_pack(tmp_path / "a", "a", 0.9, 1, shared=False)
    commons = make_pack(tmp_path / "c", "commons", -0.9, 2, shared=False)
    # Captions all but give the side away, and now and then one is dropped.
    settings = HeadTraining(images=24_000, broad=0.0, condition_dropout=0.02)
    config = TrainConfig(head=settings.model_copy(update={"learning_rate": 4e-3}))
    head = new_head(HEAD, trunk)
    course = head_course(config, Plan(batch=1, images_seen=1), cost=0.0)
    loss = head_loss(head, trunk, shard, anchor_of(commons, 0.0, held_out=False), settings, seed=0)
    place = Storage(tmp_path / "run")
    Loop(place, "head", head, course, name="head").run(loss)
    journal = place.read_bytes("head/journal.jsonl").decode()
    assert [json.loads(line)["event"] for line in journal.splitlines()] == ["trained"]
    with torch.no_grad():
        assert float(loss(0, 512).loss) < 0.05


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_head_is_the_log_density_ratio(packs, trunk, head, t: float) -> None:
    shard, commons = packs
    x = torch.cat([p.x_data(torch.tensor(p.held_out)) for p in packs])
    times = torch.full((len(x),), t)
    noise = seeds.normal(9, "test", first=0, count=len(x), shape=(1, 4, 4))
    x_t = flow.interpolate(x, noise, times)
    with torch.no_grad():
        cond = shard.null.expand(len(x))
        found = head(trunk.features(x_t, times, cond), times, cond)
    exact = exact_ratio(x_t, times)
    # As a classifier it must be within a few hundredths of a nat of the exact posterior.
    wanted = (torch.arange(len(x)) < len(shard.held_out)).float()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert float(bce(found, wanted)) < float(bce(exact, wanted)) + 0.03
    assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.9
    assert len(commons) == len(shard)


def test_at_noise_text_alone_answers_and_nothing_answers_zero(packs, trunk, head) -> None:
    shard, _ = packs
    x = seeds.normal(1, "noise", first=0, count=3, shape=(1, 4, 4))
    one = torch.ones(3)
    # Captions 1 and 2 stand 3:1 and 1:3 in shard and commons.
    cond = concatenate([shard.null, shard.cond(torch.tensor([1, 0]))])
    with torch.no_grad():
        f = head(trunk.features(x, one, cond), one, cond)
        elsewhere = head(trunk.features(torch.zeros_like(x), one, cond), one, cond)
    assert torch.equal(f, elsewhere)
    assert float(f[0]) == 0
    assert float(f[1]) == pytest.approx(math.log(3), abs=0.25)
    assert float(f[2]) == pytest.approx(-math.log(3), abs=0.25)


def test_calibration_says_how_far_to_trust(head) -> None:
    bands = head.config.calibration.unprompted
    assert [band.t for band in bands] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert bands[0].loss < bands[1].loss < bands[2].loss < math.log(2)
    assert bands[0].overlap < bands[2].overlap <= 1
    # Where the shard is nearly out of the anchor's sight, 512 records cannot tell the mean.
    assert 0.7 < bands[2].mean_ratio < 1.4


class Exact(Trunk):
    """Says x_t, t and whether there is a caption."""

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Features:
        return Features(x_t, torch.stack([t, cond.is_null.float()], dim=1))


class Distorted(GateHead):
    """The exact ratio, half as sure without captions, 1.25 times and off centre with them."""

    def raw(self, features: Features, text: Tensor) -> Tensor:
        t, is_null = features.signal.T
        f = exact_ratio(features.map, t)
        return torch.where(is_null.bool(), f / 2, 1.25 * f + 1)


def test_what_is_off_with_captions_is_mended_apart_from_what_is_off_without(packs, trunk) -> None:
    shard, commons = packs
    distorted = Distorted(HEAD, trunk.config)
    exact = Exact(trunk.config)
    told = calibrate(distorted, exact, shard, commons, SETTINGS, seed=0).config.calibration
    # In the first band hardly a record is doubtful, and there is nothing to fit by.
    for prompted, unprompted in zip(told.prompted[1:], told.unprompted[1:], strict=True):
        assert unprompted.slope == pytest.approx(2, rel=0.12)
        assert unprompted.intercept == pytest.approx(0, abs=0.12)
        assert prompted.slope == pytest.approx(0.8, rel=0.12)
        assert prompted.intercept == pytest.approx(-0.8, abs=0.12)


class Counting(GateHead):
    """The exact ratio where one record in five of the shard has a caption, and all others have."""

    def raw(self, features: Features, text: Tensor) -> Tensor:
        t, is_null = features.signal.T
        return exact_ratio(features.map, t) - math.log(5) * (is_null == 0)


def test_how_many_records_have_captions_is_no_error(packs, trunk, tmp_path: Path) -> None:
    sparse = make_pack(tmp_path / "sparse", "a", SHIFT, 1, every=5)
    head = Counting(HEAD, trunk.config)
    told = calibrate(head, Exact(trunk.config), sparse, packs[1], SETTINGS, seed=0)
    for bands in (told.config.calibration.prompted, told.config.calibration.unprompted):
        for band in bands[1:]:
            assert band.slope == pytest.approx(1, abs=0.15)
            assert band.intercept == pytest.approx(0, abs=0.2)
    assert told.config.calibration.prompted[2].mean_ratio == pytest.approx(0.2, rel=0.3)


def test_without_captions_on_one_side_both_kinds_are_calibrated_alike(
    packs, trunk, tmp_path: Path
) -> None:
    commons = packs[1]
    bare = make_pack(tmp_path / "bare", "a", SHIFT, 0, shared=False)
    head = Distorted(HEAD, trunk.config)
    told = calibrate(head, Exact(trunk.config), bare, commons, SETTINGS, seed=0).config.calibration
    assert told.prompted == told.unprompted != []


class TooSure(GateHead):
    """Three times as sure of a caption as it should be, and lost where there is none."""

    def raw_text(self, cond: Conditioning) -> Tensor:
        # A third of the shard has one, 3:1, and all of the commons, 1:3.
        right = torch.where(cond.pooled.argmax(dim=1) == 2, -math.log(9), 0.0)
        return torch.where(cond.is_null, 6.0, 3 * right)


def test_what_a_caption_says_is_calibrated_by_records_that_have_one(
    packs, trunk, tmp_path: Path
) -> None:
    third = make_pack(tmp_path / "third", "a", SHIFT, 1, every=3)
    told = calibrate(TooSure(HEAD, trunk.config), trunk, third, packs[1], SETTINGS, seed=0)
    text = told.config.calibration.text
    assert text.slope == pytest.approx(1 / 3, rel=0.1)
    assert text.intercept == pytest.approx(0, abs=0.12)


def test_where_one_side_has_no_captions_they_say_nothing(packs, trunk, tmp_path: Path) -> None:
    bare = make_pack(tmp_path / "none", "a", SHIFT, 0, shared=False)
    told = calibrate(TooSure(HEAD, trunk.config), trunk, bare, packs[1], SETTINGS, seed=0)
    cond = packs[1].cond(torch.arange(4))
    assert not cond.is_null.any()
    assert torch.equal(told.text(cond), torch.zeros(4))


def test_no_label_is_given_up_or_thought_likelier_for_being_rare(packs) -> None:
    """Of a shard that is all of one label, others stand at a hundredth of their share at least."""
    counts = {"only": 700, "common": 290, "rare": 10}
    trunk = new_trunk(TrunkConfig(**SHAPE, labels=counts), seed=0)

    def sure(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return (
            torch.tensor([20.0, 0.0, 0.0]).expand(len(x_t), 3) + trunk.config.log_shares().float()
        )

    trunk.logits = sure  # type: ignore[method-assign]
    tilt = label_shares(trunk, packs[0], SETTINGS, seed=0) - trunk.config.log_shares()
    assert tilt.tolist() == pytest.approx(
        [-math.log(0.7), math.log(0.01), math.log(0.01)], abs=0.01
    )


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.7), (1.0, -1.0)])
def test_a_band_undoes_a_known_distortion(slope: float, intercept: float) -> None:
    torch.manual_seed(0)
    own, others = torch.randn(20_000) + 0.5, torch.randn(20_000) - 0.5  # exact logit: x itself
    band = _band(
        0.5, (own - intercept) / slope, (others - intercept) / slope, drawn=(len(own), len(others))
    )
    assert band.slope == pytest.approx(slope, rel=0.05)
    assert band.intercept == pytest.approx(intercept, abs=0.05)
    assert band.mean_ratio == pytest.approx(1.0, abs=0.05)


def test_a_head_with_the_wrong_sign_is_flattened_not_turned() -> None:
    band = _band(0.5, torch.full((500,), -3.0), torch.full((500,), 3.0), drawn=(500, 500))
    assert (band.slope, band.intercept) == (0, 0)
    assert band.loss == pytest.approx(math.log(2))
    assert band.mean_ratio == pytest.approx(1)


def test_a_wrong_sign_off_centre_leaves_the_odds_alone() -> None:
    torch.manual_seed(0)
    band = _band(0.5, torch.randn(2_000) + 1, torch.randn(2_000) + 3, drawn=(2_000, 2_000))
    assert (band.slope, band.intercept) == (0, 0)


def test_a_head_commits_by_the_clock_as_its_expert_does() -> None:
    config = TrainConfig(training=DenoiserTraining(checkpoint_seconds=5))
    course = head_course(config, Plan(batch=1, images_seen=1), cost=0.0)
    assert (course.checkpoint_seconds, course.checkpoints) == (5, 2)


def test_a_head_stays_light_beside_its_expert() -> None:
    expert = Plan(batch=32, images_seen=100_000)
    assert plan_beside(HeadTraining(share=0.5, batch=64), expert).images_seen == 49_984
    assert plan_beside(HeadTraining(images=100, batch=64), expert).images_seen == 64
    small = Plan(batch=8, images_seen=80)
    assert plan_beside(HeadTraining(batch=50), small).images_seen == 4_000
    # Of two shares the smaller one: of images, and of computations.
    for cost, images in ((0.1, 100_000), (0.25, 100_000), (0.5, 50_000), (2.0, 12_500)):
        assert plan_beside(HeadTraining(batch=50), expert, cost=cost).images_seen == images
    strict = HeadTraining(batch=50, share=2, compute=0.1)
    assert plan_beside(strict, expert, cost=0.05).images_seen == 200_000
    assert plan_beside(strict, expert, cost=0.2).images_seen == 50_000


def test_the_anchor_is_one_for_all_shards_and_broad_where_asked(packs) -> None:
    _, commons = packs
    plain = anchor_of(commons, 0.0, held_out=False)
    x, cond = plain.draw(0, "train", first=10, count=50)
    again, _ = plain.draw(0, "train", first=30, count=20)
    assert torch.equal(x[20:40], again[:20])
    assert len(cond) == 50
    broad = anchor_of(commons, 0.9, held_out=True)
    wide, _ = broad.draw(0, "train", first=0, count=4_000)
    assert float(wide.std()) == pytest.approx(2 * float(plain.std.mean()), rel=0.1)
    rows = {float(v) for v in commons.x_data(torch.tensor(commons.held_out)).flatten()}
    narrow, _ = anchor_of(commons, 0.0, held_out=True).draw(0, "calibrate", first=0, count=100)
    assert {float(v) for v in narrow.flatten()} <= rows


def test_the_commons_pixels_are_judged_by_runs_of_records(
    packs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, commons = packs
    every = commons.x_data(torch.tensor(commons.train)).double()
    whole = anchor_of(commons, 0.0, held_out=True)
    assert whole.mean.tolist() == every.mean((0, 2, 3))[:, None, None].float().tolist()
    assert whole.std.item() == pytest.approx(every.std().item(), rel=1e-6)
    monkeypatch.setattr("atoll.islands.train_head._PIXEL_RECORDS", 500)
    part = anchor_of(commons, 0.0, held_out=True)
    assert part.mean.tolist() != whole.mean.tolist()
    assert part.mean.item() == pytest.approx(whole.mean.item(), abs=0.02)
    assert part.std.item() == pytest.approx(whole.std.item(), abs=0.02)
