"""The base: the same from afar, and published weights are a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from atoll.core import recipes
from atoll.core.denoiser import Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.flow import Prediction
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.base import WORK, train_base
from atoll.islands.settings import BaseConfig, DenoiserTraining


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
