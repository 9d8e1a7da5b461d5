"""The gate head's network: f_k(x_t, t, cond), the log density ratio of a shard to the anchor.

Trained on an island, evaluated by the router, so it lives where both may import it. It continues
from the trunk that all heads share (`core/trunk.py`) by a block and two sums over the trunk's
labels: were the shard a mixture of them, f = log sum_l w_l p(l | x_t) / pi_l would be exact without
a caption, and there it starts. What the caption says alone, 0 for cond_null, is a head's own sum
and calibrated apart: at t = 1, where x_t says nothing, it is f, and below it is a part of it, since
a density ratio of picture and caption is the caption's times the picture's beside it. On disk a
folder of `config.json` (the trunk's digest and the calibration) and `model.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atoll.core.conditioning import Conditioning
from atoll.core.errors import Refused
from atoll.core.manifest import check_schema
from atoll.core.trunk import Features, Trunk, TrunkConfig, Upper, save_network, scaled, text_head

# 1: a network of its own, without a trunk; 2: what the caption says alone was no part of f
SCHEMA_VERSION = 3
CONFIG_NAME = "config.json"
# Below this share of the anchor a head says of every record whether it is the shard's: its log
# density ratio is an extrapolation there, 0/0 among other shards that are as far away.
LEAST_OVERLAP = 0.01


class Band(BaseModel):
    """How far a head may be trusted around one noise level, measured on held-out records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    t: float  # centre
    slope: float  # calibrated f = slope * raw f + intercept
    intercept: float
    loss: float  # balanced binary cross-entropy in nats after calibration; log 2 knows nothing
    overlap: float  # mean of 2 min(p, 1 - p) over the anchor: 0 where the shard is out of sight
    # Mean of exp f over held-out anchor records: for an exact head 1, or with captions the part of
    # the shard's records that have one over that of the anchor's; 0 where one side has none.
    mean_ratio: float


class HeadCalibration(BaseModel):
    """Bands in rising order of t, for captions and for the empty one; none is no correction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Apart, since a head may be sure for two reasons: what it sees and what it is told.
    prompted: list[Band] = Field(default_factory=list)
    unprompted: list[Band] = Field(default_factory=list)
    text: Band | None = None  # of the head on cond alone, t = 1

    def warnings(self) -> list[str]:
        """Where not to trust the head, as ends of a sentence about its shard."""
        said = []
        for how, bands in (("with", self.prompted), ("without", self.unprompted)):
            far = [f"{band.t:g}" for band in bands if band.overlap < LEAST_OVERLAP]
            if far:
                said.append(f"has no overlap with the anchor at t = {', '.join(far)}, {how} prompt")
            # What calibration flattens is better off saying nothing.
            worse = [f"{band.t:g}" for band in bands if band.slope == 0]
            if worse:
                said.append(f"was worse than its prior at t = {', '.join(worse)}, {how} prompt")
        if self.tells_captions_apart():
            said.append("has no overlap with the anchor by captions alone")
        # Where one side had no captions nothing was to be learnt.
        if self.text is not None and self.text.mean_ratio > 0 and self.text.slope == 0:
            said.append("was worse than its prior by captions alone")
        return said

    def tells_captions_apart(self) -> bool:
        """Whether it says of every caption whether it is the shard's: elsewhere it extrapolates."""
        return self.text is not None and self.text.overlap < LEAST_OVERLAP


