"""The gate's trunk, trained on the commons alone: which label has a noised record?

The labels are the commons' own: what a record shows, by its nearest centroid. Shards that are
owners may also differ in how their pictures are drawn, so their trunk is asked besides which of
several seeded filters a picture went through. A `joint` gate is trained by the same loss, with the
records of all shards and shards for labels (Decentralized Diffusion Models, arXiv 2501.05450,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from atoll.core import flow, recipes, seeds
from atoll.core.errors import Refused
from atoll.core.ledger import Ledger
from atoll.core.manifest import CLUSTERS, Artefact, Manifest, Plan, check_artefact
from atoll.core.pack import LABELS_NAME, Pack
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk, TrunkConfig, first_stride, new_trunk
from atoll.islands.compute import Device, computing
from atoll.islands.course import Course
from atoll.islands.data import drop, rows_at
from atoll.islands.group import Group
from atoll.islands.learner import Learner
from atoll.islands.loop import Loop
from atoll.islands.settings import BaseConfig, GuardConfig, TrunkTraining, plan_beside
from atoll.islands.step import Errors, Loss

FOLDER = "trunk"
WORK = "trunk-training"
_FILTERS = 16
_STRENGTH = 0.3  # deviation of a filter's entries from those that change nothing


@dataclass(frozen=True)
class Task:
    """What a classifier is to tell apart: names and records of the labels, and who has which.

    `labelled` takes the positions of a stream, the rows there and their x_data, and gives x_data,
    changed or not, with the number of each one's label `(batch,)`.
    """

    counts: dict[str, int]
    labelled: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def by_label(names: list[str], labels: Tensor, pack: Pack) -> Task:
    """Labels that records have, `(row,)`; those of no training record are left out."""
    counts = torch.bincount(labels[list(pack.train)], minlength=len(names)).tolist()
    kept = [number for number, count in enumerate(counts) if count]
    place = torch.full((len(names),), -1)
    place[kept] = torch.arange(len(kept))
    numbers = place[labels]

    def labelled(_first: int, rows: Tensor, x_data: Tensor) -> tuple[Tensor, Tensor]:
        return x_data, numbers[rows % len(numbers)]  # mirrored rows come after all others

    return Task({names[number]: counts[number] for number in kept}, labelled)


def by_filter(contents: Task, seed: int, channels: int) -> Task:
    """Every content through seeded filters of 3x3 that mix channels; half go through none."""
    generator = seeds.generator(seed, "trunk", "filters")

    def drawn(*shape: int) -> Tensor:
        return _STRENGTH * torch.randn(_FILTERS, *shape, generator=generator)

    mixing = torch.eye(channels) + drawn(channels, channels)
    kernel = drawn(3, 3) / 2
    kernel[:, 1, 1] += 1
    level = drawn(channels)
    mixing[0], kernel[0], level[0] = torch.eye(channels), 0.0, 0.0
    kernel[0, 1, 1] = 1.0
    weights = mixing[:, :, :, None, None] * kernel[:, None, None]

    def labelled(first: int, rows: Tensor, x_data: Tensor) -> tuple[Tensor, Tensor]:
        x_data, content = contents.labelled(first, rows, x_data)
        batch, _, height, width = x_data.shape
        uniform = seeds.uniform(seed, "trunk", "filter", first=first, count=batch)[:, 0]
        drawn = (uniform * 2 * _FILTERS).long().clamp(max=2 * _FILTERS - 1)
        label = (drawn - _FILTERS).clamp(min=0)
        padded = functional.pad(x_data, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[None]
        found = functional.conv2d(padded, weights[label].flatten(0, 1), groups=batch)
        found = found.reshape(batch, channels, height, width) + level[label][:, :, None, None]
        found = torch.where((label == 0)[:, None, None, None], x_data, found)
        return found, content * _FILTERS + label

    counts = {
        f"{content}/filter-{number:02d}": records * (1 if number else _FILTERS + 1)
        for content, records in contents.counts.items()
        for number in range(_FILTERS)
    }
    return Task(counts, labelled)


def label_loss(
    trunk: Trunk, pack: Pack, task: Task, config: TrunkTraining, *, seed: int, stream: str
) -> Loss:
    """Cross-entropy of the label at every t, and of the label from text alone."""
    device = next(trunk.parameters()).device

    def loss(first: int, count: int) -> Errors:
        where = {"first": first, "count": count}
        rows = rows_at(pack, pack.train, seed, stream, "order", **where, batch=config.batch)
        x_data, label = task.labelled(first, rows, pack.x_data(rows))
        t = seeds.uniform(seed, stream, "time", **where)[:, 0].float()
        x_noise = seeds.normal(seed, stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
        x_t = flow.interpolate(x_data, x_noise, t).to(device)
        cond = pack.cond(rows)
        uniform = seeds.uniform(seed, stream, "dropout", **where)
        dropped = drop(cond, pack.null, uniform, config.condition_dropout)
        logits = trunk.logits(x_t, t.to(x_t), dropped.to(x_t))
        label = label.to(device)
        each = functional.cross_entropy(logits, label, reduction="none")
        text = functional.cross_entropy(trunk.text_logits(cond.to(x_t)), label)
        return Errors(each.mean() + text, each.detach(), t.to(device))

    return loss


def train_trunk(
    run: Storage, manifest: Manifest, commons: Pack, task: Task, config: BaseConfig, base: Plan
) -> Artefact:
    """Train the trunk where it is not there yet; the same command resumes.

    Beside a base of this plan, whose recipe is the manifest's.
    """
    made = TrunkConfig(
        channels=manifest.picture.channels,
        pooled=commons.pooled_width,
        width=config.trunk.width,
        stride=first_stride(manifest.picture),
        labels=task.counts,
    )
    recipe = recipes.recipe_of(str(manifest.recipe))
    cost = recipes.gate_cost(made, recipe, manifest.picture, commons.null)
    trunk = train_classifier(
        run, WORK, made, commons, task, config.trunk, plan_beside(config.trunk, base, cost=cost),
        seed=manifest.seed, stream="trunk", threads=config.threads, device=config.device,
        bitwise_resume=config.bitwise_resume,
    )  # fmt: skip
    run.write_folder(FOLDER, trunk.save)
    sha256 = run.sha256(FOLDER)
    manifest.trunk = Artefact(path=FOLDER, sha256=sha256)
    ledger = Ledger(run)
    parents = [e for kind in ("encoder", "commons") if (e := ledger.latest(kind, kind)) is not None]
    ledger.append("trunk", "trunk", sha256, parents=parents)
    manifest.save(run)
    return manifest.trunk


def load_trunk(run: Storage, artefact: Artefact) -> Trunk:
    """The manifest's trunk; `Refused` where it is another, or of another version."""
    check_artefact(run, artefact)
    return Trunk.load(run.local(artefact.path))


