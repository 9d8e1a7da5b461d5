"""Ensembles of any families, at their smallest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.denoiser import Card, Denoiser
from atoll.core.head import HeadConfig, new_head
from atoll.core.recipes import build, recipe_of
from atoll.router.forward import TextProjection
from atoll.router.gate import Gate
from atoll.router.model import EnsembleConfig, EnsembleModel
from tests.router.conftest import PICTURE

TEXT = 32  # of the encoder of `conftest.py`: width of its tokens and of its pooled vectors


def of_families(*families: str, projection: Mapping[str, Tensor] | None = None) -> EnsembleModel:
    """Tiny experts with random weights, a head each that has opinions."""
    if projection is None:
        projection = {"weight": torch.randn(TEXT, TEXT, generator=seeds.generator(0, "text"))}
    experts, heads = {}, {}
    for number, family in enumerate(families):
        name = f"shard-{number:02d}"
        network = build(recipe_of(f"{family}-tiny"), PICTURE, TEXT, seed=number)
        head = new_head(HeadConfig(shard=name, channels=1, pooled=TEXT, width=8), seed=number)
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
    return EnsembleModel(config, experts, Gate(heads, records), TextProjection(projection))
