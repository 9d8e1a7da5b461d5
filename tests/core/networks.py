"""DiT and U-ViT at their smallest, and what they are given."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.dit import DiT
from atoll.core.uvit import UViT

Network = TypeVar("Network", DiT, UViT)

_TEXT_WIDTH = 6
_COMMON: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
_CONFIGS: dict[type[DiT | UViT], dict[str, Any]] = {
    DiT: _COMMON | {"num_layers": 2, "pooled_projection_dim": _TEXT_WIDTH},
    UViT: _COMMON | {"num_layers": 5, "joint_attention_dim": _TEXT_WIDTH},
}


def fresh(kind: type[Network], **changes: Any) -> Network:
    """A network as it begins."""
    return kind(**_CONFIGS[kind] | changes)


def awake(kind: type[Network], **changes: Any) -> Network:
    """A network that no longer says 0, as after some steps of training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = fresh(kind, **changes)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            noise = seeds.normal(0, "noise", first=index, count=1, shape=tuple(parameter.shape))
            parameter.add_(0.1 * noise[0])
    return network.eval()


def inputs(
    kind: type[DiT | UViT], n: int = 3, *, height: int = 8, width: int = 12
) -> dict[str, Tensor]:
    """Pictures `(n, 3, height, width)`, their times, and text as this kind of network takes it."""
    given = {
        "hidden_states": seeds.normal(0, "x", first=0, count=n, shape=(3, height, width)),
        "timestep": torch.linspace(10, 990, n),
    }
    if kind is DiT:
        text = seeds.normal(0, "text", first=0, count=n, shape=(_TEXT_WIDTH,))
        return given | {"pooled_projections": text}
    length = 5
    text = seeds.normal(0, "text", first=0, count=n, shape=(length, _TEXT_WIDTH))
    mask = torch.arange(length)[None] <= torch.arange(n)[:, None]
    return given | {"encoder_hidden_states": text, "encoder_attention_mask": mask}
