"""The gate's trunk: a classifier of noised records, whose lower blocks all gate heads share.

Trained on the commons and its labels alone, so that it is public; a head continues from its upper
block. The same network with a label for every shard is the `joint` gate (Decentralized Diffusion
Models, arXiv 2501.05450, section 3.3). Conditioned by scaling and moving channels (FiLM, Perez et
al. 2018, arXiv 1709.07871). On disk a folder of `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.digest import canonical_json
from atoll.core.errors import Refused
from atoll.core.flow import expand
from atoll.core.manifest import Picture, check_schema

SCHEMA_VERSION = 2  # 1: the picture had to say again what the caption says
CONFIG_NAME = "config.json"
_FREQUENCIES = 16
_SMALL = 16  # pixels or latents of a side below which the first block keeps them all


class TrunkConfig(BaseModel):
    """`config.json` of a trunk, or of a joint gate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    channels: int = Field(ge=1)
    pooled: int = Field(ge=1)
    width: int = Field(default=32, ge=8, multiple_of=8)
    stride: int = Field(default=2, ge=1, le=2)  # of the first block
    # Label -> training records of it, or a weight like that; tells a label's share from its looks.
    labels: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)]

    @property
    def signal(self) -> int:
        """Width of what time and text say to every block."""
        return 4 * self.width

    def log_shares(self) -> Tensor:
        """Log of every label's share of the records, `(label,)`, in float64."""
        counts = torch.tensor([float(count) for count in self.labels.values()]).double()
        return (counts / counts.sum()).log()


class Features(NamedTuple):
    """What heads are given of a noised picture: `map` `(batch, channel, height, width)`, signal."""

    map: Tensor
    signal: Tensor  # `(batch, 4 width)`, of time and text


class Block(nn.Module):
    """A convolution, normalised, scaled and moved by the signal; added to its input if alike."""

    def __init__(self, inside: int, outside: int, stride: int, signal: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, outside)
        self.film = nn.Linear(signal, 2 * outside)
        self.adds = inside == outside and stride == 1

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        scale, move = self.film(signal)[:, :, None, None].chunk(2, dim=1)
        y = functional.silu(self.norm(self.conv(x)) * (1 + scale) + move)
        return x + y if self.adds else y


class Upper(nn.Module):
    """What lies above the cut, of which every head has its own: a block and the logits."""

    def __init__(self, config: TrunkConfig, outputs: int) -> None:
        super().__init__()
        self.block = Block(2 * config.width, 4 * config.width, 2, config.signal)
        self.out = nn.Linear(4 * config.width, outputs)

    def forward(self, features: Features) -> Tensor:
        """Logits `(batch, outputs)`."""
        found = self.block(features.map, features.signal)
        logits: Tensor = self.out(found.mean(dim=(2, 3)))
        return logits


def text_head(config: TrunkConfig, outputs: int) -> nn.Sequential:
    """Logits from the caption alone, for t = 1."""
    return nn.Sequential(
        nn.Linear(config.pooled, config.signal), nn.SiLU(), nn.Linear(config.signal, outputs)
    )


def scaled(cond: Conditioning) -> Tensor:
    """Pooled text `(batch, dim)` at the scale of waves: CLIP's vectors have unit norm."""
    return cond.pooled * math.sqrt(cond.pooled.shape[1])


class Trunk(nn.Module):
    """A light convolutional classifier of noised records by label."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        width, signal = config.width, config.signal
        self.time = nn.Linear(2 * _FREQUENCIES, signal)
        self.text = nn.Linear(config.pooled, signal)
        self.lower = nn.ModuleList(
            [
                Block(config.channels, width, config.stride, signal),
                Block(width, 2 * width, 2, signal),
                Block(2 * width, 2 * width, 1, signal),
                Block(2 * width, 2 * width, 1, signal),
            ]
        )
        self.upper = Upper(config, len(config.labels))
        self.text_only = text_head(config, len(config.labels))
        self.log_shares: Tensor  # where the weights are, or every step would copy them there
        self.register_buffer("log_shares", config.log_shares().float(), persistent=False)

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Features:
        """The part that all heads share, for t below 1."""
        steps = torch.arange(_FREQUENCIES, dtype=x_t.dtype, device=x_t.device)
        angle = expand(t, steps[None]) * torch.exp(steps * (5.0 / (_FREQUENCIES - 1)))
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        text = self.text(scaled(cond)) * (~cond.is_null)[:, None]
        signal = functional.silu(self.time(waves) + text)
        for block in self.lower:
            x_t = block(x_t, signal)
        return Features(x_t, signal)

    def logits(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Of every label from picture, time and text, `(batch, label)`, for t below 1.

        By Bayes' rule: what the caption says alone, learnt by a loss of its own, times what the
        picture says beside it, which is all that heads continue from.
        """
        text = self.text_logits(cond).detach().log_softmax(dim=1)
        said = (text - self.log_shares) * (~cond.is_null)[:, None]
        found: Tensor = self.upper(self.features(x_t, t, cond)) + said
        return found

    def text_logits(self, cond: Conditioning) -> Tensor:
        """Likewise from text alone, for t = 1."""
        found: Tensor = self.text_only(scaled(cond))
        return found

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        save_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> Trunk:
        """Read what `save` wrote; strict, and frozen."""
        try:
            values: Any = json.loads((folder / CONFIG_NAME).read_text())
            check_schema(values, SCHEMA_VERSION, f"{folder}/{CONFIG_NAME}")
            trunk = cls(TrunkConfig.model_validate(values))
            trunk.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise Refused(f"{folder} is not a gate's trunk ({error})") from error
        return trunk.eval().requires_grad_(False)


def save_network(network: nn.Module, config: BaseModel, folder: Path) -> None:
    """Write a small network's `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(canonical_json(config.model_dump(mode="json")))
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def first_stride(picture: Picture) -> int:
    """How far the first block strides over pictures of a shape."""
    return 1 if min(picture.height, picture.width) < _SMALL else 2


def new_trunk(config: TrunkConfig, *, seed: int) -> Trunk:
    """Seeded weights; every label at its share of the records at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.key(seed, "trunk") & ((1 << 63) - 1))
        trunk = Trunk(config)
    for layer in (trunk.upper.out, trunk.text_only[-1]):
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.bias.copy_(config.log_shares())
    return trunk
