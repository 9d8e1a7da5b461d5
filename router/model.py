"""The ensemble as a diffusers component, loaded whole or paged from its folder (`component.py`)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Denoiser
from atoll.core.disk import drop
from atoll.core.errors import MissingError, Refused, UsageError, did_you_mean
from atoll.core.families import check_shapes
from atoll.core.manifest import Picture
from atoll.router.chooser import Chooser, SampleSettings, sample_settings
from atoll.router.component import (
    JOINT,
    TRUNK,
    EnsembleConfig,
    check_expert,
    drop_others,
    load_gate,
    read_ensemble_config,
    write_ensemble_config,
)
from atoll.router.ensemble import ExpertVelocity, Trajectory, mix
from atoll.router.forward import PROJECTION_NAME, TextProjection, read_call, stateless
from atoll.router.gate import Gate, JointGate
from atoll.router.paging import PagedExperts

_log = logging.getLogger("atoll")

# Solvers in log-SNR cannot begin at 1, where that is infinite, and begin with noise a little below:
# DPM-Solver++ at .999, UniPC at 1 - 1e-6. Of noise a head can say nothing but from the caption.
_START = 0.999


# What diffusers' pipelines hand to every component: with None or False nothing is asked for, and
# the others say how to load, not what.
_REFUSED = ("variant", "device_map", "use_flashpack", "quantization_config")
_UNUSED = (
    "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap",
    "use_safetensors", "local_files_only",
)  # fmt: skip


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
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> EnsembleModel:
        """Read a component folder; `torch_dtype` is that of the experts, float32 by default.

        `family` names whose forward the ensemble has, the first expert's by default. With
        `expert_bytes` no more than so many bytes of experts are in memory at once: they are paged
        from the folder (`PagedExperts`), and saved as they lie there. `options` are those that
        diffusers' pipelines hand to every component; what cannot be done is refused.
        """
        _check_options(options)
        if not (torch_dtype is None or isinstance(torch_dtype, torch.dtype)):
            raise UsageError(f"torch_dtype is {torch_dtype!r}", allowed="a torch.dtype")
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
        experts: list[Denoiser] | PagedExperts
        if expert_bytes is None:
            experts = [Denoiser.load(place, torch_dtype) for place in places]
        else:
            experts = PagedExperts(places, budget=expert_bytes, dtype=torch_dtype)
        if config.missing:
            _log.warning(
                "This is the ensemble of %d of %d shards, renormalised; missing: %s",
                len(config.present),
                len(config.present) + len(config.missing),
                ", ".join(config.missing),
            )
        gate = load_gate(folder, config)
        projection = TextProjection.load(folder, pooled=gate.pooled)
        model = cls(config, experts, gate, projection)
        model._check()
        model.eval()
        return model

    def _check(self) -> None:
        """Refuse experts that cannot stand together or here."""
        for shard, config in self.configs.items():
            check_expert(shard, self.cards[shard], config, self.ensemble_config)
        spaces = {card.latent_space for card in self.cards.values()}
        if len(spaces) > 1:
            raise Refused(f"The experts work in different latent spaces: {sorted(spaces)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Experts that are paged are cast as those that are there; where they are, x_t says.
        if self._paged is not None:
            dtype = fn(torch.empty(0, dtype=self._paged.dtype)).dtype
            if dtype != self._paged.dtype:
                self._paged.cast(dtype)
        return super()._apply(fn, recurse)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the component folder that `from_pretrained` reads, in the place of an older one.

        Experts are written in the dtype in which they are here, those that are paged as they lie.
        """
        folder = Path(folder)
        drop_others(folder, self.ensemble_config)
        for shard, expert in zip(self.shards, self._resident, strict=False):
            expert.save(folder / "experts" / shard)
        for shard, place in zip(
            self.shards, self._paged.folders if self._paged else [], strict=False
        ):
            target = folder / "experts" / shard
            if target.resolve() != place.resolve():  # it may be saved where it was loaded from
                drop(target)
                shutil.copytree(place, target)
        if isinstance(self.gate, JointGate):
            self.gate.classifier.save(folder / JOINT)
        else:
            self.gate.trunk.save(folder / TRUNK)
            for shard, head in self.gate.by_shard().items():
                head.save(folder / "gate" / shard)
        if self.text_projection is not None:
            self.text_projection.save(folder)
        else:
            drop(folder / PROJECTION_NAME)
        write_ensemble_config(folder, self.ensemble_config)


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in (*_REFUSED, *_UNUSED):
            own = ("subfolder", "family", "expert_bytes", "torch_dtype")
            raise UsageError(
                f"An ensemble is not loaded by '{name}'. {did_you_mean(name, own)}".strip(),
                allowed=", ".join(own),
            )
        if name in _REFUSED and value not in (None, False):
            raise UsageError(
                f"An ensemble is not loaded by {name}={value!r}",
                cure="leave it out; expert_bytes=... pages experts, .to(device) moves the rest",
            )
