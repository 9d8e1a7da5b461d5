"""From a recipe's name to a network on given data, and what it costs.

The sizes are in `sizes.py`; what the data decides (channels, size, widths of the text) is filled in
here. Costs are read off networks on torch's meta device, which have shapes and no memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import new_network
from atoll.core.errors import ConfigError, did_you_mean
from atoll.core.families import FAMILIES, sample_size
from atoll.core.head import GateHead, HeadConfig
from atoll.core.manifest import Picture
from atoll.core.sizes import RECIPES, Recipe
from atoll.core.trunk import Trunk, TrunkConfig

__all__ = [
    "RECIPES",
    "Recipe",
    "build",
    "default_recipe",
    "forward_flops",
    "gate_cost",
    "gate_flops",
    "nearest_recipe",
    "network_config",
    "outline",
    "outline_of",
    "parameter_count",
    "recipe_of",
    "saved_bytes",
    "training_bytes",
    "training_flops",
]


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


def network_config(
    recipe: Recipe, picture: Picture, text_width: int, pooled_width: int | None = None
) -> dict[str, Any]:
    """The full diffusers configuration of a recipe on this data.

    `text_width` is that of text tokens, `pooled_width` that of the pooled vector, the same in CLIPs
    that are not told otherwise.
    """
    row = FAMILIES[recipe.family]
    config = {
        **recipe.config,
        "sample_size": sample_size(recipe.family, recipe.config, picture),
        "in_channels": picture.channels,
        "out_channels": picture.channels,
        **row.more(recipe.config, picture),
    }
    if row.tokens is not None:
        config[row.tokens] = text_width
    if row.pooled is not None:
        config[row.pooled] = pooled_width or text_width
    return config


def build(
    recipe: Recipe,
    picture: Picture,
    text_width: int,
    *,
    seed: int,
    pooled_width: int | None = None,
) -> nn.Module:
    """A new network of a recipe with seeded random weights."""
    config = network_config(recipe, picture, text_width, pooled_width)
    return new_network(recipe.family, config, seed=seed)


def outline(
    recipe: Recipe, picture: Picture, text_width: int, pooled_width: int | None = None
) -> nn.Module:
    """A recipe's network without weights, on the meta device: 8B parameters in no memory."""
    with torch.device("meta"):
        return build(recipe, picture, text_width, seed=0, pooled_width=pooled_width)


def outline_of(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Likewise of any network of a family, from its configuration."""
    with torch.device("meta"):
        made: nn.Module = FAMILIES[family].network.from_config(config)
    return made


def parameter_count(network: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in network.parameters())


def nearest_recipe(network: nn.Module, family: str, picture: Picture, text_width: int) -> str:
    """The family's recipe of most nearly as many parameters, for batch and learning rates."""
    sizes = {}
    for name, recipe in RECIPES.items():
        # A recipe that does not divide this picture is nobody's neighbour.
        with contextlib.suppress(ConfigError):
            if recipe.family == family:
                sizes[name] = parameter_count(outline(recipe, picture, text_width))
    size = parameter_count(network)
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / size)))


def forward_flops(network: nn.Module, family: str, picture: Picture, cond: Conditioning) -> int:
    """Floating-point operations of one forward pass on one picture, counted by torch.

    A multiply-add is two operations. A training step is about three forward passes. An `outline`
    will do for a network.
    """
    x_t = torch.zeros(1, *picture.shape, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        FAMILIES[family].adapter(network, x_t, torch.ones(1).to(x_t), cond[:1].to(x_t))
    return int(counter.get_total_flops())


def gate_flops(config: TrunkConfig, picture: Picture, cond: Conditioning) -> tuple[int, int]:
    """Likewise of the gate's trunk, and of one head on it, its answer from the text included."""
    with torch.device("meta"):
        trunk = Trunk(config)
        head = GateHead(HeadConfig(shard="", trunk_sha256=""), config)
    x_t = torch.zeros(1, *picture.shape, device="meta")
    with FlopCounterMode(display=False) as of_trunk, torch.no_grad():
        features = trunk.features(x_t, torch.ones(1).to(x_t), cond[:1].to(x_t))
    with FlopCounterMode(display=False) as of_head, torch.no_grad():
        head.raw(features, head.text(cond[:1].to(x_t)))
    return int(of_trunk.get_total_flops()), int(of_head.get_total_flops())


def gate_cost(config: TrunkConfig, recipe: Recipe, picture: Picture, cond: Conditioning) -> float:
    """What an image costs a classifier like the trunk, in units of what one costs a denoiser."""
    network = outline(recipe, picture, cond.tokens.shape[2], cond.pooled.shape[1])
    whole = forward_flops(network, recipe.family, picture, cond)
    return sum(gate_flops(config, picture, cond)) / whole


def training_flops(forward: int, *, frozen: bool = False) -> int:
    """Operations that training on one picture needs, from those of a forward pass.

    Backwards, every product is done once for its input and once for its weight; frozen weights, as
    beneath low-rank adapters, need none of their own. What checkpointing computes again is not
    counted, nor are the adapters.
    """
    return (2 if frozen else 3) * forward


def training_bytes(
    parameters: int,
    *,
    weights: torch.dtype = torch.float32,
    gradients: torch.dtype = torch.float32,
    moments: torch.dtype = torch.float32,
    average: torch.dtype | None = torch.float32,
) -> int:
    """Memory that training holds whatever the batch: weights, gradients, AdamW's two, the average.

    What is saved for the backward pass comes on top (`saved_bytes`); gradient checkpointing keeps
    it to about one block's and the inputs of the others.
    """
    of_average = average.itemsize if average is not None else 0
    each = weights.itemsize + gradients.itemsize + 2 * moments.itemsize + of_average
    return parameters * each


def saved_bytes(
    recipe: Recipe,
    picture: Picture,
    cond: Conditioning,
    *,
    batch: int,
    precision: torch.dtype = torch.float32,
) -> int:
    """Memory that autograd keeps of a forward pass for the backward pass, weights aside.

    Counted on fake tensors, every storage once: nothing is computed. `cond` gives the text's length
    and widths, `precision` is autocast's, whose copies of weights count. What is kept is a CPU's
    choice, which as a GPU's is fused attention; it is for a network that is neither compiled, when
    it keeps less, nor checkpointed.
    """
    saved: dict[int, int] = {}
    kept = []  # or another storage could come to stand at the same address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        network = build(
            recipe, picture, cond.tokens.shape[2], seed=0, pooled_width=cond.pooled.shape[1]
        ).train()
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        text = Conditioning(
            *(
                torch.zeros(batch, *each.shape[1:], dtype=each.dtype)
                for each in (cond.tokens, cond.mask, cond.pooled, cond.is_null)
            )
        )
        low = precision != torch.float32
        with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", precision, enabled=low):
            FAMILIES[recipe.family].adapter(
                network, torch.zeros(batch, *picture.shape), torch.ones(batch), text
            )
    return sum(size for place, size in saved.items() if place not in own)
