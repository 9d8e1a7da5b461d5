"""The gate head's network: f_k(x_t, t, cond), the log density ratio of a shard to the anchor.

Trained on an island, evaluated by the router, so it lives where both may import it. On disk a
folder of `config.json` (shape and calibration) and `model.safetensors`. At t = 1, where x_t says
nothing, a head of its own on cond alone answers, 0 for cond_null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.errors import Refused
from atoll.core.flow import expand
from atoll.core.manifest import check_schema
from atoll.core.storage import canonical_json

SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
_FREQUENCIES = 16


class Band(BaseModel):
    """How far a head may be trusted around one noise level, measured on held-out records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    t: float  # centre
    slope: float  # calibrated f = slope * raw f + intercept
    intercept: float
    loss: float  # balanced binary cross-entropy in nats after calibration; log 2 knows nothing
    overlap: float  # mean of 2 min(p, 1 - p) over the anchor: 0 where the shard is out of sight
    mean_ratio: float  # mean of exp f over held-out anchor records; 1 for an exact head


class HeadConfig(BaseModel):
    """`config.json` of a gate head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    shard: str
    channels: int
    pooled: int
    width: int = 32
    bands: list[Band] = Field(default_factory=list)
    text: Band | None = None  # the band of the head on cond alone, t = 1


class _Block(nn.Module):
    """A strided convolution, normalised, then scaled and moved by (t, cond)."""

    def __init__(self, inside: int, outside: int, stride: int, signal: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, outside)
        self.film = nn.Linear(signal, 2 * outside)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        scale, move = self.film(signal)[:, :, None, None].chunk(2, dim=1)
        return functional.silu(self.norm(self.conv(x)) * (1 + scale) + move)


class GateHead(nn.Module):
    """A light convolutional classifier of one shard's noised records against the anchor's."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width, signal = config.width, 4 * config.width
        self.time = nn.Linear(2 * _FREQUENCIES, signal)
        self.text = nn.Linear(config.pooled, signal)
        self.blocks = nn.ModuleList(
            [
                _Block(config.channels, width, 1, signal),
                _Block(width, 2 * width, 2, signal),
                _Block(2 * width, 2 * width, 1, signal),
                _Block(2 * width, 4 * width, 2, signal),
            ]
        )
        self.out = nn.Linear(4 * width, 1)
        self.text_only = nn.Sequential(
            nn.Linear(config.pooled, signal), nn.SiLU(), nn.Linear(signal, 1)
        )

    def raw(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Uncalibrated f from picture, time and text, `(batch,)`, for t below 1."""
        steps = torch.arange(_FREQUENCIES, dtype=x_t.dtype, device=x_t.device)
        angle = expand(t, steps[None]) * torch.exp(steps * (5.0 / (_FREQUENCIES - 1)))
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        # Unit-norm CLIP vectors are small beside the waves; the root brings both to one scale.
        pooled = cond.pooled * math.sqrt(cond.pooled.shape[1])
        text = self.text(pooled) * (~cond.is_null)[:, None]
        signal = functional.silu(self.time(waves) + text)
        for block in self.blocks:
            x_t = block(x_t, signal)
        logit: Tensor = self.out(x_t.mean(dim=(2, 3)))
        return logit[:, 0]

    def raw_text(self, cond: Conditioning) -> Tensor:
        """Uncalibrated f at t = 1 from text alone, `(batch,)`."""
        logit: Tensor = self.text_only(cond.pooled * math.sqrt(cond.pooled.shape[1]))
        return logit[:, 0]

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Calibrated f, `(batch,)`; slope and intercept run linearly between band centres."""
        slope, intercept = _between(self.config.bands, t)
        at_noise = _with_band(self.config.text, self.raw_text(cond)) * (~cond.is_null)
        return torch.where(t >= 1, at_noise, slope * self.raw(x_t, t, cond) + intercept)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_bytes(canonical_json(self.config.model_dump(mode="json")))
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> GateHead:
        """Read what `save` wrote; strict."""
        try:
            values: Any = json.loads((folder / CONFIG_NAME).read_text())
            check_schema(values, SCHEMA_VERSION, f"{folder}/{CONFIG_NAME}")
            head = cls(HeadConfig.model_validate(values))
            head.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise Refused(f"{folder} is not a gate head ({error})") from error
        return head.eval()


def new_head(config: HeadConfig, *, seed: int) -> GateHead:
    """A head with seeded weights that says 0 everywhere: every shard at its prior."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.key(seed, "gate-head", config.shard) & ((1 << 63) - 1))
        head = GateHead(config)
    last = head.text_only[-1]
    for layer in (head.out, last):
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head


def _with_band(band: Band | None, f: Tensor) -> Tensor:
    return f if band is None else band.slope * f + band.intercept


def _between(bands: list[Band], t: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept at `t` `(batch,)`, linear between band centres, constant outside."""
    if not bands:
        return torch.ones_like(t), torch.zeros_like(t)
    centres = t.new_tensor([band.t for band in bands])
    right = torch.searchsorted(centres, t.contiguous()).clamp(1, max(1, len(bands) - 1))
    right = right.clamp(max=len(bands) - 1)
    left = (right - 1).clamp(min=0)
    gap = (centres[right] - centres[left]).clamp(min=1e-12)
    share = ((t - centres[left]) / gap).clamp(0, 1)
    slopes = t.new_tensor([band.slope for band in bands])
    intercepts = t.new_tensor([band.intercept for band in bands])
    return (
        torch.lerp(slopes[left], slopes[right], share),
        torch.lerp(intercepts[left], intercepts[right], share),
    )
