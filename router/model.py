"""The ensemble as a diffusers component: `config.json`, `experts/SHARD/`, `trunk/`, `gate/SHARD/`.

Every expert and gate head stands there as its island published it, byte for byte; `config.json`
adds the shards' record counts, which are the gate's priors, and the shape of the pictures.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from diffusers import ModelMixin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Denoiser, read_card
from atoll.core.errors import MissingError, Refused
from atoll.core.head import GateHead, HeadConfig, read_head_config
from atoll.core.manifest import Picture, check_schema
from atoll.core.storage import canonical_json, sha256_folder
from atoll.core.trunk import Trunk, TrunkConfig
from atoll.router.chooser import SampleSettings
from atoll.router.ensemble import ExpertVelocity, Trajectory
from atoll.router.gate import Gate, JointGate

SCHEMA_VERSION = 2  # 1: heads without a trunk
TRUNK, JOINT = "trunk", "joint"
_log = logging.getLogger("atoll")


ShardName = Annotated[str, Field(pattern=r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$")]


GateKind = Literal["per-shard", "joint"]


class EnsembleConfig(BaseModel):
    """`transformer/config.json` of an ensemble folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    picture: Picture
    # Shard -> record count, of the experts that are here. A shard's name is that of a folder.
    records: Annotated[dict[ShardName, Annotated[int, Field(ge=1, le=2**53)]], Field(min_length=1)]
    gate: GateKind = "per-shard"
    missing: list[str]  # shards of the run whose expert was not there when this was assembled


