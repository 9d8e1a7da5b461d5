"""The ensemble as a diffusers component: `config.json`, `experts/SHARD/`, `trunk/`, `gate/SHARD/`.

Every expert and gate head stands there as its island published it, byte for byte; `config.json`
adds the shards' record counts, which are the gate's priors, and the shape of the pictures, and
`text_projection.safetensors` is the encoder's.
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
from diffusers.configuration_utils import FrozenDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser, read_card
from atoll.core.errors import MissingError, Refused, UsageError
from atoll.core.families import check_shapes
from atoll.core.head import GateHead, HeadConfig, read_head_config
from atoll.core.manifest import Picture, check_schema
from atoll.core.storage import canonical_json, sha256_folder
from atoll.core.trunk import Trunk, TrunkConfig
from atoll.router.chooser import Chooser, SampleSettings, sample_settings
from atoll.router.ensemble import ExpertVelocity, Trajectory, mix
from atoll.router.forward import TextProjection, read_call, stateless
from atoll.router.gate import Gate, JointGate
from atoll.router.paging import PagedExperts

SCHEMA_VERSION = 2  # 1: heads without a trunk
TRUNK, JOINT = "trunk", "joint"
BASE = "base"  # its name among the experts
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
    base: bool = False  # whether the expert BASE is the base itself, of the commons' records
    missing: list[str]  # shards of the run whose expert was not there when this was assembled
    family: str | None = None  # whose forward it has, where that is not the first expert's

    @model_validator(mode="after")
    def _has_its_base(self) -> EnsembleConfig:
        if self.base and BASE not in self.records:
            raise ValueError(f"it has a base, and no record count for '{BASE}'")
        return self

    @property
    def present(self) -> list[str]:
        """The shards whose expert is here."""
        return [name for name in self.records if not (self.base and name == BASE)]


# Solvers in log-SNR cannot begin at 1, where that is infinite, and begin with noise a little below:
# DPM-Solver++ at .999, UniPC at 1 - 1e-6. Of noise a head can say nothing but from the caption.
_START = 0.999


class EnsembleModel(ModelMixin):  # type: ignore[misc]
    """All experts and the gate, resident; in a stock pipeline, its `transformer` or `unet`.

    There it answers as one network of `family` would, with a velocity, under the routing of
    `set_routing`. `config` is that of an expert of the family.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        experts: Sequence[Denoiser] | PagedExperts,
        gate: Gate | JointGate,
        text_projection: TextProjection | None = None,
    ) -> None:
        super().__init__()
        self.shards = list(config.records)
        self._paged = experts if isinstance(experts, PagedExperts) else None
        self._resident = [] if isinstance(experts, PagedExperts) else list(experts)
        cards = self._paged.cards if self._paged else [each.card for each in self._resident]
        self.cards = dict(zip(self.shards, cards, strict=True))
        self.networks = torch.nn.ModuleList(each.network for each in self._resident)
        families = list(dict.fromkeys(card.family for card in cards))
        if config.family is not None and config.family not in families:
            raise UsageError(
                f"No expert of this ensemble is of the family '{config.family}'",
                allowed=", ".join(families),
            )
        self.family = config.family or families[0]
        # Nothing is written that goes without saying: the folder stays as it was assembled.
        named = None if self.family == families[0] else self.family
        self.ensemble_config = config.model_copy(update={"family": named})
        self.gate = gate
        self.text_projection = text_projection
        self.set_routing("full")

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """Each expert's network's configuration, by shard."""
        networks: list[Any] = [each.network for each in self._resident]
        found = self._paged.configs if self._paged else [network.config for network in networks]
        return dict(zip(self.shards, found, strict=True))

    @property
    def config(self) -> FrozenDict:
        """What pipelines read of a network: that of an expert, for the ensemble's pictures."""
        shard = next(name for name, card in self.cards.items() if card.family == self.family)
        # Published PixArts put out a variance too, which an ensemble drops.
        channels = self.ensemble_config.picture.channels
        own = self.configs[shard].items()
        said = {key: value for key, value in own if key != "_name_or_path"}
        return FrozenDict({**said, "out_channels": channels})

    @property
    def latent_space(self) -> str:
        """What the experts work in: pixels, or an autoencoder's latents."""
        return next(iter(self.cards.values())).latent_space

    @property
    def velocities(self) -> Sequence[ExpertVelocity]:
        """The experts as functions, in the order of `shards`."""
        return self._paged or [expert.velocity for expert in self._resident]

    def check_takes(self, picture: Picture) -> None:
        """Refuse a shape of x_data that an expert cannot make, by a `ConfigError`."""
        for shard, config in self.configs.items():
            check_shapes(self.cards[shard].family, config, [picture])

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
            self.gate_weights,
            shards=self.shards,
            settings=settings,
            cond=cond,
            null=null,
            **options,
        )

    def gate_weights(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """p(k | x_t, t, cond), `(batch, shard)`, of cond alone where a solver begins."""
        weights: Tensor = self.gate(x_t, torch.where(t >= _START, 1, t), cond)
        return weights

    @torch.no_grad()
    def draw(self, cond: Conditioning, *, seed: int | Sequence[int] = 0, first: int = 0) -> Tensor:
        """Experts drawn from p(k | cond), int64 `(batch,)`, for `set_routing("once", experts=...)`.

        Those of `AtollPipeline` for the same captions, seeds and numbers of pictures.
        """
        x_t = torch.zeros(len(cond), *self.ensemble_config.picture.shape, device=self.device)
        t = torch.ones(len(cond), device=self.device)
        p = self._posterior(x_t, t, cond.to(x_t))
        chooser = Chooser(
            sample_settings(len(cond), self.shards, routing="once", seed=seed, first=first),
            self.shards,
        )
        chooser.begin(t, 0)
        return chooser.choose(p, p)[0].argmax(dim=1)

    def set_routing(
        self,
        routing: str,
        *,
        experts: Tensor | Sequence[int] | None = None,
        paired: bool = False,
    ) -> None:
        """Which experts `forward` runs, `full` until told otherwise.

        `paired` says that batches are guidance's, [without the prompt, with it], of which both
        halves then run the union of their two sets, as `AtollPipeline` does; else every row has the
        set of its own posterior. `once` wants the `experts` `(pictures,)` that were drawn;
        `sample` needs a memory of steps and is refused. Raises `UsageError`.
        """
        self._stateless = stateless(routing, self.shards, experts=experts, paired=paired)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The velocity, as `family`'s own forward would return it for the same arguments.

        Pictures `(batch, channel, height, width)`, timesteps from 0 to 1000, and token states of
        the ensemble's own encoder; see `atoll.router.forward`. Raises `UsageError`.
        """
        families = {card.family for card in self.cards.values()}
        call = read_call(self.family, families, self.text_projection, args, kwargs)
        weights = self._stateless.weights(self._posterior, call.x_t, call.t, call.cond, self.shards)
        return call.output(mix(self.velocities, weights, call.x_t, call.t, call.cond))

    def _posterior(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if len(self.shards) == 1:
            return x_t.new_ones(len(x_t), 1)
        return self.gate_weights(x_t, t, cond)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str = "",
        family: str | None = None,
        expert_bytes: int | None = None,
        **options: Any,
    ) -> EnsembleModel:
        """Read a component folder; `torch_dtype` (or `dtype`) is the dtype of the experts.

        `family` names whose forward the ensemble has, the first expert's by default. With
        `expert_bytes` no more than so many bytes of experts are in memory at once: they are paged
        from the folder (`PagedExperts`), and saved as they lie there.
        """
        folder = Path(folder) / subfolder
        config = read_ensemble_config(folder)
        if family is not None:
            config = config.model_copy(update={"family": family})
        places = [folder / "experts" / shard for shard in config.records]
        for place in places:
            if not place.is_dir():
                raise MissingError(
                    f"The expert of {place.name} is not at {place}",
                    cure="assemble the ensemble again without it, or restore the folder",
                )
        dtype = options.get("torch_dtype") or options.get("dtype")
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        experts: list[Denoiser] | PagedExperts
        if expert_bytes is None:
            experts = [Denoiser.load(place) for place in places]
            torch.nn.ModuleList(each.network for each in experts).to(dtype=dtype)
        else:
            experts = PagedExperts(places, budget=expert_bytes, dtype=dtype)
        if config.missing:
            _log.warning(
                "This is the ensemble of %d of %d shards, renormalised; missing: %s",
                len(config.present),
                len(config.present) + len(config.missing),
                ", ".join(config.missing),
            )
        gate = _load_gate(folder, config)
        projection = TextProjection.load(folder, pooled=gate.pooled)
        model = cls(config, experts, gate, projection)
        model._check()
        model.eval()
        return model

    def _check(self) -> None:
        """Refuse experts that cannot stand together or here."""
        for shard, config in self.configs.items():
            _check_expert(shard, self.cards[shard], config, self.ensemble_config)
        spaces = {card.latent_space for card in self.cards.values()}
        if len(spaces) > 1:
            raise Refused(f"The experts work in different latent spaces: {sorted(spaces)}")

    def save_pretrained(self, folder: str | Path, **_options: Any) -> None:
        """Write the component folder that `from_pretrained` reads."""
        folder = Path(folder)
        for shard, expert in zip(self.shards, self._resident, strict=False):
            expert.save(folder / "experts" / shard)
        for shard, place in zip(
            self.shards, self._paged.folders if self._paged else [], strict=False
        ):
            shutil.copytree(place, folder / "experts" / shard)
        if isinstance(self.gate, JointGate):
            self.gate.classifier.save(folder / JOINT)
        else:
            self.gate.trunk.save(folder / TRUNK)
            for shard, head in self.gate.by_shard().items():
                head.save(folder / "gate" / shard)
        if self.text_projection is not None:
            self.text_projection.save(folder)
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


def _check_expert(
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
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    made_for = (config["in_channels"], height, width)
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
        **config.model_dump(mode="json", exclude_none=True),
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
