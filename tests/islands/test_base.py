"""The base: the same from afar, and published weights are a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from atoll.core import recipes, sampler, seeds
from atoll.core.denoiser import Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.flow import Prediction
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.pack import LABELS_NAME, Pack
from atoll.core.schedule import NoiseSchedule
from atoll.core.storage import Storage
from atoll.islands.base import WORK, train_base
from atoll.islands.island import run_island
from atoll.islands.settings import BaseConfig, DenoiserTraining
from atoll.islands.supervise import train
from atoll.islands.train_trunk import task_of
from tests.islands.conftest import SHARDS, TRAIN, TRUNK
from tests.islands.test_job import order


@pytest.fixture
def unbased(fresh) -> tuple[Storage, Manifest]:
    """A run that is partitioned and has no base."""
    run, manifest = fresh()
    run.remove("base")
    run.remove(WORK)
    manifest.base = manifest.recipe = None
    return run, manifest


def test_a_far_base_is_the_near_one(unbased) -> None:
    near, manifest = unbased
    far = Storage("memory://far-base")
    for name in near.list():
        far.write_bytes(name, near.read_bytes(name))
    config = BaseConfig(training=DenoiserTraining(passes=1, checkpoints=1), trunk=TRUNK)
    made = train_base(far, manifest.model_copy(deep=True), config)
    assert made == train_base(near, manifest, config)
    far.remove("")


def test_a_commons_without_labels_is_refused_before_the_base_is_trained(unbased) -> None:
    """As versions wrote it that knew no labels but an own partition's centroids."""
    run, manifest = unbased
    card = run.read_json("commons/shard.json")
    del card["files"][LABELS_NAME]
    run.write_json("commons/shard.json", card)
    run.remove(f"commons/{LABELS_NAME}")
    manifest.commons.sha256 = run.sha256("commons")
    with pytest.raises(Refused, match=r"no labels.safetensors, which the gate's trunk.* anew"):
        train_base(run, manifest, BaseConfig(recipe="unet-tiny"))
    assert not run.exists(WORK)


def test_owners_may_differ_in_how_pictures_are_drawn_and_clusters_in_what_they_show(
    unbased,
) -> None:
    run, manifest = unbased
    commons = Pack(run.local("commons"))
    clusters = task_of(run, manifest, commons)
    assert list(clusters.counts) == [f"content-{number:02d}" for number in range(SHARDS)]
    assert sum(clusters.counts.values()) == commons.card.records
    manifest.partition.by = "owner"
    owners = task_of(run, manifest, commons)
    assert [name.partition("/")[0] for name in owners.counts][::16] == list(clusters.counts)
    rows = torch.arange(8)
    x_data, label = owners.labelled(0, rows, commons.x_data(rows))
    assert torch.equal(label // 16, clusters.labelled(0, rows, commons.x_data(rows))[1])
    assert not torch.equal(x_data, commons.x_data(rows))


def test_a_trunk_of_another_version_is_refused_before_an_island_starts(fresh) -> None:
    run, manifest = fresh()
    config = run.read_json("trunk/config.json") | {"schema_version": 1}
    run.write_json("trunk/config.json", config)
    manifest.trunk.sha256 = run.sha256("trunk")
    manifest.save(run)
    asked = BaseConfig(
        recipe="unet-tiny", training=DenoiserTraining(passes=1, checkpoints=1), trunk=TRUNK
    )
    with pytest.raises(Refused, match=r"trunk.*schema version 1"):
        train_base(run, manifest, asked)
    with pytest.raises(Refused, match=r"trunk.*schema version 1"):
        train(run, manifest, TRAIN)
    assert not run.exists("islands")


def _published(
    folder: Path,
    manifest: Manifest,
    text_width: int,
    scheduler: DDIMScheduler | None = None,
) -> Path:
    """A pipeline folder as somebody else saved it, whose network predicts epsilon."""
    picture = manifest.picture
    network = recipes.build(recipes.recipe_of("unet-tiny"), picture, text_width, seed=9)
    network.save_pretrained(folder / "unet")  # type: ignore[operator]
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (scheduler or DDIMScheduler()).save_pretrained(folder / "scheduler")
    return folder


def test_a_published_pipeline_is_a_start(unbased, tmp_path: Path) -> None:
    run, manifest = unbased
    width = Pack(run.local("commons")).text_width
    start = str(_published(tmp_path / "published", manifest, width))
    training = DenoiserTraining(passes=1, checkpoints=1)
    config = BaseConfig(start=start, training=training, trunk=TRUNK)
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_expert_that_kept_its_path_is_what_its_scheduler_expects(
    unbased, tmp_path: Path, prediction: str
) -> None:
    """Base and expert go on as they are, and diffusers draws the pictures that we draw."""
    run, manifest = unbased
    pack = Pack(run.local("commons"))
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction, clip_sample=False,
    )  # fmt: skip
    start = _published(tmp_path / "published", manifest, pack.text_width, theirs)
    training = DenoiserTraining(passes=1, checkpoints=1, keep_path=True)
    train_base(run, manifest, BaseConfig(start=str(start), training=training, trunk=TRUNK))
    order(run, manifest, "shard-00", TRAIN)
    run_island(run.uri, "shard-00")

    folder = Path(run.local("islands/shard-00/expert"))
    expert = Denoiser.load(folder)
    assert expert.card.prediction == prediction
    assert expert.card.schedule == NoiseSchedule(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    unet = UNet2DConditionModel.from_pretrained(folder)
    scheduler = DDIMScheduler.from_pretrained(start / "scheduler")
    cond = pack.cond(torch.arange(3))
    x_noise = seeds.normal(0, "x", first=0, count=3, shape=manifest.picture.shape)
    scheduler.set_timesteps(8)
    picture = x_noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = unet(
                picture, timestep,
                encoder_hidden_states=cond.tokens, encoder_attention_mask=cond.mask,
            ).sample  # fmt: skip
            picture = scheduler.step(output, timestep, picture).prev_sample
        share = scheduler.alphas_cumprod[scheduler.timesteps]
        data, noise = share.sqrt(), (1 - share).sqrt()
        # Euler's step along our path is DDIM's, of a point that is divided by alpha + sigma; its
        # last one ends at alpha = 1, where `set_alpha_to_one` does.
        grid = torch.cat([noise / (data + noise), torch.zeros(1)])
        ours = sampler.euler(
            lambda x_t, t: expert.velocity(x_t, t, cond), x_noise / (data + noise)[0], grid
        )
    torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-4)


def test_a_path_that_is_to_be_kept_must_be_there(unbased) -> None:
    run, manifest = unbased
    with pytest.raises(ConfigError, match="There is no path to keep") as caught:
        train_base(run, manifest, BaseConfig(training=DenoiserTraining(keep_path=True)))
    assert "--start" in caught.value.cure


def test_random_weights_learn_on_a_schedule_that_is_named(unbased) -> None:
    run, manifest = unbased
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
    training = DenoiserTraining(
        passes=1, checkpoints=1, prediction=Prediction.X_DATA, schedule=schedule
    )
    train_base(run, manifest, BaseConfig(training=training, trunk=TRUNK))
    card = Denoiser.load(run.local("base")).card
    assert (card.prediction, card.schedule) == (Prediction.X_DATA, schedule)
    plain = DenoiserTraining(passes=1, checkpoints=1)
    with pytest.raises(ConfigError, match="schedule"):
        train_base(run, manifest, BaseConfig(training=plain, trunk=TRUNK))