class HeadConfig(BaseModel):
    """`config.json` of a gate head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    shard: str
    trunk_sha256: str  # of the folder that it continues from
    calibration: HeadCalibration = Field(default_factory=HeadCalibration)


class GateHead(nn.Module):
    """A light classifier of one shard's noised records against the anchor's."""

    def __init__(self, config: HeadConfig, trunk: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        outputs = 2 * len(trunk.labels)
        self.upper = Upper(trunk, outputs)
        self.text_only = text_head(trunk, outputs)

    def raw(self, features: Features, text: Tensor) -> Tensor:
        """f for t below 1, `(batch,)`; uncalibrated, but for the caption's part `text`."""
        return _ratio(self.upper(features)) + text

    def raw_text(self, cond: Conditioning) -> Tensor:
        """Uncalibrated f at t = 1 from text alone, `(batch,)`."""
        return _ratio(self.text_only(scaled(cond)))

    def text(self, cond: Conditioning) -> Tensor:
        """Calibrated f at t = 1, `(batch,)`; 0 for cond_null."""
        return _with_band(self.config.calibration.text, self.raw_text(cond)) * (~cond.is_null)

    def forward(self, features: Features, t: Tensor, cond: Conditioning) -> Tensor:
        """Calibrated f, `(batch,)`; what corrects it runs linearly between band centres."""
        told, text = self.config.calibration, self.text(cond)
        raw = self.raw(features, text)
        prompted, unprompted = (_corrected(b, raw, t) for b in (told.prompted, told.unprompted))
        seen = torch.where(cond.is_null, unprompted, prompted)
        return torch.where(t >= 1, text, seen)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        save_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path, trunk: TrunkConfig) -> GateHead:
        """Read what `save` wrote; strict."""
        try:
            head = cls(read_head_config(folder), trunk)
            head.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise Refused(f"{folder} is not a gate head ({error})") from error
        return head.eval()


def read_head_config(folder: Path) -> HeadConfig:
    """`config.json` of a gate head, checked."""
    try:
        values: Any = json.loads((folder / CONFIG_NAME).read_text())
        check_schema(values, SCHEMA_VERSION, f"{folder}/{CONFIG_NAME}")
        return HeadConfig.model_validate(values)
    except (OSError, ValueError) as error:
        raise Refused(f"{folder} is not a gate head ({error})") from error


def new_head(config: HeadConfig, trunk: Trunk, log_shares: Tensor | None = None) -> GateHead:
    """What the trunk knows of a shard that has these log shares of its labels, `(label,)`.

    Without them the shard is as the commons, and the head says 0 everywhere.
    """
    head = GateHead(config, trunk.config)
    tilt = torch.zeros(len(trunk.config.labels))
    if log_shares is not None:
        tilt = (log_shares - trunk.config.log_shares()).to(tilt)
    with torch.no_grad():
        head.upper.block.load_state_dict(trunk.upper.block.state_dict())
        head.text_only[0].load_state_dict(trunk.text_only[0].state_dict())
        for own, shared in (
            (head.upper.out, trunk.upper.out),
            (head.text_only[-1], trunk.text_only[-1]),
        ):
            assert isinstance(own, nn.Linear)
            assert isinstance(shared, nn.Linear)
            own.weight.copy_(shared.weight.repeat(2, 1))
            own.bias.copy_(torch.cat([shared.bias + tilt, shared.bias]))
    return head


def _ratio(logits: Tensor) -> Tensor:
    """log of one sum of exponentials over another, `(batch, 2 * label)` -> `(batch,)`."""
    above, below = logits.chunk(2, dim=1)
    return above.logsumexp(dim=1) - below.logsumexp(dim=1)


def _with_band(band: Band | None, f: Tensor) -> Tensor:
    return f if band is None else band.slope * f + band.intercept


def _corrected(bands: list[Band], f: Tensor, t: Tensor) -> Tensor:
    """Slope and intercept at `t` `(batch,)`, linear between band centres and constant outside."""
    if not bands:
        return f
    centres = t.new_tensor([band.t for band in bands])
    right = torch.searchsorted(centres, t.contiguous()).clamp(1, max(1, len(bands) - 1))
    right = right.clamp(max=len(bands) - 1)
    left = (right - 1).clamp(min=0)
    gap = (centres[right] - centres[left]).clamp(min=1e-12)
    share = ((t - centres[left]) / gap).clamp(0, 1)
    slopes = t.new_tensor([band.slope for band in bands])
    intercepts = t.new_tensor([band.intercept for band in bands])
    slope = torch.lerp(slopes[left], slopes[right], share)
    return slope * f + torch.lerp(intercepts[left], intercepts[right], share)
