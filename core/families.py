"""Families of denoisers: a flat table from a name to a diffusers class and how it is called.

A further family is a row and an adapter. The widths that the data decides are configured under
another key in every class; the table says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from atoll.core.conditioning import Conditioning
from atoll.core.errors import ConfigError
from atoll.core.manifest import Picture

Adapter = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""(network, what it takes for x_t, timestep `(batch,)`, cond) -> what it puts out."""


def _with_tokens(network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = network(
        x_t,
        timestep,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask,
        return_dict=False,
    )[0]
    return output


def _pixart(network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = network(
        x_t,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask.to(x_t.dtype),
        timestep=timestep,
        # The sizes that PixArt can be told besides are off in our recipes.
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    # Published PixArts put out a variance as well, in as many channels again.
    return output[:, : x_t.shape[1]]


def _dit(network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = network(
        x_t, timestep, pooled_projections=_entries_of_one(cond.pooled), return_dict=False
    )[0]
    return output


def _sd3(network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = network(
        x_t,
        # SD3 lets its text padding be looked at and takes no mask: what stands there must be 0.
        encoder_hidden_states=cond.tokens * cond.mask[:, :, None],
        pooled_projections=_entries_of_one(cond.pooled),
        timestep=timestep,
        return_dict=False,
    )[0]
    return output


def _entries_of_one(pooled: Tensor) -> Tensor:
    """A unit vector's entries are so small that a linear layer hardly passes them on."""
    return pooled * math.sqrt(pooled.shape[1])


def _sd3_starts_calm(network: nn.Module) -> None:
    """adaLN-zero and an output of 0, which diffusers leaves to whoever trains."""
    from diffusers import SD3Transformer2DModel

    from atoll.core.transformer import zero

    assert isinstance(network, SD3Transformer2DModel)
    for block in network.transformer_blocks:
        zero(block.norm1.linear, block.norm1_context.linear)
    zero(network.norm_out.linear, network.proj_out)


@dataclass(frozen=True)
class Family:
    """A diffusers class, how it is called, and where its configuration keeps what data decides."""

    module: str
    class_name: str
    adapter: Adapter
    tokens: str | None = None  # the key of the width of text tokens
    pooled: str | None = None  # the key of the dimension of the pooled text vector
    squares_only: bool = False
    divides_by: Callable[[Mapping[str, Any]], int] = lambda config: int(config["patch_size"])
    more: Callable[[Mapping[str, Any], Picture], dict[str, Any]] = lambda _config, _picture: {}
    initialise: Callable[[nn.Module], None] | None = None

    @property
    def network(self) -> type[Any]:
        """The class, imported here: diffusers takes seconds, and who starts islands needs none."""
        found: type[Any] = getattr(import_module(self.module), self.class_name)
        return found


FAMILIES: dict[str, Family] = {
    # Rombach et al. 2022, arXiv 2112.10752.
    "unet": Family(
        "diffusers",
        "UNet2DConditionModel",
        _with_tokens,
        tokens="cross_attention_dim",
        divides_by=lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    ),
    # Chen et al. 2023, arXiv 2310.00426.
    "pixart": Family(
        "diffusers",
        "PixArtTransformer2DModel",
        _pixart,
        tokens="caption_channels",
        squares_only=True,
    ),
    # Bao et al. 2022, arXiv 2209.12152.
    "uvit": Family("atoll.core.uvit", "UViT", _with_tokens, tokens="joint_attention_dim"),
    # Peebles & Xie 2022, arXiv 2212.09748.
    "dit": Family("atoll.core.dit", "DiT", _dit, pooled="pooled_projection_dim"),
    # Esser et al. 2024, arXiv 2403.03206.
    "sd3": Family(
        "diffusers",
        "SD3Transformer2DModel",
        _sd3,
        tokens="joint_attention_dim",
        pooled="pooled_projection_dim",
        squares_only=True,
        more=lambda config, picture: {
            "pos_embed_max_size": picture.height // int(config["patch_size"])
        },
        initialise=_sd3_starts_calm,
    ),
}

FAMILY_OF_CLASS: dict[str, str] = {row.class_name: name for name, row in FAMILIES.items()}


def sample_size(family: str, config: Mapping[str, Any], picture: Picture) -> int | tuple[int, int]:
    """The configuration's `sample_size` for pictures; `ConfigError` where they do not fit."""
    row, size = FAMILIES[family], f"{picture.height}x{picture.width}"
    if row.squares_only and picture.height != picture.width:
        oblong = ", ".join(name for name, other in FAMILIES.items() if not other.squares_only)
        raise ConfigError(
            f"The family {family} takes square pictures, these are {size}",
            cure=f"choose a recipe of one of the families {oblong}",
        )
    step = row.divides_by(config)
    if picture.height % step or picture.width % step:
        raise ConfigError(
            f"This recipe divides pictures by {step}, these are {size}",
            cure=f"choose a picture size that is a multiple of {step}",
        )
    return picture.height if picture.height == picture.width else (picture.height, picture.width)


def check_shapes(family: str, config: Mapping[str, Any], pictures: Iterable[Picture]) -> None:
    """Refuse a network that does not take pictures of all these shapes, by a `ConfigError`."""
    for picture in pictures:
        sample_size(family, config, picture)
