"""One island: one shard and the commons in, an expert and a gate head out.

Reads `islands/SHARD/island.json`, the only thing it is told, through a handle scoped to its shard,
the commons, the base and the trunk; writes below `islands/SHARD` alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atoll.core import recipes
from atoll.core.cache import BlockCache
from atoll.core.config import Config
from atoll.core.denoiser import CARD_NAME, NETWORK_CONFIG, Card, Denoiser, read_card
from atoll.core.errors import Refused
from atoll.core.head import CONFIG_NAME, GateHead, HeadConfig, new_head
from atoll.core.journal import log
from atoll.core.latents import load_autoencoder
from atoll.core.manifest import Artefact, Plan, check_artefact, check_schema
from atoll.core.pack import Pack, open_pack
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk
from atoll.islands.compute import chosen_device, computing
from atoll.islands.course import Course
from atoll.islands.group import Group
from atoll.islands.learner import Learner
from atoll.islands.loop import Loop, Milestones
from atoll.islands.lora import FILE_NAME, attach
from atoll.islands.preview import grid_files, milestones, preview_grid
from atoll.islands.settings import GuardConfig, TrainConfig, plan_beside
from atoll.islands.signs import HEAD_TRAINING, Claim, island_folder, sigterm, submission
from atoll.islands.spot import heeding
from atoll.islands.train_denoiser import flops_per_image, train_here
from atoll.islands.train_head import anchor_of, calibrate, head_loss, label_shares
from atoll.islands.train_trunk import load_trunk

SCHEMA_VERSION = 1  # of `island.json`
# What an island publishes, and the file whose presence says that all of it is there.
PARTS = {"expert": CARD_NAME, "gate_head": CONFIG_NAME}


class IslandOrder(Config):
    """`island.json`: all that an island is told. It names one shard and nothing of the others."""

    schema_version: int = SCHEMA_VERSION
    shard: Artefact
    name: str
    commons: Artefact
    base: Artefact
    trunk: Artefact
    vae: Artefact | None = None  # what decodes previews; None: training tensors are pixels
    recipe: str
    plan: Plan
    seed: int
    config: TrainConfig


def run_island(
    run_uri: str,
    shard: str,
    *,
    enter: Callable[[str], None] = lambda _stage: None,
    group: Group | None = None,
) -> None:
    """Train what is not there yet, in this process; `enter` is told of each stage.

    Of a group every rank does this. The expert is trained by all, and what is light beside it, its
    head and its preview, by the first rank alone: bitwise as one process would.
    """
    group = group or Group()
    here = island_folder(shard)
    # SIGTERM within a training sets a flag, and must end a wait for storage too.
    whole = Storage(run_uri).patient(leave=group.leave.is_set)
    values = whole.read_json(f"{here}/island.json")
    check_schema(values, SCHEMA_VERSION, f"{run_uri}/{here}/island.json")
    order = IslandOrder.model_validate(values)
    told = [
        part for part in (order.shard, order.commons, order.base, order.trunk, order.vae) if part
    ]
    run = whole.scoped(read=[part.path for part in told], write=[here])
    claim = Claim(run, shard)
    if group.leads:
        _begin(run, here)
    torch.set_num_threads(order.config.threads)
    check_artefact(run, order.base)
    cache = BlockCache(order.config.cache_gib)
    pack, commons = (open_pack(run, part, cache) for part in (order.shard, order.commons))
    if pack.card.encoder != commons.card.encoder:
        raise Refused("The shard's captions were embedded by another encoder than the commons'")
    if pack.card.latent_space != commons.card.latent_space:
        raise Refused("The shard's pictures are in another latent space than the commons'")
    leave = sigterm if group.world == 1 else group.leave.set
    with heeding(order.config.spot, leave=leave):
        enter("expert")
        if not group.gather(_is_there(run, here, "expert"))[0]:
            save = _expert(run, order, pack, group)
            if group.leads:
                run.write_folder(f"{here}/expert", save, check=claim.check)
        if not group.leads:
            return
        enter("gate_head")
        if not _is_there(run, here, "gate_head"):
            head = _head(run, order, pack, commons, group.alone())
            run.write_folder(f"{here}/gate_head", head.save, check=claim.check)
    if order.config.preview > 0:
        enter("preview")
        expert = Denoiser.load(run.local(f"{here}/expert"))
        with computing(order.config.device, order.config.threads) as device:
            expert.network.to(device)
            decode = _decoder(run, order, pack)
            grid = preview_grid(expert, pack, order.config, seed=order.seed, decode=decode)
        for name, data in grid_files(order.plan.images_seen, grid).items():
            run.write_bytes(f"{here}/{name}", data, check=claim.check)


def _begin(run: Storage, here: str) -> None:
    """Forget how the last attempt ended, and write down that there is another."""
    run.remove(f"{here}/exit.json")
    started = {
        "event": "started",
        "process": os.getpid(),
        "submission_id": submission(),
        "unix_seconds": round(time.time(), 3),
    }
    run.append_line(f"{here}/journal.jsonl", json.dumps(started))


def _decoder(run: Storage, order: IslandOrder, pack: Pack) -> Callable[[Tensor], Tensor] | None:
    """What makes pictures of x_data; None where x_data are pictures."""
    if order.vae is None:
        return None
    check_artefact(run, order.vae)
    place = run.local(order.vae.path)
    autoencoder = load_autoencoder(place, latent_space=pack.card.latent_space)
    autoencoder.network.to(chosen_device(order.config.device))
    return autoencoder.decode


def _is_there(run: Storage, here: str, part: str) -> bool:
    """Whether an earlier generation published the whole of a part."""
    return run.exists(f"{here}/{part}/{PARTS[part]}")


def _expert(run: Storage, order: IslandOrder, pack: Pack, group: Group) -> Callable[[Path], None]:
    """Train the expert; what writes it into a folder, as often as need be."""
    base = Denoiser.load(run.local(order.base.path))
    card = Card(
        name=order.name,
        kind="expert",
        shard=order.name,
        base_sha256=order.base.sha256,
        family=base.card.family,
        prediction=base.card.prediction,
        schedule=base.card.schedule,
        latent_space=base.card.latent_space,
        images_seen=base.card.images_seen,
    )
    training = order.config.training
    adapters = attach(base.network, training.lora, seed=order.seed)
    expert = Denoiser(base.network, card)
    trained = train_here(
        run,
        island_folder(order.name),
        expert,
        pack,
        training,
        learning_rate=recipes.recipe_of(order.recipe).learning_rate,
        plan=order.plan,
        seed=order.seed,
        stream=f"expert-{order.name}",
        threads=order.config.threads,
        device=order.config.device,
        origin={"base_sha256": order.base.sha256},
        bitwise_resume=order.config.bitwise_resume,
        group=group,
        parallel=order.config.parallel,
        milestones=_previews(run, order, expert, pack) if order.config.preview > 0 else None,
    )

    if adapters is None:
        return trained.save
    file = adapters.file(trained.network, trained.card.family)
    adapters.merge(trained.network)

    def save(folder: Path) -> None:
        trained.save(folder)
        (folder / FILE_NAME).write_bytes(file)

    return save


def _previews(run: Storage, order: IslandOrder, expert: Denoiser, pack: Pack) -> Milestones:
    """Grids on the way; that of the end is made of the expert as it is published."""
    config, seed, decode = order.config, order.seed, _decoder(run, order, pack)

    def make(seen: int) -> dict[str, bytes]:
        # The shapes of a grid are not the training's, and not worth a compilation.
        compiled = config.training.compile
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return grid_files(seen, preview_grid(expert, pack, config, seed=seed, decode=decode))

    return Milestones(milestones(config, order.plan)[:-1], make)


def _head(run: Storage, order: IslandOrder, pack: Pack, commons: Pack, group: Group) -> GateHead:
    settings = order.config.head
    trunk = load_trunk(run, order.trunk)
    config = HeadConfig(shard=order.name, trunk_sha256=order.trunk.sha256)
    place = f"{island_folder(order.name)}/{HEAD_TRAINING}"
    course = head_course(order.config, order.plan, cost=_head_cost(run, order, trunk, pack))
    course = replace(course, origin={"trunk_sha256": order.trunk.sha256})
    with computing(order.config.device, order.config.threads) as device:
        shares = label_shares(trunk, pack, settings, seed=order.seed)
        head = new_head(config, trunk, shares).to(device)
        anchor = anchor_of(commons, settings.broad, held_out=False)
        loss = head_loss(head, trunk.to(device), pack, anchor, settings, seed=order.seed)
        learner = Learner(head, group)
        Loop(run, place, head, course, name=f"gate head of {order.name}", learner=learner).run(loss)
    made = calibrate(head.to("cpu"), trunk.to("cpu"), pack, commons, settings, seed=order.seed)
    for said in made.config.calibration.warnings():
        log.warning("The gate head of %s: its shard %s", order.name, said)
    return made


def _head_cost(run: Storage, order: IslandOrder, trunk: Trunk, pack: Pack) -> float:
    """What an image costs the head, in units of what one costs the expert."""
    base = run.local(order.base.path)
    network = json.loads((base / NETWORK_CONFIG).read_text())
    expert = flops_per_image(read_card(base).family, network, pack, order.config.training)
    shared, own = recipes.gate_flops(trunk.config, pack.card.picture, pack.null)
    return 2 * (shared + recipes.training_flops(own)) / expert  # of the shard, and of the anchor


def head_course(config: TrainConfig, expert: Plan, *, cost: float) -> Course:
    settings = config.head
    return Course(
        plan=plan_beside(settings, expert, cost=cost),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.99),
        warmup=0.03,
        clip=1.0,
        ema_decays=(0.99,),
        checkpoints=settings.checkpoints,
        checkpoint_seconds=config.training.checkpoint_seconds,
        # A classifier that is nearly always right has gradients of nearly nothing, beside which
        # those of its next mistake are a spike; clipping is enough.
        guard=GuardConfig(spike=None),
        loss=settings.model_dump(mode="json", include={"broad", "condition_dropout"}),
        bitwise_resume=config.bitwise_resume,
    )
