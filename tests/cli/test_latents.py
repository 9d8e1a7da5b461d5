"""A run on latents, from pictures to pictures: trained, sampled, loaded by diffusers, checked."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import atoll.router  # noqa: F401  so that diffusers knows the pipeline
from atoll.cli.systems import load_model, sample
from atoll.core.denoiser import Denoiser, read_card
from atoll.core.digest import sha256_folder
from atoll.core.errors import ConfigError, MissingError, Refused
from atoll.core.latents import load_autoencoder
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.pack import Pack
from atoll.core.pictures import training_pixels
from atoll.core.storage import Storage
from atoll.evaluate.reference import load_records
from atoll.islands.base import train_base
from atoll.islands.island import run_island
from atoll.islands.settings import (
    BaseConfig,
    DenoiserTraining,
    HeadTraining,
    TrainConfig,
    TrunkTraining,
)
from atoll.islands.supervise import _collect, plan_islands, write_order
from atoll.merge.soup import create
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig
from atoll.router.assemble import assemble
from tests.cli.conftest import atoll as command
from tests.core.test_latents import network

TRAIN = TrainConfig(
    training=DenoiserTraining(passes=1, checkpoints=1),
    head=HeadTraining(images=64, batch=16, bands=1),
    preview=4,
    preview_steps=2,
)


def corpus(folder: Path) -> str:
    """Sixty gradients of 16x16 in two colours."""
    rows: dict[str, list[object]] = {"image": [], "caption": []}
    for number in range(60):
        ramp = np.add.outer(np.arange(16), 2 * np.arange(16)) * 4 + number
        values = np.zeros((16, 16, 3), np.uint8)
        values[:, :, number % 2] = ramp
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, format="PNG")
        rows["image"].append(buffer.getvalue())
        rows["caption"].append(("red", "green")[number % 2])
    pq.write_table(pa.table(rows), folder / "gradients.parquet")
    return str(folder / "gradients.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Partitioned with flips, trained, assembled."""
    folder = tmp_path_factory.mktemp("latents")
    network().save_pretrained(folder / "published")
    place = Storage(folder / "run")
    config = PartitionConfig(
        shards=2, vae=str(folder / "published"), commons="0.4", holdout=0.2, flips=True, seed=3,
        fit={"steps": 5},
    )  # fmt: skip
    manifest = partition(corpus(folder), place, config)
    training = DenoiserTraining(passes=1, checkpoints=1)
    trunk = TrunkTraining(images=256, width=8)
    config = BaseConfig(recipe="unet-tiny", training=training, trunk=trunk)
    train_base(place, manifest, config)
    plan_islands(place, manifest, TRAIN)
    for shard in manifest.shards:
        write_order(place, manifest, TRAIN, shard)
        run_island(place.uri, shard)
        _collect(place, manifest, shard)
    assemble(place, manifest)
    return place


def test_packs_hold_the_latents_of_pictures_and_of_mirrored_pictures(run: Storage) -> None:
    manifest = Manifest.load(run)
    assert manifest.vae is not None
    assert manifest.picture.shape == (4, 8, 8)
    assert manifest.vae.picture.shape == (3, 16, 16)
    vae = load_autoencoder(run.local("vae"), latent_space=manifest.latent_space)
    pack = Pack(run.local(manifest.commons.path))
    rows = pq.read_table(run.local("commons/data-00000.parquet")).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows]
    pixels = torch.stack([training_pixels(picture, (16, 16), 3) for picture in pictures])
    every = torch.arange(len(rows))
    assert torch.equal(pack.x_data(every), vae.encode(pixels).float())
    mirrored = pack.x_data(every + len(pack))
    assert torch.equal(mirrored, vae.encode(pixels.flip(-1)).float())
    assert not torch.allclose(mirrored, pack.x_data(every).flip(-1), atol=0.01)
    entry = Ledger(run).latest("vae", "vae")
    assert entry is not None
    assert (entry.sha256, entry.shards) == (manifest.vae.sha256, [])


def test_every_card_names_the_latent_space(run: Storage) -> None:
    manifest = Manifest.load(run)
    folders = ["base", *(f"islands/{shard}/expert" for shard in manifest.shards)]
    assert {read_card(run.local(name)).latent_space for name in folders} == {manifest.latent_space}
    expert = Denoiser.load(run.local(folders[1]))
    assert expert.network.config.in_channels == 4
    assert expert.network.config.sample_size == 8
    preview = Image.open(io.BytesIO(run.read_bytes(f"{folders[1].rpartition('/')[0]}/preview.png")))
    assert preview.mode == "RGB"


