"""The base: the common starting weights of all experts, trained on the commons alone.

Also the control that a claim is held against: the same loop, in this process, on any pack, from
any start, outside the run's lineage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atoll.core import recipes, seeds
from atoll.core.cache import BlockCache
from atoll.core.config import differences, save_config, saved_config
from atoll.core.denoiser import Card, Denoiser
from atoll.core.errors import ConfigError, Refused
from atoll.core.families import check_shapes
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest, Plan, check_artefact
from atoll.core.pack import Pack, open_pack
from atoll.core.starts import load_start
from atoll.core.storage import Storage
from atoll.islands.compute import Device, computing, matmul_rate
from atoll.islands.course import Course
from atoll.islands.data import Batches, ahead
from atoll.islands.group import Group
from atoll.islands.learner import Learner, Parallel
from atoll.islands.loop import Loop, Milestones
from atoll.islands.settings import BaseConfig, DenoiserTraining, plan_for
from atoll.islands.step import HELD_OUT_BATCH, flow_matching, held_out_loss, prepare

FOLDER = "base"
WORK = "base-training"  # checkpoints and metrics; the base itself is a plain component folder


def course_of(
    training: DenoiserTraining, plan: Plan, learning_rate: float, *, bitwise_resume: bool = True
) -> Course:
    """The loop's orders from a configuration; `learning_rate` is the recipe's."""
    optimizer = training.optimizer
    return Course(
        plan=plan,
        learning_rate=optimizer.learning_rate or learning_rate,
        weight_decay=optimizer.weight_decay,
        betas=(optimizer.beta1, optimizer.beta2),
        warmup=optimizer.warmup,
        clip=optimizer.clip,
        ema_decays=training.ema_decays,
        checkpoints=training.checkpoints,
        checkpoint_seconds=training.checkpoint_seconds,
        guard=training.guard,
        lora=training.lora,
        accumulation=training.accumulation,
        kernel=optimizer.kernel,
        bitwise_resume=bitwise_resume,
    )


@dataclass(frozen=True)
class NewBase:
    """A base before its training: its recipe, its weights, and where they come from."""

    recipe: str
    denoiser: Denoiser
    origin: dict[str, str]  # for the ledger; empty where the weights are random


def new_base(manifest: Manifest, commons: Pack, config: BaseConfig) -> NewBase:
    """Seeded random weights of a recipe, or those that somebody published (`--start`).

    Published weights are trained on for `training.prediction`, whatever they predicted before.
    """
    picture, training = manifest.picture, config.training
    widths = {"text_width": commons.text_width, "pooled_width": commons.pooled_width}
    origin: dict[str, str] = {}
    if config.start is None:
        name = config.recipe or recipes.default_recipe(picture)
        seed = seeds.key(manifest.seed, "base") & ((1 << 63) - 1)
        recipe = recipes.recipe_of(name)
        check_shapes(recipe.family, recipe.config, manifest.pictures)
        network = recipes.build(recipe, picture, **widths, seed=seed)
    else:
        start = load_start(config.start, picture, **widths, prediction=training.prediction)
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
        if start.declared not in (None, str(training.prediction)):
            log.info("%s predicted %s before", config.start, start.declared)
    card = Card(
        name="base",
        kind="base",
        shard=None,
        base_sha256=None,
        family=recipes.recipe_of(name).family,
        prediction=training.prediction,
        latent_space=commons.card.latent_space,
        images_seen=0,
    )
    return NewBase(name, Denoiser(network, card), origin)


def train_base(run: Storage, manifest: Manifest, config: BaseConfig) -> Artefact:
    """Train the base where it is not there yet; the same command resumes."""
    if manifest.base is not None:
        _check_unchanged(run, manifest, config)
        check_artefact(run, manifest.base)
        return manifest.base
    if config.training.lora.rank is not None:
        raise ConfigError(
            "A base has nothing that adapters could stand on: all of its weights are trained",
            cure="give training.lora to `atoll train`, for the experts",
        )
    group = Group()
    run = run.patient(leave=group.leave.is_set)  # SIGTERM within the training only sets that flag
    commons = open_pack(run, manifest.commons, BlockCache(config.cache_gib))
    base = new_base(manifest, commons, config)
    recipe = recipes.recipe_of(base.recipe)
    plan = plan_for(config.training, recipe, commons.card.records, base=True)
    save_config(config, run, WORK)
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
        bitwise_resume=config.bitwise_resume,
        group=group,
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


def train_here(
    storage: Storage,
    folder: str,
    denoiser: Denoiser,
    pack: Pack,
    training: DenoiserTraining,
    *,
    learning_rate: float,
    plan: Plan,
    seed: int,
    stream: str,
    threads: int,
    device: Device,
    bitwise_resume: bool = True,
    group: Group | None = None,
    parallel: Parallel = "ddp",
    milestones: Milestones | None = None,
) -> Denoiser:
    """Train a denoiser in this process, or in this and the others of a group.

    Checkpoints and metrics go to `folder`. What is returned is whole on every rank.
    """
    with computing(device, threads) as chosen:
        learner = learner_of(denoiser.network, group or Group(), parallel, chosen)
        prepare(denoiser, training, chosen)
        where: dict[str, Any] = {"seed": seed, "device": chosen}
        stride = plan.batch // training.accumulation
        steps: dict[str, Any] = {"batch": plan.batch, "stride": stride}
        batches = Batches(pack, training, rows=pack.train, stream=stream, **steps, **where)
        course = course_of(training, plan, learning_rate, bitwise_resume=bitwise_resume)
        told = _speeds(denoiser, pack, training, chosen, workers=learner.group.world)
        with ahead(batches, chosen, stride=stride) as coming:
            Loop(
                storage, folder, denoiser.network, course, name=stream, learner=learner, told=told
            ).run(
                flow_matching(denoiser, coming, training),
                held_out=_held_out(denoiser, pack, training, **where),
                milestones=milestones,
            )
        network = learner.whole().to("cpu")
    card = denoiser.card.model_copy(
        update={"images_seen": denoiser.card.images_seen + plan.images_seen}
    )
    return Denoiser(network, card)


def _held_out(
    denoiser: Denoiser, pack: Pack, training: DenoiserTraining, **where: Any
) -> Callable[[], float] | None:
    """The loss on records that no training uses; None where there are none."""
    if not pack.held_out:
        return None
    # In more batches where there are several shapes, so that each has its share of them.
    batch = HELD_OUT_BATCH if len(pack.buckets(pack.held_out)) == 1 else HELD_OUT_BATCH // 4
    where |= {"rows": pack.held_out, "batch": batch, "stream": "held-out"}
    batches = Batches(pack, training, **where)
    return held_out_loss(denoiser, batches, training, batch=batch)


def learner_of(
    module: nn.Module, group: Group, parallel: Parallel, device: torch.device
) -> Learner:
    """The learner of a network on this rank of a group; the network moves to the device."""
    # Imported where they are wanted: one process has no use for either.
    if group.world > 1 and parallel == "fsdp":
        from atoll.islands.shard import Shard

        return Shard(module, group, device)  # block by block: the whole may have no room there
    module.to(device)
    if group.world == 1:
        return Learner(module, group)
    from atoll.islands.replica import Replica

    return Replica(module, group)


def flops_per_image(
    family: str, config: Mapping[str, Any], pack: Pack, training: DenoiserTraining
) -> int:
    """Operations that training a network of this configuration needs for one image of a pack."""
    outline = recipes.outline_of(family, config)
    forward = recipes.forward_flops(outline, family, pack.card.picture, pack.null)
    return recipes.training_flops(forward, frozen=training.lora.rank is not None)


def _speeds(
    denoiser: Denoiser, pack: Pack, training: DenoiserTraining, device: torch.device, workers: int
) -> dict[str, float]:
    """What turns images per second into a share of the devices' own speed (MFU), for `status`.

    Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with a measured rate in the place of a
    data sheet's; workers are alike.
    """
    network: Any = denoiser.network
    dtype = torch.bfloat16 if training.precision == "bfloat16" else torch.float32
    return {
        "flops_per_image": flops_per_image(denoiser.card.family, network.config, pack, training),
        "matmul_flops_per_second": round(workers * matmul_rate(device, dtype)),
    }
