"""Whatever can be sampled, found by its path: a run, an ensemble folder, a base, expert or soup.

A denoiser on its own is an ensemble of one: the same trajectory, the same sampler, no gate to ask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.cli.working import check_recorded, owning_run
from atoll.core import sampler
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import CARD_NAME, Denoiser
from atoll.core.embedding import Encoder, load_encoder
from atoll.core.errors import MissingError, UsageError
from atoll.core.head import HeadConfig
from atoll.core.journal import log
from atoll.core.latents import Autoencoder, autoencoder_beside
from atoll.core.ledger import Ledger
from atoll.core.manifest import MANIFEST_NAME, PIXELS, Manifest, Picture, parse_size
from atoll.core.storage import Storage
from atoll.evaluate.evaluation import METRICS_NAME, Evaluation
from atoll.router.chooser import sample_settings
from atoll.router.chooser import x_noise as noise_of
from atoll.router.ensemble import ExpertVelocity, TraceStep, Trajectory, joined
from atoll.router.gate import Gate, GateWeights
from atoll.router.routing import Routing, parse_routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from atoll.merge.far import Place


CPU = torch.device("cpu")
_AT_ONCE = 100  # pictures


@dataclass(frozen=True)
class Model:
    """Experts, the gate over them (never asked where there is one), and what they work with."""

    name: str
    kind: str  # base, expert, soup or ensemble
    experts: Sequence[ExpertVelocity]
    gate: GateWeights
    shards: Sequence[str]
    encoder: Encoder
    picture: Picture  # the shape of x_data
    takes: Callable[[Picture], None]  # refuses shapes that the experts cannot make
    device: torch.device = CPU
    latent_space: str = PIXELS
    vae: Autoencoder | None = None  # of latents
    sha256: str | None = None  # of an ensemble's folder
    auto: str | None = None  # what its own evaluation chose
    heads: Mapping[str, HeadConfig] = field(default_factory=dict)  # of the gate, if it has any

    def routing(self, text: str) -> Routing:
        """A routing over this model's shards, `auto` among them; `UsageError` lists the choices."""
        return parse_routing(self.auto if text == "auto" and self.auto else text, self.shards)

    def decoded(self, x_data: Tensor) -> Tensor:
        """Pixels in about [-1, 1] from what the experts make, `(batch, channel, height, width)`."""
        return x_data if self.vae is None else self.vae.decode(x_data.to(self.device))


@dataclass(frozen=True)
class Pictures:
    """Pictures `(n, channel, height, width)` in about [-1, 1], their origin, and what it took."""

    x_data: Tensor
    trace: list[TraceStep]  # empty unless it was asked for
    # Forward passes a picture and a step, of the conditional branch and of guidance's null branch.
    experts_per_step: float
    null_experts_per_step: float