def train_classifier(
    run: Storage,
    folder: str,
    made: TrunkConfig,
    pack: Pack,
    task: Task,
    config: TrunkTraining,
    plan: Plan,
    *,
    seed: int,
    stream: str,
    threads: int,
    device: Device,
    bitwise_resume: bool = True,
) -> Trunk:
    """Train a trunk's network in this process; checkpoints and metrics go to `folder`."""
    course = Course(
        plan=plan,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        warmup=0.03,
        clip=1.0,
        ema_decays=(0.99,),
        checkpoints=config.checkpoints,
        guard=GuardConfig(spike=None),  # as of a gate head
        loss=config.model_dump(mode="json", include={"condition_dropout"}),
        origin=made.model_dump(mode="json"),
        bitwise_resume=bitwise_resume,
    )
    trunk = new_trunk(made, seed=seed)
    with computing(device, threads) as chosen:
        loss = label_loss(trunk.to(chosen), pack, task, config, seed=seed, stream=stream)
        Loop(run, folder, trunk, course, name=stream, learner=Learner(trunk, Group())).run(loss)
    return trunk.to("cpu").eval().requires_grad_(False)


def task_of(run: Storage, manifest: Manifest, commons: Pack) -> Task:
    """What the commons' own trunk is to tell apart."""
    if LABELS_NAME not in commons.card.files:
        raise Refused(
            f"{manifest.commons.path} has no {LABELS_NAME}, which the gate's trunk is taught by: "
            "an earlier version partitioned it",
            cure="partition the corpus anew, into another folder",
        )
    labels = load(run.read_bytes(f"{manifest.commons.path}/{LABELS_NAME}"))["label"].long()
    names = [f"content-{number:02d}" for number in range(int(labels.max()) + 1)]
    contents = by_label(names, labels, commons)
    if manifest.partition.by == CLUSTERS:  # shards differ as contents do
        return contents
    return by_filter(contents, manifest.seed, manifest.picture.channels)