class EnsembleModel(ModelMixin):  # type: ignore[misc]
    """All experts and the gate, resident."""

    def __init__(
        self, config: EnsembleConfig, experts: Mapping[str, Denoiser], gate: Gate | JointGate
    ) -> None:
        super().__init__()
        self.ensemble_config = config
        self.cards = {shard: expert.card for shard, expert in experts.items()}
        self.networks = torch.nn.ModuleList(expert.network for expert in experts.values())
        self.gate = gate
        self.shards = list(experts)
        self._experts = list(experts.values())

    @property
    def latent_space(self) -> str:
        """What the experts work in: pixels, or an autoencoder's latents."""
        return next(iter(self.cards.values())).latent_space

    @property
    def velocities(self) -> list[ExpertVelocity]:
        """The experts as functions, in the order of `shards`."""
        return [expert.velocity for expert in self._experts]

    def check_takes(self, picture: Picture) -> None:
        """Refuse a shape of x_data that an expert cannot make, by a `ConfigError`."""
        for expert in self._experts:
            expert.check_takes(picture)

    def trajectory(
        self,
        cond: Conditioning,
        null: Conditioning,
        settings: Sequence[SampleSettings],
        **options: Any,
    ) -> Trajectory:
        """A velocity for one batch's way from noise to data; options as `Trajectory`'s."""
        return Trajectory(
            self.velocities,
            self.gate,
            shards=self.shards,
            settings=settings,
            cond=cond,
            null=null,
            **options,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> EnsembleModel:
        """Read a component folder; `torch_dtype` (or `dtype`) is the dtype of the experts."""
        folder = Path(folder)
        config = read_ensemble_config(folder)
        experts = {}
        for shard in config.records:
            place = folder / "experts" / shard
            if not place.is_dir():
                raise MissingError(
                    f"The expert of {shard} is not at {place}",
                    cure="assemble the ensemble again without it, or restore the folder",
                )
            experts[shard] = Denoiser.load(place)
            _check_expert(shard, experts[shard], config.picture)
        spaces = {expert.card.latent_space for expert in experts.values()}
        if len(spaces) > 1:
            raise Refused(f"The experts work in different latent spaces: {sorted(spaces)}")
        if config.missing:
            _log.warning(
                "This is the ensemble of %d of %d shards, renormalised; missing: %s",
                len(config.records),
                len(config.records) + len(config.missing),
                ", ".join(config.missing),
            )
        model = cls(config, experts, _load_gate(folder, config))
        dtype = options.get("torch_dtype") or options.get("dtype")
        if isinstance(dtype, torch.dtype):
            model.networks.to(dtype)
        model.eval()
        return model

    def save_pretrained(self, folder: str | Path, **_options: Any) -> None:
        """Write the component folder that `from_pretrained` reads."""
        folder = Path(folder)
        for shard, expert in zip(self.shards, self._experts, strict=True):
            expert.save(folder / "experts" / shard)
        if isinstance(self.gate, JointGate):
            self.gate.classifier.save(folder / JOINT)
        else:
            self.gate.trunk.save(folder / TRUNK)
            for shard, head in zip(self.shards, self.gate.heads, strict=True):
                assert isinstance(head, GateHead)
                head.save(folder / "gate" / shard)
        write_ensemble_config(folder, self.ensemble_config)


def _load_gate(folder: Path, config: EnsembleConfig) -> Gate | JointGate:
    place = folder / (JOINT if config.gate == "joint" else TRUNK)
    trunk = Trunk.load(place)
    if trunk.config.channels != config.picture.channels:
        raise Refused(
            f"The ensemble is of pictures {config.picture.shape}, its gate for "
            f"{trunk.config.channels} channels",
            cure="assemble the ensemble again",
        )
    if config.gate == "joint":
        check_joint(trunk.config, config.records)
        return JointGate(trunk, config.records)
    trunk_sha256 = sha256_folder(place)
    heads = {}
    for shard in config.records:
        heads[shard] = head = GateHead.load(folder / "gate" / shard, trunk.config)
        if head.config.shard != shard:
            raise Refused(
                f"In the place of {shard} is the gate head of {head.config.shard}",
                cure="assemble the ensemble again",
            )
        check_trunk(head.config, trunk_sha256)
    return Gate(trunk, heads, config.records)


def _check_expert(shard: str, expert: Denoiser, picture: Picture) -> None:
    """Refuse one of another shard, which the priors would misjudge, or for other pictures."""
    if expert.card.shard != shard:
        raise Refused(
            f"In the place of {shard} is the expert of {expert.card.shard}",
            cure="assemble the ensemble again",
        )
    config: Any = expert.network.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    made_for = (config.in_channels, height, width)
    if made_for != picture.shape:
        raise Refused(
            f"The ensemble is of pictures {picture.shape}; the expert of {shard} is for {made_for}",
            cure="assemble the ensemble again",
        )


def check_joint(classifier: TrunkConfig, shards: Collection[str]) -> None:
    """Refuse a joint gate that never saw one of the shards."""
    unseen = [shard for shard in shards if shard not in classifier.labels]
    if unseen:
        raise Refused(
            f"The joint gate was trained without {', '.join(unseen)}",
            cure="assemble the ensemble again, without --gate joint",
        )


def check_trunk(head: HeadConfig, trunk_sha256: str) -> None:
    """Refuse a head that continues from another trunk: its answers would mean nothing."""
    if head.trunk_sha256 != trunk_sha256:
        raise Refused(
            f"The gate head of {head.shard} continues from trunk {head.trunk_sha256[:16]}..., here "
            f"is {trunk_sha256[:16]}...",
            cure="assemble the ensemble again, of one run's heads",
        )


def read_ensemble_config(folder: Path) -> EnsembleConfig:
    """`config.json` of an ensemble component, checked."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        check_schema(values, SCHEMA_VERSION, str(path))
        # diffusers wants to see these; they say nothing to us.
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        return EnsembleConfig.model_validate(values)
    except FileNotFoundError:
        raise MissingError(
            f"There is no ensemble at {folder}", cure="run `atoll assemble`"
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        raise Refused(f"{path} is not the configuration of an ensemble ({error})") from error


def write_ensemble_config(
    folder: Path, config: EnsembleConfig, *, version: str = diffusers.__version__
) -> None:
    """Write `config.json` into a folder that is still being made."""
    values = {
        "_class_name": "EnsembleModel",
        "_diffusers_version": version,
        **config.model_dump(mode="json"),
    }
    (folder / "config.json").write_bytes(canonical_json(values))


def copy_experts(folder: Path, experts: Mapping[str, Path]) -> None:
    """Copy islands' experts to their places, after checking that they may stand together."""
    spaces = {read_card(place).latent_space for place in experts.values()}
    if len(spaces) > 1:
        raise Refused(f"The experts work in different latent spaces: {sorted(spaces)}")
    for shard, place in experts.items():
        shutil.copytree(place, folder / "experts" / shard)


def copy_heads(folder: Path, trunk: Path, heads: Mapping[str, Path]) -> None:
    """Likewise their gate heads, and the one trunk that all continue from."""
    trunk_sha256 = sha256_folder(trunk)
    shutil.copytree(trunk, folder / TRUNK)
    for shard, place in heads.items():
        check_trunk(read_head_config(place), trunk_sha256)
        shutil.copytree(place, folder / "gate" / shard)


def copy_joint(folder: Path, joint: Path, shards: Collection[str]) -> None:
    """A joint gate in the place of heads."""
    check_joint(Trunk.load(joint).config, shards)
    shutil.copytree(joint, folder / JOINT)