def of_size(model: Model, text: str) -> Model:
    """The model as one that makes pictures of `text`, "HxW" in pixels."""
    factor = 1 if model.vae is None else model.vae.factor
    try:
        height, width = parse_size(text)
    except ValueError as error:
        raise UsageError(f"--size {text}: {error}") from error
    if height % factor or width % factor:
        raise UsageError(
            f"--size {text} does not divide", allowed=f"HxW, both multiples of {factor}"
        )
    shape = {"height": height // factor, "width": width // factor}
    picture = model.picture.model_copy(update=shape)
    model.takes(picture)
    return replace(model, picture=picture)


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[str],
    *,
    routing: str | Sequence[str] = "full",
    steps: int = 30,
    guidance: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    one_posterior: bool = False,
    x_noise: Tensor | None = None,
    trace: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Pictures:
    """One picture per prompt; number i has the settings and the noise of (seed, first + i).

    Options are as of `sample_settings` and `Trajectory`. So many at a time as memory is sure to
    hold; `watch` is called at every step of each batch.
    """
    asked = [routing] if isinstance(routing, str) else routing
    settings = sample_settings(
        len(prompts),
        model.shards,
        routing=[str(model.routing(text)) for text in asked],
        guidance=guidance,
        seed=seed,
        first=first,
    )
    null = model.encoder.condition([""])
    told = None if watch is None else (lambda step, _t, _x, _v: watch(step))
    parts, traces, runs, null_runs = [], [], 0, 0
    for start in range(0, len(prompts), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        trajectory = Trajectory(
            model.experts,
            model.gate,
            shards=model.shards,
            settings=settings[here],
            cond=model.encoder.condition(list(prompts[here])),
            null=null,
            one_posterior=one_posterior,
            trace=trace,
        )
        noise = noise_of(settings[here], model.picture.shape) if x_noise is None else x_noise[here]
        x_data = sampler.euler(trajectory, noise.to(model.device), sampler.times(steps), watch=told)
        parts.append(model.decoded(x_data).cpu())
        traces.append(trajectory.trace or [])
        runs += trajectory.experts_run
        null_runs += trajectory.null_experts_run
    each = 1 / (steps * len(prompts))
    steps_of_all = [joined(at_once) for at_once in zip(*traces, strict=True)]
    return Pictures(torch.cat(parts), steps_of_all, runs * each, null_runs * each)


def batches(count: int) -> int:
    """In how many batches so many pictures are sampled."""
    return math.ceil(count / _AT_ONCE)


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda`, or with `auto` a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"Unknown device '{name}'", allowed="auto, cpu, cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("This machine has no CUDA device", allowed="auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def load_model(
    path: str, *, encoder: str | None = None, device: str = "cpu", expert_bytes: int | None = None
) -> Model:
    """What lies at a path, with the encoder that its captions and the vae that its latents need.

    `expert_bytes` is as of `EnsembleModel.from_pretrained`, and of an ensemble alone.
    """
    place = device_of(device)
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        if not (folder / "ensemble" / "model_index.json").is_file():
            raise MissingError(f"The run {path} has no ensemble yet", cure=f"atoll assemble {path}")
        folder = folder / "ensemble"
    check_recorded(folder)
    if (folder / "model_index.json").is_file():
        return _ensemble(folder, place, expert_bytes)
    if (folder / CARD_NAME).is_file():
        if expert_bytes is not None:
            raise UsageError(
                f"{path} is one network, and not paged",
                cure="leave out --expert-gib, or name a run or an ensemble",
            )
        return _denoiser(folder, encoder, place)
    raise UsageError(
        f"There is no model at {path}",
        allowed="a run, an ensemble, or the folder of a base, an expert or a soup",
    )


def _ensemble(folder: Path, device: torch.device, expert_bytes: int | None) -> Model:
    from atoll.router.model import EnsembleModel

    model = EnsembleModel.from_pretrained(folder / "transformer", expert_bytes=expert_bytes)
    model.to(device)
    _say_what_is_not_followed(folder)
    sha256, auto = _own(folder)
    return Model(
        name=folder.name,
        kind="ensemble",
        experts=model.velocities,
        gate=model.gate_weights,
        shards=model.shards,
        encoder=load_encoder(folder / "text_encoder"),
        picture=model.ensemble_config.picture,
        takes=model.check_takes,
        device=device,
        latent_space=model.latent_space,
        vae=_vae(folder, model.latent_space, device),
        sha256=sha256,
        auto=auto,
        heads=model.gate.configs if isinstance(model.gate, Gate) else {},
    )


def _say_what_is_not_followed(folder: Path) -> None:
    """Warn of a scheduler that is not the one of `atoll assemble`: what samples here is Euler's."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    told = json.loads(file.read_text())
    named = str(told.get("_class_name", "")).removesuffix("DiscreteScheduler")
    plain = not any(told.get(key) for key in ("use_dynamic_shifting", "stochastic_sampling"))
    if named != "FlowMatchEuler" or told.get("shift", 1.0) != 1.0 or not plain:
        log.warning(
            "%s has a scheduler of its own (%s), which a diffusers pipeline follows; here pictures "
            "are sampled by Euler's method in even steps", folder, named,
        )  # fmt: skip


def _own(folder: Path) -> tuple[str | None, str | None]:
    """Of a run's own ensemble its digest, and the routing that its evaluation chose, if it did.

    A copy elsewhere has neither: nobody says what became of its run.
    """
    home = owning_run(folder)
    if home is None:
        return None, None
    run = Storage(home)
    ensemble = Manifest.load(run).ensemble
    if ensemble is None or home / ensemble.path != folder.resolve():
        return None, None
    entry = Ledger(run).latest("evaluation", METRICS_NAME)
    recorded = entry.sha256 if entry is not None and run.exists(METRICS_NAME) else None
    if recorded is None or recorded != run.sha256(METRICS_NAME):
        return ensemble.sha256, None
    auto = Evaluation.load(run).auto
    if auto is None or auto.ensemble_sha256 != ensemble.sha256:
        return ensemble.sha256, None
    return ensemble.sha256, auto.routing


def _denoiser(folder: Path, encoder: str | None, device: torch.device) -> Model:
    denoiser = Denoiser.load(folder)
    place = Path(encoder) if encoder else _encoder_near(folder)
    if place is None:
        raise MissingError(
            f"{folder} is no part of a run, so its encoder is not known",
            cure="give --encoder RUN/encoder",
        )
    check_recorded(place)
    vae = _vae(place.parent, denoiser.card.latent_space, device)
    return one_expert(denoiser, load_encoder(place), device, vae=vae)


def _vae(folder: Path, latent_space: str, device: torch.device) -> Autoencoder | None:
    vae = autoencoder_beside(folder, latent_space)
    if vae is not None:
        vae.network.to(device)
    return vae


def one_expert(
    denoiser: Denoiser,
    encoder: Encoder,
    device: torch.device = CPU,
    *,
    vae: Autoencoder | None = None,
) -> Model:
    """A denoiser as an ensemble of one."""
    denoiser.network.to(device)
    config: Any = denoiser.network.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return Model(
        name=denoiser.card.name,
        kind=denoiser.card.kind,
        experts=[denoiser.velocity],
        gate=_sole_gate,
        shards=[denoiser.card.shard or denoiser.card.name],
        auto="full",  # which all are
        encoder=encoder,
        picture=Picture(channels=config.in_channels, height=height, width=width),
        takes=denoiser.check_takes,
        device=device,
        latent_space=denoiser.card.latent_space,
        vae=vae,
    )


def _sole_gate(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    raise AssertionError("the gate of a sole expert has nothing to decide")


def _encoder_near(folder: Path) -> Path | None:
    """The encoder of the run that a denoiser, or an ingredient of a soup, belongs to."""
    from atoll.merge.ingredients import located
    from atoll.merge.recipe import RECIPE_NAME, Recipe

    candidates: list[Place] = [folder]
    if (folder / RECIPE_NAME).is_file():
        candidates += [located(part, folder) for part in Recipe.load(folder).ingredients]
    for candidate in candidates:
        run = owning_run(candidate) if isinstance(candidate, Path) else None
        if run is not None and (run / "encoder").is_dir():
            return run / "encoder"
    return None


def model_names(models: list[str]) -> list[str]:
    """Short names that tell models apart: the last parts of their paths that differ."""
    for depth in range(1, 5):
        names = ["/".join(Path(model).resolve().parts[-depth:]) for model in models]
        if len(set(names)) == len(names):
            return names
    return models
