"""Ensembles of any families, at their smallest."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.denoiser import Card, Denoiser
from atoll.core.digest import sha256_folder
from atoll.core.head import HeadConfig, new_head
from atoll.core.recipes import build, recipe_of
from atoll.core.trunk import TrunkConfig, new_trunk
from atoll.router.component import EnsembleConfig
from atoll.router.forward import TextProjection
from atoll.router.gate import Gate
from atoll.router.model import EnsembleModel
from tests.router.conftest import PICTURE

TEXT = 32  # of the encoder of `conftest.py`: width of its tokens and of its pooled vectors


def of_families(*families: str, projection: Mapping[str, Tensor] | None = None) -> EnsembleModel:
    """Tiny experts with random weights, a head each that has opinions."""
    if projection is None:
        projection = {"weight": torch.randn(TEXT, TEXT, generator=seeds.generator(0, "text"))}
    labels = {"label-00": 4, "label-01": 2}
    trunk = new_trunk(TrunkConfig(channels=1, pooled=TEXT, width=8, labels=labels), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trunk.save(Path(folder))
        trunk_sha256 = sha256_folder(Path(folder))
    experts, heads = {}, {}
    for number, family in enumerate(families):
        name = f"shard-{number:02d}"
        network = build(recipe_of(f"{family}-tiny"), PICTURE, TEXT, seed=number)
        head = new_head(HeadConfig(shard=name, trunk_sha256=trunk_sha256), trunk)
        with torch.no_grad():
            for weight in [*network.parameters(), *head.parameters()]:
                weight.add_(
                    0.05 * torch.randn(weight.shape, generator=seeds.generator(number, "w"))
                )
        card = Card(
            name=name,
            kind="expert",
            shard=name,
            base_sha256=None,
            family=family,
            prediction="velocity",
            latent_space="pixels",
            images_seen=1,
        )
        experts[name], heads[name] = Denoiser(network.eval(), card), head.eval()
    records = dict.fromkeys(experts, 5)
    config = EnsembleConfig(picture=PICTURE, records=records, missing=[])
    gate = Gate(trunk.eval(), heads, records)
    return EnsembleModel(config, list(experts.values()), gate, TextProjection(projection))
