"""Training on pictures of several shapes: learnt, resumed, divided, read from afar, refused."""

from __future__ import annotations

import io
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from atoll.core.buckets import Bucket
from atoll.core.cache import BlockCache
from atoll.core.denoiser import Denoiser
from atoll.core.embedding import FitConfig
from atoll.core.errors import ConfigError, Interrupted, Refused
from atoll.core.head import HeadConfig, new_head
from atoll.core.manifest import Manifest, Plan
from atoll.core.pack import Pack, join, open_pack
from atoll.core.storage import Storage
from atoll.core.trunk import Features, Trunk, TrunkConfig, new_trunk
from atoll.islands.base import new_base, train_base
from atoll.islands.data import Batch, Batches, rows_at
from atoll.islands.group import Group
from atoll.islands.island import run_island
from atoll.islands.loop import Milestones
from atoll.islands.settings import BaseConfig, DenoiserTraining, HeadTraining, TrainConfig
from atoll.islands.step import held_out_loss
from atoll.islands.supervise import plan_islands, write_order
from atoll.islands.train_denoiser import train_here
from atoll.islands.train_head import anchor_of, calibrate, head_loss
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig
from tests.islands.conftest import TRUNK
from tests.islands.ranks import pool

CPU = torch.device("cpu")
SHAPES = ("8x8", "6x12", "12x6")
TRAIN = TrainConfig(
    training=DenoiserTraining(passes=1, checkpoints=2, ema_decays=(0.5, 0.9)),
    head=HeadTraining(images=96, batch=16, bands=2),
    preview=4,
    preview_steps=2,
)


TRAIN_BASE = DenoiserTraining(checkpoints=4)


