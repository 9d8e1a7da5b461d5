"""An ensemble component's folder: `config.json`, `experts/SHARD/`, `trunk/`, `gate/SHARD/`.

Every expert and gate head stands there as its island published it, byte for byte; `config.json`
adds the shards' record counts, which are the gate's priors, and the shape of the pictures, and
`text_projection.safetensors` is the encoder's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from atoll.core.denoiser import Card, read_card
from atoll.core.digest import canonical_json, sha256_folder
from atoll.core.disk import drop
from atoll.core.errors import AtollError, MissingError, Refused
from atoll.core.head import GateHead, HeadConfig, read_head_config
from atoll.core.manifest import Picture, check_schema
from atoll.core.trunk import Trunk, TrunkConfig
from atoll.router.gate import Gate, JointGate

SCHEMA_VERSION = 2  # 1: heads without a trunk
TRUNK, JOINT = "trunk", "joint"
BASE = "base"  # its name among the experts
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
    base: bool = False  # whether the expert BASE is the base itself, of the commons' records
    missing: list[str]  # shards of the run whose expert was not there when this was assembled
    family: str | None = None  # whose forward it has, where that is not the first expert's

    @model_validator(mode="after")
    def _is_in_order(self) -> EnsembleConfig:
        # As the file is written: experts are told apart by their place, too.
        if list(self.records) != sorted(self.records):
            raise ValueError(f"the shards are not in the order of their names: {[*self.records]}")
        return self

    @model_validator(mode="after")
    def _has_its_base(self) -> EnsembleConfig:
        if self.base and BASE not in self.records:
            raise ValueError(f"it has a base, and no record count for '{BASE}'")
        return self

    @property
    def present(self) -> list[str]:
        """The shards whose expert is here."""
        return [name for name in self.records if not (self.base and name == BASE)]


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
        **config.model_dump(mode="json", exclude_none=True),
    }
    (folder / "config.json").write_bytes(canonical_json(values))


def drop_others(folder: Path, config: EnsembleConfig) -> None:
    """Take out what an ensemble that was saved here before has and this one has not."""
    try:
        before = read_ensemble_config(folder)
    except AtollError:
        return  # what lies here is not ours
    joint = config.gate == "joint"
    for shard in before.records:
        if shard not in config.records:
            drop(folder / "experts" / shard)
        if joint or shard not in config.present:
            drop(folder / "gate" / shard)
    drop(folder / (TRUNK if joint else JOINT))


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


def load_gate(folder: Path, config: EnsembleConfig) -> Gate | JointGate:
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
    heads: dict[str, GateHead | None] = dict.fromkeys(config.records)
    for shard in config.present:
        heads[shard] = head = GateHead.load(folder / "gate" / shard, trunk.config)
        if head.config.shard != shard:
            raise Refused(
                f"In the place of {shard} is the gate head of {head.config.shard}",
                cure="assemble the ensemble again",
            )
        check_trunk(head.config, trunk_sha256)
    return Gate(trunk, heads, config.records)


def check_expert(
    shard: str, card: Card, config: Mapping[str, Any], ensemble: EnsembleConfig
) -> None:
    """Refuse one of another shard, which the priors would misjudge, or for other pictures."""
    expected = ("base", None) if ensemble.base and shard == BASE else ("expert", shard)
    if (card.kind, card.shard) != expected:
        found = "the base" if card.kind == "base" else f"the {card.kind} of {card.shard}"
        raise Refused(
            f"In the place of {shard} is {found}",
            cure="assemble the ensemble again",
        )
    picture = ensemble.picture
    size = config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    made_for = (config.get("in_channels"), *(sides or ("any height", "any width")))
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
