"""The base: the common start of all experts, and the gate's trunk; of the commons alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atoll.core import recipes, seeds
from atoll.core.cache import BlockCache
from atoll.core.config import differences, remembering, saved_config
from atoll.core.denoiser import Card, Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.families import check_shapes
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest, check_artefact
from atoll.core.pack import Pack, open_pack
from atoll.core.starts import load_start
from atoll.core.storage import Storage
from atoll.islands.group import Group
from atoll.islands.settings import BaseConfig, plan_for
from atoll.islands.train_denoiser import train_here
from atoll.islands.train_trunk import load_trunk, task_of, train_trunk

FOLDER = "base"
WORK = "base-training"  # checkpoints and metrics; the base itself is a plain component folder


@dataclass(frozen=True)
class NewBase:
    """A base before its training: its recipe, its weights, and where they come from."""

    recipe: str
    denoiser: Denoiser
    origin: dict[str, str]  # for the ledger; empty where the weights are random


def new_base(manifest: Manifest, commons: Pack, config: BaseConfig) -> NewBase:
    """Seeded random weights of a recipe, or those that somebody published (`--start`).

    Published weights are trained on for `training.prediction` on `training.schedule`, whatever they
    predicted before; with `training.keep_path` these are, where not given, the weights' own.
    """
    picture, training = manifest.picture, config.training
    widths = {"text_width": commons.text_width, "pooled_width": commons.pooled_width}
    origin: dict[str, str] = {}
    prediction, schedule = training.objective, training.schedule
    if config.start is None:
        if training.keep_path:
            raise ConfigError(
                "There is no path to keep: these weights are random",
                cure="name weights by --start, or leave out training.keep_path",
            )
        name = config.recipe or recipes.default_recipe(picture)
        seed = seeds.key(manifest.seed, "base") & ((1 << 63) - 1)
        recipe = recipes.recipe_of(name)
        check_shapes(recipe.family, recipe.config, manifest.pictures)
        network = recipes.build(recipe, picture, **widths, seed=seed)
    else:
        start = load_start(
            config.start,
            picture,
            **widths,
            prediction=training.prediction if training.keep_path else training.objective,
            schedule=training.schedule,
            keep_path=training.keep_path,
        )
        prediction, schedule = start.prediction, start.schedule
        made: Any = start.network
        check_shapes(start.family, made.config, manifest.pictures)
        network, origin = start.network, {"start": config.start, "start_sha256": start.sha256}
        name = config.recipe or recipes.nearest_recipe(
            network, start.family, picture, commons.text_width
        )
        if recipes.recipe_of(name).family != start.family:
            raise ConfigError(
                f"{config.start} is of family {start.family}, the recipe {name} is not",
                cure="leave out --recipe: it then gives batch and learning rates alone",
            )
        if start.latent_space not in (None, commons.card.latent_space):
            raise Refused(
                f"{config.start} works in {start.latent_space}, this run in "
                f"{commons.card.latent_space}",
                cure="start from weights of this run's latent space, or partition with --vae",
            )
        was, path = start.declared or "unknown", schedule or "our linear path"
        log.info("%s: prediction was %s, goes on as %s on %s", config.start, was, prediction, path)
    card = Card(
        name="base",
        kind="base",
        shard=None,
        base_sha256=None,
        family=recipes.recipe_of(name).family,
        prediction=prediction,
        schedule=schedule,
        latent_space=commons.card.latent_space,
        images_seen=0,
    )
    return NewBase(name, Denoiser(network, card), origin)


def train_base(run: Storage, manifest: Manifest, config: BaseConfig) -> Artefact:
    """Train the base and the gate's trunk where they are not there; the same command resumes."""
    if manifest.base is not None:
        _check_unchanged(run, manifest, config)
        check_artefact(run, manifest.base)
        if manifest.trunk is not None:
            load_trunk(run, manifest.trunk)
            return manifest.base
    if config.training.lora.rank is not None:
        raise ConfigError(
            "A base has nothing that adapters could stand on: all of its weights are trained",
            cure="give training.lora to `atoll train`, for the experts",
        )
    group = Group()
    run = run.patient(leave=group.leave.is_set)  # SIGTERM within the training only sets that flag
    commons = open_pack(run, manifest.commons, BlockCache(config.cache_gib))
    task = task_of(run, manifest, commons)  # refused before anything is trained
    made = manifest.base or _train(run, manifest, commons, config, group)
    recipe = recipes.recipe_of(str(manifest.recipe))
    plan = plan_for(config.training, recipe, commons.card.records, base=True)
    train_trunk(run, manifest, commons, task, config, plan)
    return made


def _train(
    run: Storage, manifest: Manifest, commons: Pack, config: BaseConfig, group: Group
) -> Artefact:
    """The base itself."""
    base = new_base(manifest, commons, config)
    recipe = recipes.recipe_of(base.recipe)
    plan = plan_for(config.training, recipe, commons.card.records, base=True)
    with remembering(config, run, WORK) as begun:
        trained = train_here(
            run,
            WORK,
            base.denoiser,
            commons,
            config.training,
            learning_rate=recipe.base_learning_rate,
            plan=plan,
            seed=manifest.seed,
            stream="base",
            threads=config.threads,
            device=config.device,
            origin={"recipe": base.recipe, "start_sha256": base.origin.get("start_sha256")},
            bitwise_resume=config.bitwise_resume,
            group=group,
            begun=begun,
        )
    run.write_folder(FOLDER, trained.save)
    sha256 = run.sha256(FOLDER)
    manifest.recipe = base.recipe
    manifest.base = Artefact(path=FOLDER, sha256=sha256)
    ledger = Ledger(run)
    parents = [e for kind in ("encoder", "commons") if (e := ledger.latest(kind, kind)) is not None]
    ledger.append("base", "base", sha256, parents=parents, note=base.origin)
    manifest.save(run)
    return manifest.base


def _check_unchanged(run: Storage, manifest: Manifest, config: BaseConfig) -> None:
    """A base that is trained stays: refuse to be asked for another."""
    if config.recipe is not None:
        recipes.recipe_of(config.recipe)  # a name that is none is told so
    if config.recipe not in (None, manifest.recipe):
        raise ConfigError(
            f"This run's base is of recipe {manifest.recipe}, not {config.recipe}",
            cure="start a new run for another recipe",
        )
    earlier = saved_config(BaseConfig, run, WORK) or config
    same = {
        "recipe": None, "threads": 1, "device": "auto", "bitwise_resume": True, "cache_gib": 1
    }  # fmt: skip
    if changed := differences(earlier.model_copy(update=same), config.model_copy(update=same)):
        raise ConfigError(
            f"This run's base is trained already, and otherwise: {'; '.join(changed)}",
            cure="leave the options out to keep it, or start a new run",
        )