def gradients(path: Path, count: int = 240) -> str:
    """Ramps that lie, stand or are square, brighter to the right or downwards as their caption."""
    rows: dict[str, list[object]] = {"image": [], "caption": []}
    for number in range(count):
        height, width = ((8, 8), (6, 12), (12, 6), (10, 9))[number % 4]
        across, down = np.linspace(0, 200, width), np.linspace(0, 200, height)[:, None]
        right = number % 3 == 0
        values = (across if right else down) * np.ones((height, width)) + number % 50
        buffer = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(buffer, format="PNG")
        rows["image"].append(buffer.getvalue())
        rows["caption"].append("right" if right else "down")
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Three shapes in two shards, mirrored too."""
    folder = tmp_path_factory.mktemp("shapes")
    place = Storage(folder / "run")
    config = PartitionConfig(
        shards=2, commons="0.4", holdout=0.25, buckets=SHAPES, flips=True, records_per_file=32,
        fit=FitConfig(steps=5),
    )  # fmt: skip
    partition(gradients(folder / "corpus.parquet"), place, config)
    return place


@pytest.fixture(scope="module")
def commons(run: Storage) -> Pack:
    return Pack(run.local("commons"))


def batches_of(pack: Pack, **changes: Any) -> Batches:
    where = {"rows": pack.train, "seed": 0, "stream": "s", "device": CPU, "batch": 8}
    return Batches(pack, DenoiserTraining(), **{**where, **changes})


def same(one: Batch, other: Batch) -> bool:
    tensors = [(one.x_t, other.x_t), (one.t, other.t), (one.wanted, other.wanted)]
    tensors.append((one.cond.tokens, other.cond.tokens))
    return all(torch.equal(a, b) for a, b in tensors)


def train(
    run: Storage,
    recipe: str,
    place: Storage,
    *,
    passes: float,
    training: DenoiserTraining = TRAIN_BASE,
    **options: Any,
) -> tuple[Denoiser, Denoiser]:
    """A new base, and what it is after training on the commons."""
    manifest, pack = Manifest.load(run), Pack(run.local("commons"))
    config = BaseConfig(recipe=recipe)
    before, after = (new_base(manifest, pack, config).denoiser for _ in range(2))
    steps = round(passes * len(pack.train) / 8)
    trained = train_here(
        place, "work", after, pack, training, learning_rate=2e-3,
        plan=Plan(batch=8, images_seen=8 * steps), seed=0, stream="base", threads=1, device="cpu",
        **options,
    )  # fmt: skip
    return before, trained


def train_together(group: Group, uri: str, place: str) -> dict[str, Any]:
    """What a rank does of such a training, of batches in two parts."""
    training = DenoiserTraining(checkpoints=4, accumulation=2)
    _, trained = train(
        Storage(uri), "dit-tiny", Storage(place), passes=1, training=training, group=group
    )
    return {name: value.numpy() for name, value in trained.network.state_dict().items()}


def loss_in(denoiser: Denoiser, pack: Pack, bucket: Bucket) -> float:
    """The error on the held-out records of one shape."""
    (rows,) = bucket.runs
    others = batches_of(pack, rows=rows, stream="held-out")
    return held_out_loss(denoiser, others, DenoiserTraining())()


@pytest.mark.parametrize("recipe", ["unet-tiny", "uvit-tiny", "dit-tiny"])
def test_one_network_learns_every_shape(
    run: Storage, commons: Pack, tmp_path: Path, recipe: str
) -> None:
    before, after = train(run, recipe, Storage(tmp_path), passes=8)
    buckets = commons.buckets(commons.held_out)
    assert [bucket.picture.size for bucket in buckets] == list(SHAPES)
    for bucket in buckets:
        assert loss_in(after, commons, bucket) < 0.8 * loss_in(before, commons, bucket)


def test_stopped_in_the_middle_and_resumed_is_bitwise(run: Storage, tmp_path: Path) -> None:
    _, straight = train(run, "unet-tiny", Storage(tmp_path / "straight"), passes=2)
    group, place = Group(), Storage(tmp_path / "cut")

    def leave(_seen: int) -> dict[str, bytes]:
        group.leave.set()
        return {}

    with pytest.raises(Interrupted):
        train(run, "unet-tiny", place, passes=2, group=group, milestones=Milestones((88,), leave))
    _, resumed = train(run, "unet-tiny", place, passes=2)
    weights = resumed.network.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in straight.network.state_dict().items())
    metrics = [Storage(tmp_path / n).read_bytes("work/metrics.jsonl") for n in ("straight", "cut")]
    assert metrics[0] == metrics[1]


def test_every_batch_is_of_one_shape_and_the_parts_of_workers_are_the_batch(commons: Pack) -> None:
    batches, shapes = batches_of(commons), set()
    for first in range(0, 320, 8):
        whole = batches(first, 8)
        shapes.add(tuple(whole.x_t.shape[1:]))
        for world in (2, 3):
            groups = [Group() for _ in range(world)]
            for rank, group in enumerate(groups):
                group.rank, group.world = rank, world
            parts = [batches(*group.share(first, 8)) for group in groups]
            for name in ("x_t", "t", "wanted"):
                parted = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(parted, getattr(whole, name))
    assert shapes == {(1, 8, 8), (1, 6, 12), (1, 12, 6)}


def test_two_workers_are_one_with_the_same_batches(run: Storage, tmp_path: Path) -> None:
    alone = train_together(Group(), run.uri, str(tmp_path / "alone"))
    with pool(2) as ranks:
        both = ranks.run(train_together, run.uri, str(tmp_path / "both"))
    for weights in both:
        assert weights.keys() == alone.keys()
        for name, value in weights.items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-3, atol=1e-5)


def test_every_record_is_seen_and_mirrored_as_often_as_not(commons: Pack) -> None:
    n = len(commons)
    epochs = 40
    count = 8 * (epochs * len(commons.train) // 8)
    rows = rows_at(commons, commons.train, 0, "s", first=0, count=count, batch=8)
    seen = torch.bincount(rows % n, minlength=n)
    assert (seen[len(commons.train) :] == 0).all()
    assert epochs - 2 <= int(seen[: len(commons.train)].min())
    assert int(seen.max()) <= epochs + 2
    assert 0.47 < float((rows >= n).float().mean()) < 0.53
    held_out = rows_at(commons, commons.held_out, 0, "s", first=0, count=400, batch=8)
    assert set(held_out.tolist()) == set(commons.held_out)


def test_far_packs_are_the_near_ones(run: Storage, commons: Pack, monkeypatch) -> None:
    monkeypatch.setattr("atoll.core.rows._SMALL", 0)  # nothing is fetched whole
    place = Storage(f"memory://{uuid.uuid4().hex}")
    place.publish(Path(run.local("commons")), "commons")
    far = open_pack(place, Manifest.load(run).commons, BlockCache(1))
    assert far.is_far
    assert far.buckets(far.train) == commons.buckets(commons.train)
    near_batches, far_batches = batches_of(commons), batches_of(far)
    for first in range(0, 160, 8):
        assert same(near_batches(first, 8), far_batches(first, 8))
    with pytest.raises(ValueError, match="no one tensor"):
        far.x_data(torch.tensor([0, far.train[-1]]))
    place.remove("")


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_has_its_own_share_fetched_ahead(
    run: Storage, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    pack = Pack(run.local("commons"))
    told: list[torch.Tensor] = []
    monkeypatch.setattr(Pack, "is_far", True)
    monkeypatch.setattr(pack, "expect", told.append)
    count = 8 // world

    def asked(first: int) -> torch.Tensor:
        where = {"first": first + count * (world - 1), "count": count, "batch": 8, "stride": 8}
        return rows_at(pack, pack.train, 0, "s", **where)

    rows = [asked(first) for first in range(0, 88, 8)]
    assert torch.equal(told[0], torch.cat(rows[1:9]))
    assert torch.equal(told[2], torch.cat(rows[3:11]))


def test_joined_packs_have_the_buckets_of_all(run: Storage) -> None:
    packs = [Pack(run.local(f"shards/{name}")) for name in Manifest.load(run).shards]
    joined = join(packs)
    sizes = [{b.picture.size: len(b) for b in p.buckets(p.train)} for p in [*packs, joined]]
    assert sizes[2] == {name: sizes[0][name] + sizes[1][name] for name in SHAPES}
    for bucket in joined.buckets(joined.train):
        x_data = joined.x_data(bucket.rows(torch.arange(len(bucket))))
        theirs = [
            pack.x_data(its.rows(torch.arange(len(its))))
            for pack in packs
            for its in pack.buckets(pack.train)
            if its.picture == bucket.picture
        ]
        assert torch.equal(x_data, torch.cat(theirs))


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("pixart-tiny", "takes square pictures, these are 6x12"),
        ("sd3-tiny", "takes square pictures, these are 6x12"),
        ("unet-nano", "divides pictures by 8, these are 6x12"),
        ("uvit-nano", "divides pictures by 4, these are 6x12"),
    ],
)
def test_recipes_that_do_not_take_every_shape_are_refused(
    run: Storage, recipe: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        train_base(run, Manifest.load(run), BaseConfig(recipe=recipe))
    assert not run.exists("base-training")


@pytest.mark.parametrize("recipe", ["dit-tiny", "pixart-tiny"])
def test_published_weights_that_do_not_take_every_shape_are_refused(
    run: Storage, commons: Pack, tmp_path: Path, recipe: str
) -> None:
    manifest = Manifest.load(run)
    square = manifest.model_copy(update={"buckets": None})
    new_base(square, commons, BaseConfig(recipe=recipe)).denoiser.save(tmp_path / "start")
    start = BaseConfig(start=str(tmp_path / "start"))
    if recipe == "dit-tiny":
        assert new_base(manifest, commons, start).denoiser.card.family == "dit"
        return
    with pytest.raises(ConfigError, match="takes square pictures, these are 6x12"):
        new_base(manifest, commons, start)


def test_files_of_other_shapes_than_the_card_names_are_refused(
    run: Storage, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    Storage(tmp_path).publish(Path(run.local("commons")), "copy")
    card = Storage(folder).read_json("shard.json")
    names = list(card["shapes"])
    for shapes in (
        {**card["shapes"], names[0]: card["shapes"][names[-1]]},
        {name: card["shapes"][name] for name in names[1:]},
        {**card["shapes"], "pack-9.safetensors": card["shapes"][names[0]]},
    ):
        Storage(folder).write_json("shard.json", {**card, "shapes": shapes})
        with pytest.raises(Refused, match="shapes"):
            Pack(folder)


# -- gate heads, and a whole island --------------------------------------------------------------


def test_the_gate_head_meets_every_shape_of_shard_and_anchor(run: Storage, commons: Pack) -> None:
    shard = Pack(run.local("shards/shard-00"))
    settings = HeadTraining(batch=16, bands=2)
    labels = {"a": 3, "b": 1}
    shape = TrunkConfig(channels=1, pooled=commons.pooled_width, width=8, stride=1, labels=labels)
    trunk = new_trunk(shape, seed=0)
    head, met = new_head(HeadConfig(shard="shard-00", trunk_sha256="0"), trunk), set()
    anchor = anchor_of(commons, 0.25, held_out=False)

    class Spy(Trunk):
        def features(self, x_t: torch.Tensor, *rest: Any) -> Features:
            met.add((len(x_t), tuple(x_t.shape[2:])))
            return super().features(x_t, *rest)

    trunk.__class__ = Spy
    loss = head_loss(head, trunk, shard, anchor, settings, seed=0)
    for first in range(0, 480, 16):
        errors = loss(first, 16)
        assert float(errors.loss.detach()) == pytest.approx(
            2 * np.log(2), rel=1e-5
        )  # it says 0 still
        assert errors.each.shape == (32,)
    # Both sides together where they are of one shape, each by itself where not.
    sizes = {(8, 8), (6, 12), (12, 6)}
    assert met == {(count, size) for count in (16, 32) for size in sizes}
    # The same records whether a batch is a turn, some turns, or cut across them.
    assert torch.equal(loss(0, 48).t, torch.cat([loss(0, 20).t, loss(20, 28).t]))
    met.clear()
    loss(20, 28)
    assert {count for count, _ in met} <= {12, 16, 24, 32}
    calibrated = calibrate(head, trunk, shard, commons, settings, seed=0)
    told = calibrated.config.calibration
    assert [band.t for band in told.unprompted] == [0.25, 0.75]
    assert [band.t for band in told.prompted] == [0.25, 0.75]
    whole = [
        commons.x_data(bucket.rows(torch.arange(len(bucket)))).flatten()
        for bucket in commons.buckets(commons.train)
    ]
    assert float(anchor.mean) == pytest.approx(float(torch.cat(whole).mean()), abs=1e-6)
    assert float(anchor.std) == pytest.approx(float(torch.cat(whole).std()), abs=1e-6)


def test_an_island_of_several_shapes_comes_to_its_end(
    tmp_path: Path, run: Storage, digests: Callable[[Storage, str], dict[str, str]]
) -> None:
    ends = []
    for name in ("one", "two"):
        Storage(tmp_path).publish(Path(run.local("")), name)
        place = Storage(tmp_path / name)
        manifest = Manifest.load(place)
        training = DenoiserTraining(passes=1, checkpoints=1)
        train_base(place, manifest, BaseConfig(recipe="uvit-tiny", training=training, trunk=TRUNK))
        plan_islands(place, manifest, TRAIN)
        write_order(place, manifest, TRAIN, "shard-00")
        run_island(place.uri, "shard-00")
        ends.append(digests(place, "islands/shard-00"))
    assert ends[0] == ends[1]
    preview = Image.open(io.BytesIO(place.read_bytes("islands/shard-00/preview.png")))
    assert preview.width == preview.height  # of the main shape


@pytest.mark.skipif(shutil.which("c++") is None, reason="kernels are made by a C++ compiler")
def test_a_compiled_island_of_several_shapes_learns_what_an_eager_one_does(
    tmp_path: Path, run: Storage
) -> None:
    seen, losses = [], []
    for compiled in (False, True):
        name = f"compiled-{compiled}"
        Storage(tmp_path).publish(Path(run.local("")), name)
        place = Storage(tmp_path / name)
        manifest = Manifest.load(place)
        train_base(
            place, manifest, BaseConfig(recipe="dit-tiny", training=TRAIN.training, trunk=TRUNK)
        )
        training = DenoiserTraining(passes=1, checkpoints=2, compile=compiled)
        config = TRAIN.model_copy(update={"training": training, "preview_milestones": 2})
        plan_islands(place, manifest, config)
        write_order(place, manifest, config, "shard-00")
        run_island(place.uri, "shard-00")
        lines = place.read_lines("islands/shard-00/metrics.jsonl")
        seen.append([line["images_seen"] for line in lines])
        losses.append([(line["loss"], line["gradient_norm"]) for line in lines])
        shown = [n for n in place.list("islands/shard-00") if "preview-" in n]
        assert len(shown) == 2  # the first amid compiled steps, at shapes that they never had
    torch._dynamo.reset()
    assert seen[0] == seen[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[1] != losses[0]  # by other kernels


@pytest.fixture
def digests() -> Callable[[Storage, str], dict[str, str]]:
    """sha256 of what an island publishes."""

    def read(run: Storage, folder: str) -> dict[str, str]:
        parts = [f"{folder}/{part}" for part in ("expert", "gate_head", "preview.png")]
        return {part: run.sha256(part) for part in parts}

    return read
