"""Training a denoiser in this process, as the base and an expert are trained.

Also the control that a claim is held against: the same loop, on any pack, from any start, outside
the run's lineage. Checkpoints and metrics go below the folder that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from atoll.core import recipes
from atoll.core.denoiser import Denoiser
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.compute import Device, computing, matmul_rate
from atoll.islands.course import Course
from atoll.islands.data import Batches, ahead
from atoll.islands.group import Group
from atoll.islands.learner import Learner, Parallel
from atoll.islands.loop import Loop, Milestones
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import HELD_OUT_BATCH, flow_matching, held_out_loss, prepare

# What decides the bits of a loss, besides the data and the plan.
_OF_THE_LOSS = {
    "condition_dropout",
    "schedule",
    "time",
    "weight",
    "precision",
    "gradient_checkpointing",
    "compile",
}


def course_of(
    training: DenoiserTraining,
    plan: Plan,
    learning_rate: float,
    *,
    origin: Mapping[str, Any] | None = None,
    bitwise_resume: bool = True,
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
        loss={
            **training.model_dump(mode="json", include=_OF_THE_LOSS),
            "prediction": training.objective.value,
        },
        origin=origin or {},
        bitwise_resume=bitwise_resume,
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
    origin: Mapping[str, Any] | None = None,
    bitwise_resume: bool = True,
    group: Group | None = None,
    parallel: Parallel = "ddp",
    milestones: Milestones | None = None,
    begun: Callable[[], None] = lambda: None,
) -> Denoiser:
    """Train a denoiser in this process, or in this and the others of a group.

    Its card decides what it learns to predict and on which path. Checkpoints and metrics go to
    `folder`; those of another `origin` are not gone on from, and `begun` is called once that is
    known. What is returned is whole on every rank.
    """
    training = training.of(denoiser.card)
    with computing(device, threads) as chosen:
        learner = learner_of(denoiser.network, group or Group(), parallel, chosen)
        prepare(denoiser, training, chosen)
        stride = plan.batch // training.accumulation
        batches = Batches(
            pack,
            training,
            rows=pack.train,
            seed=seed,
            stream=stream,
            device=chosen,
            batch=plan.batch,
            stride=stride,
        )
        course = course_of(
            training, plan, learning_rate, origin=origin, bitwise_resume=bitwise_resume
        )
        told = _speeds(denoiser, pack, training, chosen, workers=learner.group.world)
        with ahead(batches, chosen, stride=stride) as coming:
            Loop(
                storage, folder, denoiser.network, course, name=stream, learner=learner, told=told
            ).run(
                flow_matching(denoiser, coming, training),
                held_out=_held_out(denoiser, pack, training, seed=seed, device=chosen),
                milestones=milestones,
                begun=begun,
            )
        network = learner.whole().to("cpu")
    card = denoiser.card.model_copy(
        update={"images_seen": denoiser.card.images_seen + plan.images_seen}
    )
    return Denoiser(network, card)


def _held_out(
    denoiser: Denoiser, pack: Pack, training: DenoiserTraining, *, seed: int, device: torch.device
) -> Callable[[], float] | None:
    """The loss on records that no training uses; None where there are none."""
    if not pack.held_out:
        return None
    # In more batches where there are several shapes, so that each has its share of them.
    batch = HELD_OUT_BATCH if len(pack.buckets(pack.held_out)) == 1 else HELD_OUT_BATCH // 4
    batches = Batches(
        pack, training, rows=pack.held_out, seed=seed, stream="held-out", device=device, batch=batch
    )
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
