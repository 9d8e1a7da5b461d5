"""The base: every family and objective learns, and published weights are a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from atoll.core import recipes
from atoll.core.denoiser import Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest, Plan
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.base import WORK, new_base, train_base, train_here
from atoll.islands.data import Batches, rows_at
from atoll.islands.lora import attach
from atoll.islands.settings import BaseConfig, DenoiserTraining, LoraConfig
from atoll.islands.step import held_out_loss

CPU = torch.device("cpu")


@pytest.fixture
def unbased(fresh) -> tuple[Storage, Manifest]:
    """A run that is partitioned and has no base."""
    run, manifest = fresh()
    run.remove("base")
    run.remove(WORK)
    manifest.base = manifest.recipe = None
    return run, manifest


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_objective_learns(made: Path, tmp_path, family: str, prediction) -> None:
    manifest = Manifest.load(Storage(made))
    pack = Pack(made / "shards" / "shard-00")
    training = DenoiserTraining(prediction=prediction, ema_decays=(0.9,), checkpoints=1)
    base = new_base(manifest, pack, BaseConfig(recipe=f"{family}-tiny", training=training))
    others = Batches(pack, training, rows=pack.held_out, seed=0, stream="held-out", device=CPU)
    measured = held_out_loss(base.denoiser, others, training)
    before = measured()
    train_here(
        Storage(tmp_path), "x", base.denoiser, pack, training,
        learning_rate=5e-3, plan=Plan(batch=16, images_seen=16 * 60), seed=0, stream="x",
        threads=1, device="cpu",
    )  # fmt: skip
    assert measured() < 0.9 * before


def test_a_heartbeat_says_what_an_image_costs_and_what_the_device_does(made: Path) -> None:
    pack, run = Pack(made / "shards" / "shard-00"), Storage("memory://speeds")
    costs = {}
    for what, lora in (("full", LoraConfig()), ("adapters", LoraConfig(rank=2))):
        training = DenoiserTraining(accumulation=2, gradient_checkpointing=True, lora=lora)
        base = new_base(Manifest.load(Storage(made)), pack, BaseConfig(recipe="dit-tiny"))
        picture, network = pack.card.picture, base.denoiser.network
        forward = recipes.forward_flops(network, "dit", picture, pack.null)
        attach(network, lora, seed=0)
        train_here(
            run, what, base.denoiser, pack, training,
            learning_rate=1e-3, plan=Plan(batch=8, images_seen=16), seed=0, stream="x",
            threads=1, device="cpu",
        )  # fmt: skip
        beat = run.read_json(f"{what}/heartbeat.json")
        costs[what] = beat["flops_per_image"] / forward
        assert 1e8 < beat["matmul_flops_per_second"] < 1e16
    assert costs == {"full": 3, "adapters": 2}


def test_each_record_is_seen_once_an_epoch(made: Path) -> None:
    pack = Pack(made / "shards" / "shard-00")
    seen: list[int] = []

    class Spy(Pack):
        def __init__(self) -> None:
            self.__dict__.update(pack.__dict__)

        def x_data(self, rows: torch.Tensor) -> torch.Tensor:
            seen.extend(rows.tolist())
            return pack.x_data(rows)

    config = DenoiserTraining()
    batches = Batches(Spy(), config, rows=pack.train, seed=0, stream="s", device=CPU)
    n = len(pack.train)
    for first in range(0, 2 * n, 5):
        batches(first, min(5, 2 * n - first))
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(pack.train)
    assert seen[:n] != seen[n:]


def test_flips_are_a_coin_of_the_position_and_spare_the_held_out(made: Path) -> None:
    pack = Pack(made / "shards" / "shard-00")
    plain = rows_at(pack, pack.train, 0, "s", first=0, count=400)
    pack.card = pack.card.model_copy(update={"flips": True})
    rows = rows_at(pack, pack.train, 0, "s", first=0, count=400)
    assert torch.equal(rows % len(pack), plain)  # the order is as it was
    mirrored = rows >= len(pack)
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(rows[37:90], rows_at(pack, pack.train, 0, "s", first=37, count=53))
    n = len(pack.train)
    first, second = mirrored[: 2 * n].chunk(2)
    assert not torch.equal(first, second)  # another coin in another epoch
    held_out = rows_at(pack, pack.held_out, 0, "s", first=0, count=400)
    assert set(held_out.tolist()) == set(pack.held_out)
    batches = Batches(pack, DenoiserTraining(), rows=pack.train, seed=0, stream="s", device=CPU)
    rows = rows_at(pack, pack.train, 0, "s", "order", first=8, count=8)
    batch, x_data = batches(8, 8), pack.x_data(rows)
    # x_t - t * velocity is x_data again.
    found = batch.x_t - batch.t[:, None, None, None] * batch.wanted
    assert torch.allclose(found, x_data, atol=1e-5)


def test_a_far_base_is_the_near_one(unbased) -> None:
    near, manifest = unbased
    far = Storage("memory://far-base")
    for name in near.list():
        far.write_bytes(name, near.read_bytes(name))
    config = BaseConfig(training=DenoiserTraining(passes=1, checkpoints=1))
    made = train_base(far, manifest.model_copy(deep=True), config)
    assert made == train_base(near, manifest, config)
    far.remove("")


def _published(folder: Path, manifest: Manifest, text_width: int) -> Path:
    """A pipeline folder as somebody else saved it, whose network predicts epsilon."""
    picture = manifest.picture
    network = recipes.build(recipes.recipe_of("unet-tiny"), picture, text_width, seed=9)
    network.save_pretrained(folder / "unet")  # type: ignore[operator]
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_a_published_pipeline_is_a_start(unbased, tmp_path: Path) -> None:
    run, manifest = unbased
    width = Pack(run.local("commons")).text_width
    start = str(_published(tmp_path / "published", manifest, width))
    training = DenoiserTraining(passes=1, checkpoints=1)
    config = BaseConfig(start=start, training=training)
    train_base(run, manifest, config)
    base = Denoiser.load(run.local("base"))
    assert (manifest.recipe, base.card.prediction) == ("unet-tiny", Prediction.VELOCITY)
    entry = Ledger(run).latest("base", "base")
    assert entry is not None
    assert entry.note["start"] == start
    assert len(entry.note["start_sha256"]) == 64
    # It did start there: a training too short to go far is still near.
    theirs = recipes.build(recipes.recipe_of("unet-tiny"), manifest.picture, width, seed=9)
    random = recipes.build(recipes.recipe_of("unet-tiny"), manifest.picture, width, seed=8)
    ours = torch.nn.utils.parameters_to_vector(base.network.parameters())
    far, near = (
        (ours - torch.nn.utils.parameters_to_vector(other.parameters())).norm()
        for other in (random, theirs)
    )
    assert 0 < near < far / 3

    train_base(run, manifest, config)  # done, and the same
    with pytest.raises(ConfigError, match="start="):
        train_base(run, manifest, config.model_copy(update={"start": "elsewhere"}))


def test_a_start_that_does_not_fit_is_refused(unbased, tmp_path: Path) -> None:
    run, manifest = unbased
    width = Pack(run.local("commons")).text_width
    start = str(_published(tmp_path / "published", manifest, width + 8))
    with pytest.raises(Refused, match="cross_attention_dim"):
        train_base(run, manifest, BaseConfig(start=start))
    fits = str(_published(tmp_path / "fits", manifest, width))
    with pytest.raises(ConfigError, match="is of family unet, the recipe pixart-tiny is not"):
        train_base(run, manifest, BaseConfig(start=fits, recipe="pixart-tiny"))
    assert not run.exists("base")
