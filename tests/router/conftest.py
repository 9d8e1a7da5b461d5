"""Two worlds to route in: closed-form experts and gate, and a run of real tiny networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.digest import sha256_file
from atoll.core.embedding import Encoder, FitConfig, fit
from atoll.core.flow import Prediction
from atoll.core.head import Band, HeadCalibration, HeadConfig, new_head
from atoll.core.ledger import Ledger
from atoll.core.manifest import (
    Artefact,
    Commons,
    Expert,
    Manifest,
    Partition,
    Picture,
    Plan,
    Shard,
)
from atoll.core.manifest import Encoder as EncoderArtefact
from atoll.core.pack import ShardCard, write_pack, write_shard_card
from atoll.core.recipes import build, recipe_of
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk, TrunkConfig, new_trunk
from atoll.router.chooser import sample_settings
from atoll.router.ensemble import Trajectory

# -- closed forms ----------------------------------------------------------------------------------


def _prompt(captions: Sequence[int], dtype: torch.dtype = torch.float64) -> Conditioning:
    """Captions 1, 2, ... as conditioning, 0 for the empty one; the number is the pooled vector."""
    number = torch.tensor(list(captions), dtype=dtype)
    count = len(number)
    return Conditioning(
        torch.zeros(count, 1, 1, dtype=dtype),
        torch.ones(count, 1, dtype=torch.bool),
        number[:, None],
        number == 0,
    )


MADE_BY = ("guidance", "seed", "first")  # settings of samples; the rest is the trajectory's


class World:
    """A finite data set in K shards: every velocity and posterior is a finite sum.

    `points` `(n, ...)`, `shard` `(n,)`, `likelihood` `(captions, n)` of a caption given a point;
    row 0 belongs to the empty caption and is 1. Where a shard has no point with the caption, its
    expert has no velocity and answers NaN: whoever runs it is found out.
    """

    def __init__(self, points: Tensor, shard: Tensor, likelihood: Tensor | None = None) -> None:
        self.points = points
        self.shard = shard
        if likelihood is None:
            likelihood = torch.ones(1, len(points), dtype=points.dtype)
        self.likelihood = likelihood
        self.count = int(shard.max()) + 1
        self.names = [f"shard-{k:02d}" for k in range(self.count)]
        self.calls: list[tuple[int, int, int]] = []  # expert, rows, rows with the empty caption
        self.asked = 0  # rows the gate was asked about

    def log_joint(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """log p(point, c, x_t), up to what does not depend on the point, `(batch, n)`."""
        time = t.reshape(-1, *([1] * self.points.ndim))
        gap = x_t[:, None] - (1 - time) * self.points[None]
        energy = gap.square().flatten(2).sum(dim=2) / (2 * t[:, None].square())
        return self.likelihood.to(x_t)[cond.pooled[:, 0].long()].log() - energy

    def velocity_over(self, chosen: Tensor, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """(x_t - E[x_data | x_t, c]) / t over some of the points."""
        weights = self.log_joint(x_t, t, cond)[:, chosen].softmax(dim=1)
        mean = torch.einsum("bn,n...->b...", weights, self.points.to(x_t)[chosen])
        return (x_t - mean) / t.reshape(-1, *([1] * (x_t.ndim - 1)))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The global velocity, which knows of no shards."""
        return self.velocity_over(torch.ones_like(self.shard, dtype=torch.bool), x_t, t, cond)

    def posterior(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """p(k | x_t, t, c), `(batch, shard)`."""
        points = self.log_joint(x_t, t, cond).softmax(dim=1)
        one_hot = torch.nn.functional.one_hot(self.shard, self.count).to(points)
        return points @ one_hot / (points @ one_hot).sum(dim=1, keepdim=True)

    def gate(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.asked += len(x_t)
        return self.posterior(x_t, t, cond)

    @property
    def experts(self) -> list[Callable[..., Tensor]]:
        return [self._expert(k) for k in range(self.count)]

    def _expert(self, k: int) -> Callable[..., Tensor]:
        def velocity(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            self.calls.append((k, len(x_t), int(cond.is_null.sum())))
            return self.velocity_over(self.shard == k, x_t, t, cond)

        return velocity

    def permuted(self, order: Tensor) -> World:
        """The same data with shard `order[i]` in place i."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return World(self.points, place[self.shard], self.likelihood)

    def trajectory(
        self, routing: str | Sequence[str], captions: Sequence[int], **options: Any
    ) -> Trajectory:
        dtype = self.points.dtype
        made = {name: options.pop(name) for name in MADE_BY if name in options}
        return Trajectory(
            self.experts,
            self.gate,
            shards=self.names,
            settings=sample_settings(len(captions), self.names, routing=routing, **made),
            cond=_prompt(captions, dtype),
            null=_prompt([0], dtype),
            **options,
        )


def _world(
    seed: int = 0,
    *,
    sizes: Sequence[int] = (12, 7, 3, 1),
    shape: tuple[int, ...] = (2,),
    captions: int = 2,
    slip: float = 0.1,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> World:
    """Clusters of skewed sizes; a point's own caption is likely, the others slip in."""
    shard = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    n = len(shard)
    centres = seeds.normal(seed, "centres", first=0, count=len(sizes), shape=shape)
    around = seeds.normal(seed, "points", first=0, count=n, shape=shape)
    points = (centres[shard] + spread * around).to(dtype)
    own = seeds.uniform(seed, "captions", first=0, count=n)[:, 0].mul(captions).long()
    likelihood = torch.full((captions + 1, n), slip / max(1, captions - 1), dtype=dtype)
    likelihood[0] = 1
    likelihood[own + 1, torch.arange(n)] = 1 - slip
    return World(points, shard, likelihood)


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    """`make_world(seed, sizes=..., captions=..., slip=...)`, data of closed-form experts."""
    return _world


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Conditioning]:
    """`prompt([1, 2, 0])`: captions of a world by number, 0 the empty one."""
    return _prompt


# -- real networks ---------------------------------------------------------------------------------

PICTURE = Picture(channels=1, height=8, width=8)
CAPTIONS = ("a grey square", "a bright dot", "")
# Shard -> recipe, prediction, records: two families and two predictions in one ensemble.
PARTS: dict[str, tuple[str, Prediction, int]] = {
    "shard-00": ("unet-tiny", Prediction.VELOCITY, 40),
    "shard-01": ("pixart-tiny", Prediction.VELOCITY, 9),
    "shard-02": ("unet-tiny", Prediction.X_DATA, 3),
}


def _encoder() -> Encoder:
    pixels = seeds.uniform(0, "pixels", first=0, count=16, each=64).reshape(16, 8, 8)
    pictures = [Image.fromarray((p * 255).byte().numpy()) for p in pixels]
    captions = [CAPTIONS[number % 2] for number in range(16)]
    config = FitConfig(
        steps=2, batch=8, image_size=8, patch_size=4, width=32, layers=1, context_length=8
    )
    return fit(pictures, captions, config, seed=0)


def _pack(folder: Path, name: str, records: int, encoder: Encoder) -> None:
    """Pictures of one shard, a third of them with each caption."""
    folder.mkdir(parents=True)
    count = records + 2
    pixels = seeds.uniform(1, "pixels", name, first=0, count=count, each=64)
    table = encoder.condition(["", *CAPTIONS[:2]])
    write_pack(
        folder / "pack-00000.safetensors",
        pixels.mul(255).byte().reshape(-1, *PICTURE.shape),
        torch.arange(count) % 3,
        table,
    )
    card = ShardCard(
        name=name,
        records=records,
        held_out=2,
        picture=PICTURE,
        encoder=encoder.fingerprint(),
        packs={"pack-00000.safetensors": count},
        files={"pack-00000.safetensors": sha256_file(folder / "pack-00000.safetensors")},
    )
    write_shard_card(folder, card)


def _expert(folder: Path, shard: str, text_width: int) -> None:
    """A network of its recipe with every weight moved, so that no output is zero by design."""
    recipe, prediction, _ = PARTS[shard]
    network = build(recipe_of(recipe), PICTURE, text_width, seed=0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            moved = torch.randn(weight.shape, generator=seeds.generator(2, shard, name))
            weight.add_(0.05 * moved)
    card = Card(
        name=shard,
        kind="expert",
        shard=shard,
        base_sha256="b" * 64,
        family=recipe_of(recipe).family,
        prediction=prediction,
        latent_space="pixels",
        images_seen=80,
    )
    Denoiser(network, card).save(folder)


def _trunk(folder: Path, pooled: int) -> Trunk:
    """A trunk with opinions."""
    labels = {"label-00": 4, "label-01": 2}
    config = TrunkConfig(channels=PICTURE.channels, pooled=pooled, width=8, stride=1, labels=labels)
    trunk = new_trunk(config, seed=0)
    trunk.save(folder)
    return trunk


def _head(folder: Path, shard: str, trunk: Trunk, trunk_sha256: str) -> None:
    """A head with opinions, calibrated in two bands."""
    band = {"loss": 0.5, "overlap": 0.5, "mean_ratio": 1.0}
    told = HeadCalibration(
        prompted=[
            Band(t=0.25, slope=0.8, intercept=0.1, **band),
            Band(t=0.75, slope=1.2, intercept=-0.1, **band),
        ],
        unprompted=[Band(t=0.5, slope=0.9, intercept=-0.05, **band)],
        text=Band(t=1.0, slope=0.9, intercept=0.05, **band),
    )
    config = HeadConfig(shard=shard, trunk_sha256=trunk_sha256, calibration=told)
    head = new_head(config, trunk)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            moved = torch.randn(weight.shape, generator=seeds.generator(3, shard, name))
            weight.add_((0.5 if "out" in name or "text_only" in name else 0.1) * moved)
    head.save(folder)


def _artefact(run: Storage, path: str) -> Artefact:
    return Artefact(path=path, sha256=run.sha256(path))


def _part(run: Storage, encoder: Encoder, name: str, records: int) -> dict[str, Any]:
    path = name if name == "commons" else f"shards/{name}"
    _pack(Path(run.uri) / path, name, records, encoder)
    return {"path": path, "sha256": run.sha256(path), "records": records, "held_out": 2}


def _manifest(run: Storage, encoder: Encoder) -> Manifest:
    run.write_json("partition/report.json", {"schema_version": 1})
    shards = {
        name: Shard(plan=Plan(batch=8, images_seen=80), **_part(run, encoder, name, records))
        for name, (_, _, records) in PARTS.items()
    }
    return Manifest(
        picture=PICTURE,
        encoder=EncoderArtefact(spec="fit", path="encoder", sha256=run.sha256("encoder")),
        partition=Partition(by="clusters", **_artefact(run, "partition").model_dump()),
        commons=Commons(declared="0.1", **_part(run, encoder, "commons", 6)),
        shards=shards,
        seed=0,
    )


def _add_expert(run: Storage, manifest: Manifest, shard: str) -> None:
    """What the controller does when an island has finished."""
    made = {kind: _artefact(run, f"islands/{shard}/{kind}") for kind in ("expert", "gate_head")}
    manifest.experts[shard] = Expert(
        images_seen=80, gate_head=made["gate_head"], **made["expert"].model_dump()
    )
    for kind, artefact in made.items():
        Ledger(run).append(kind, shard, artefact.sha256, shards=[shard])
    manifest.save(run)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three finished islands, not assembled; tests work on copies of it."""
    place = tmp_path_factory.mktemp("trained") / "run"
    run, encoder = Storage(place), _encoder()
    encoder.save_pretrained(place / "encoder")
    manifest = _manifest(run, encoder)
    Ledger(run).append("encoder", "encoder", manifest.encoder.sha256)
    trunk = _trunk(place / "trunk", encoder.dim)
    manifest.trunk = _artefact(run, "trunk")
    Ledger(run).append("trunk", "trunk", manifest.trunk.sha256)
    for shard in PARTS:
        _expert(place / f"islands/{shard}/expert", shard, encoder.text_width)
        _head(place / f"islands/{shard}/gate_head", shard, trunk, manifest.trunk.sha256)
        _add_expert(run, manifest, shard)
    return place


@pytest.fixture
def add_expert() -> Callable[[Storage, Manifest, str], None]:
    """Enter a finished island's results into manifest and ledger."""
    return _add_expert