def test_diffusers_loads_it_and_decodes(run: Storage, tmp_path: Path) -> None:
    folder = run.local("ensemble")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    where = {"num_inference_steps": 3, "seed": 5}
    latents = pipeline(["red", "green"], output_type="latent", **where).images
    decoded = pipeline(["red", "green"], output_type="pt", **where).images
    assert (latents.shape, decoded.shape) == ((2, 4, 8, 8), (2, 3, 16, 16))
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        theirs = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert torch.allclose(decoded, theirs, atol=1e-6)
    assert pipeline("red", **where).images[0].size == (16, 16)
    ours = sample(load_model(str(folder)), ["red", "green"], steps=3, seed=5).x_data
    assert torch.allclose(ours, decoded, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "again")
    assert sha256_folder(tmp_path / "again") == sha256_folder(folder)


def test_a_lone_expert_and_a_soup_find_the_vae_of_their_run(run: Storage, tmp_path: Path) -> None:
    experts = [run.local(f"islands/{shard}/expert") for shard in Manifest.load(run).shards]
    create(tmp_path / "soup", dict.fromkeys(experts, 1))
    for path in (experts[0], tmp_path / "soup"):
        made = sample(load_model(str(path)), ["red"], steps=2)
        assert made.x_data.shape == (1, 3, 16, 16)


def test_real_records_are_compared_as_they_are(run: Storage) -> None:
    manifest = Manifest.load(run)
    records = load_records(run, manifest)
    assert records.pictures.shape[1:] == (3, 16, 16)
    held_out = pq.read_table(run.local("commons/data-00000.parquet")).to_pylist()
    held_out = [row for row in held_out if row["split"] == "held-out"]
    last = training_pixels(Image.open(io.BytesIO(held_out[-1]["image"])), (16, 16), 3)
    assert torch.equal(records.pictures[-1], last)


def test_evaluate_and_verify_take_such_a_run(run: Storage, tmp_path: Path) -> None:
    out = str(tmp_path / "evaluation")
    said = command(
        "evaluate", f"{run.uri}/ensemble", "--reference", run.uri, "--count", 20, "--steps", 2,
        "--routing", "full", "--out", out, "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert {row["name"] for row in said.json["metrics"]["rows"]} == {"real records", "full"}
    said = command("verify", run.uri, "--json")
    assert said.code == 0, said.out
    assert said.json["holds"]


def test_a_shard_can_be_forgotten(run: Storage, tmp_path: Path) -> None:
    shutil.copytree(run.local(""), tmp_path / "run")
    assert command("unlearn", tmp_path / "run", "shard-00", "--json").code == 0
    left = Manifest.load(Storage(tmp_path / "run"))
    assert left.vae == Manifest.load(run).vae
    said = command("verify", tmp_path / "run" / "certificate.json", "--json")
    assert said.code == 0, said.out
    pictures = sample(load_model(str(tmp_path / "run")), ["red"], steps=2).x_data
    assert pictures.shape == (1, 3, 16, 16)


def test_a_foreign_or_missing_vae_is_refused(run: Storage, tmp_path: Path) -> None:
    copy = tmp_path / "ensemble"
    Storage(tmp_path).publish(run.local("ensemble"), "ensemble")
    network(9).save_pretrained(copy / "vae")
    with pytest.raises(Refused, match="the model works in autoencoder-kl"):
        load_model(str(copy))
    for file in (copy / "vae").iterdir():
        file.unlink()
    (copy / "vae").rmdir()
    with pytest.raises(MissingError, match="no vae/ to decode with"):
        load_model(str(copy))
    index = json.loads((copy / "model_index.json").read_text())
    index.pop("vae")
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match="there is no vae"):
        diffusers.DiffusionPipeline.from_pretrained(copy)


def test_a_start_of_another_space_is_refused(run: Storage, tmp_path: Path) -> None:
    manifest = Manifest.load(run)
    other = Denoiser.load(run.local("base"))
    other.card = other.card.model_copy(update={"latent_space": "autoencoder-kl:0"})
    other.save(tmp_path / "other")
    manifest.base = manifest.recipe = None
    with pytest.raises(Refused, match="works in autoencoder-kl:0, this run in autoencoder-kl"):
        train_base(run, manifest, BaseConfig(start=str(tmp_path / "other")))


def test_pictures_that_the_vae_does_not_take_are_refused_before_anything(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "published")
    config = PartitionConfig(shards=2, vae=str(tmp_path / "published"), channels=1, commons="0.4")
    run = Storage(tmp_path / "run")
    with pytest.raises(ConfigError, match="pictures of 3 channels"):
        partition(corpus(tmp_path), run, config)
    assert not run.list()
