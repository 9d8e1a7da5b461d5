"""Named sizes: a flat table from a recipe's name to a diffusers configuration and its defaults.

What the data decides (channels, size, width of the text tokens) is filled in by `network_config`.
Model dropout is 0 everywhere: condition dropout is ours (promise 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import FAMILIES, new_network
from atoll.core.errors import ConfigError, did_you_mean
from atoll.core.manifest import Picture


@dataclass(frozen=True)
class Recipe:
    """A family at one size, and the training defaults that measurement showed to suit it."""

    family: str
    about: str
    config: Mapping[str, Any]
    batch: int
    base_learning_rate: float
    learning_rate: float  # of experts: lower keeps them where a soup of them is good
    base_passes: float  # images_seen of the base as a multiple of the commons' records
    passes: float  # likewise of an expert, of its shard's


# `attention_head_dim` is the number of heads here, whatever its name (diffusers issue 2011).
_UNET: dict[str, Any] = {
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "dropout": 0.0,
}
_PIXART: dict[str, Any] = {
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
    "dropout": 0.0,
}

RECIPES: dict[str, Recipe] = {
    "unet-digits": Recipe(
        "unet",
        "1.6M: pictures of 8x8, minutes on one core",
        {
            **_UNET,
            "block_out_channels": (48, 96),
            # Attention at 4x4 alone: the same accuracy at 1.5 times the speed.
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        },
        batch=64,
        base_learning_rate=2e-3,
        learning_rate=1e-3,
        base_passes=67,
        passes=40,
    ),
    "unet-nano": Recipe(
        "unet",
        "4.8M: pictures of 32x32 on a CPU",
        {
            **_UNET,
            "block_out_channels": (32, 64, 96, 128),
            "down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        },
        batch=32,
        base_learning_rate=1e-3,
        learning_rate=5e-4,
        base_passes=40,
        passes=20,
    ),
    "unet-tiny": Recipe(
        "unet",
        "the smallest UNet that trains, for tests",
        {
            **_UNET,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        },
        batch=8,
        base_learning_rate=2e-3,
        learning_rate=1e-3,
        base_passes=2,
        passes=2,
    ),
    "pixart-nano": Recipe(
        "pixart",
        "1.8M: pictures of 32x32 on a CPU, twice as fast as unet-nano",
        {
            **_PIXART,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "cross_attention_dim": 128,
            "num_layers": 6,
            "patch_size": 4,
        },
        batch=32,
        base_learning_rate=1e-3,
        learning_rate=5e-4,
        base_passes=40,
        passes=20,
    ),
    "pixart-tiny": Recipe(
        "pixart",
        "the smallest PixArt that trains, for tests",
        {
            **_PIXART,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "patch_size": 2,
        },
        batch=8,
        base_learning_rate=2e-3,
        learning_rate=1e-3,
        base_passes=2,
        passes=2,
    ),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name, or the error that lists them."""
    if name not in RECIPES:
        raise ConfigError(
            f"Unknown recipe '{name}'. {did_you_mean(name, RECIPES)}".strip(),
            allowed=", ".join(RECIPES),
        )
    return RECIPES[name]


def default_recipe(picture: Picture) -> str:
    """The recipe for a picture size where none is named."""
    return "unet-digits" if max(picture.height, picture.width) <= 16 else "unet-nano"


def network_config(recipe: Recipe, picture: Picture, text_width: int) -> dict[str, Any]:
    """The full diffusers configuration of a recipe on this data."""
    config = {
        **recipe.config,
        "sample_size": picture.height,
        "in_channels": picture.channels,
        "out_channels": picture.channels,
    }
    if recipe.family == "unet":
        levels = len(recipe.config["block_out_channels"])
        step = 2 ** (levels - 1)
        config["cross_attention_dim"] = text_width
        if picture.height != picture.width:
            config["sample_size"] = (picture.height, picture.width)
    else:
        step = recipe.config["patch_size"]
        config["caption_channels"] = text_width
        if picture.height != picture.width:
            raise ConfigError(
                f"PixArt takes square pictures, these are {picture.height}x{picture.width}",
                cure="choose a unet recipe",
            )
    if picture.height % step or picture.width % step:
        raise ConfigError(
            f"This recipe divides pictures by {step}, these are {picture.height}x{picture.width}",
            cure=f"choose a picture size that is a multiple of {step}",
        )
    return config


def build(recipe: Recipe, picture: Picture, text_width: int, *, seed: int) -> nn.Module:
    """A new network of a recipe with seeded random weights."""
    return new_network(recipe.family, network_config(recipe, picture, text_width), seed=seed)


def forward_flops(network: nn.Module, family: str, picture: Picture, cond: Conditioning) -> int:
    """Floating-point operations of one forward pass on one picture, counted by torch.

    A multiply-add is two operations. A training step is about three forward passes.
    """
    x_t = torch.zeros(1, *picture.shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        FAMILIES[family].adapter(network, x_t, torch.ones(1), cond[:1])
    return int(counter.get_total_flops())
