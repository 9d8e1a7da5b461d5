"""The per-shard gate against a joint one of the same cost, on held-out records of every shard.

    python -m benchmarks.gates CIFAR10.parquet EMOJI64.parquet [--quick] --json

Eight clusters of the first corpus, and the styles of the second as owners, one of them the commons.
Each is partitioned in a temporary folder; then the public trunk, a head for every shard, each on
its own records and the commons alone, and a joint classifier on the records of all shards are
trained by the islands' own loops and measured by the router's own instrument. The joint one is as
wide as makes a gate weight cost as many operations as the trunk once and all heads, and is trained
with as many operations. No expert is trained. In full about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from atoll.core import recipes
from atoll.core.head import GateHead, HeadConfig, new_head
from atoll.core.manifest import Manifest, Plan
from atoll.core.pack import Pack, join
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk, TrunkConfig, first_stride
from atoll.islands.island import head_course
from atoll.islands.loop import Loop
from atoll.islands.settings import HeadTraining, TrainConfig, TrunkTraining
from atoll.islands.train_head import anchor_of, calibrate, head_loss, label_shares
from atoll.islands.train_trunk import Task, by_label, task_of, train_classifier
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig
from atoll.router.calibrate import GateBand, GateCalibration, measure_gate
from atoll.router.gate import Gate, JointGate
from benchmarks.rows import Row, row, show

RATIO, ABSOLUTE = 1.10, 0.02  # of the joint gate's loss, and nats where that is more
ERROR = 0.02
SHARE = 0.05  # of an expert's step


@dataclass(frozen=True)
class Case:
    """A corpus, how it is partitioned, and how long each part is trained."""

    name: str
    partition: PartitionConfig
    trunk: TrunkTraining
    head: HeadTraining
    records: int  # held-out ones that are measured, at most


def cases(quick: bool) -> tuple[Case, Case]:
    """Clusters of photographs, and owners who draw; `quick` trains a tenth."""
    common = PartitionConfig(holdout=0.2, size=32)
    part = 10 if quick else 1
    clusters = Case(
        "cifar10 by clusters",
        common.model_copy(update={"shards": 8, "flips": True}),
        TrunkTraining(images=192_000 // part),
        HeadTraining(images=32_000 // part),
        10_000 // part,
    )
    owners = Case(
        "emoji64 by style",
        common.model_copy(update={"by": "style", "commons": "twemoji"}),
        TrunkTraining(images=64_000 // part),
        HeadTraining(images=19_200 // part),
        10_000 // part,
    )
    return clusters, owners


@dataclass(frozen=True)
class Gates:
    """Both gates of one case, operations of a gate weight, and what the instrument says."""

    per_shard: GateCalibration
    joint: GateCalibration
    flops: int
    joint_flops: int


def measure(corpus: str, case: Case, scratch: Path) -> list[Row]:
    """Train and measure both gates of one case."""
    run = Storage(scratch / "run")
    manifest = partition(corpus, run, case.partition)
    commons = Pack(run.local(manifest.commons.path))
    packs = {name: Pack(run.local(shard.path)) for name, shard in manifest.shards.items()}
    task = task_of(run, manifest, commons)
    config = TrunkConfig(
        channels=manifest.picture.channels,
        pooled=commons.pooled_width,
        stride=first_stride(manifest.picture),
        labels=task.counts,
    )
    trunk = _classifier(run, "trunk", config, commons, task, case.trunk, manifest)
    heads = {name: _head(run, trunk, pack, commons, case.head) for name, pack in packs.items()}
    records = {name: pack.card.records for name, pack in packs.items()}
    shared, own = recipes.gate_flops(config, manifest.picture, commons.null)
    flops = shared + len(heads) * own
    # What the trunk and all heads took: a head's images are of its shard and of the anchor.
    images, of_heads = case.trunk.images or 0, 2 * (case.head.images or 0) * len(heads)
    spent = 3 * (shared + own) * images + (shared + 3 * own) * of_heads
    joint, joint_flops = _joint(run, packs, commons, case, manifest, flops=flops, spent=spent)
    how = {"seed": manifest.seed, "count": case.records}
    gates = Gates(
        measure_gate(
            Gate(trunk, heads, records), packs,
            heads={name: head.config for name, head in heads.items()}, **how,
        ),
        measure_gate(JointGate(joint, records), packs, **how),
        flops,
        joint_flops,
    )  # fmt: skip
    return _rows(case.name, gates, manifest, commons)


def _classifier(
    run: Storage,
    name: str,
    config: TrunkConfig,
    pack: Pack,
    task: Task,
    training: TrunkTraining,
    manifest: Manifest,
) -> Trunk:
    plan = Plan(batch=training.batch, images_seen=_whole(training.images or 0, training.batch))
    return train_classifier(
        run, f"work/{name}", config, pack, task, training, plan,
        seed=manifest.seed, stream=name, threads=1, device="cpu",
    )  # fmt: skip


def _head(
    run: Storage, trunk: Trunk, pack: Pack, commons: Pack, training: HeadTraining
) -> GateHead:
    """A head as an island makes it."""
    name = pack.card.name
    head = new_head(
        HeadConfig(shard=name, trunk_sha256=""), trunk, label_shares(trunk, pack, training, seed=0)
    )
    anchor = anchor_of(commons, training.broad, held_out=False)
    loss = head_loss(head, trunk, pack, anchor, training, seed=0)
    course = head_course(TrainConfig(head=training), Plan(batch=1, images_seen=1), cost=0.0)
    Loop(run, f"work/{name}", head, replace(course, checkpoint_seconds=None), name=name).run(loss)
    return calibrate(head, trunk, pack, commons, training, seed=0)


def _joint(
    run: Storage,
    packs: dict[str, Pack],
    commons: Pack,
    case: Case,
    manifest: Manifest,
    *,
    flops: int,
    spent: float,
) -> tuple[Trunk, int]:
    """The joint classifier of the nearest cost, and what a gate weight of it costs."""
    every = join(list(packs.values()))
    sizes = torch.tensor([pack.card.records for pack in packs.values()])
    task = by_label(list(packs), torch.repeat_interleave(torch.arange(len(packs)), sizes), every)

    def made(width: int) -> tuple[TrunkConfig, int]:
        config = TrunkConfig(
            channels=manifest.picture.channels, pooled=commons.pooled_width, width=width,
            stride=first_stride(manifest.picture), labels=task.counts,
        )  # fmt: skip
        return config, sum(recipes.gate_flops(config, manifest.picture, commons.null))

    config, own = min((made(8 * n) for n in range(2, 12)), key=lambda pair: abs(pair[1] - flops))
    training = case.trunk.model_copy(update={"images": round(spent / (3 * own))})
    return _classifier(run, "joint", config, every, task, training, manifest), own


def _whole(images: int, batch: int) -> int:
    return max(1, images // batch) * batch


def _rows(name: str, gates: Gates, manifest: Manifest, commons: Pack) -> list[Row]:
    expert = recipes.outline(
        recipes.recipe_of("unet-nano"), manifest.picture, commons.text_width, commons.pooled_width
    )
    step = recipes.forward_flops(expert, "unet", manifest.picture, commons.null)
    rows = [
        row(
            f"{name}: trunk and heads", gates.flops / step, "of a step of unet-nano",
            against=f"{gates.flops / 1e6:.1f} MFLOP, joint {gates.joint_flops / 1e6:.1f}",
            at_most=SHARE,
        )
    ]  # fmt: skip
    asked = (("prompted", gates.per_shard.prompted, gates.joint.prompted),)
    asked += (("unprompted", gates.per_shard.unprompted, gates.joint.unprompted),)
    for how, ours, theirs in asked:
        for mine, other in zip(ours, theirs, strict=True):
            rows += _of_band(f"{name}, {how}, t = {mine.t:g}", mine, other)
    noted = gates.per_shard.warnings
    routing = gates.per_shard.recommended or ("none" if noted else "any")
    rows.append(row(f"{name}: warnings, routing {routing}", len(noted), "; ".join(noted)))
    return rows


def _of_band(name: str, mine: GateBand, other: GateBand) -> list[Row]:
    bar = max(RATIO * other.nll, other.nll + ABSOLUTE)
    told = f"joint {other.nll:.3f}, prior {mine.prior_nll:.3f}"
    theirs = f"joint {other.calibration_error:.3f}, by chance {mine.calibration_noise:.3f}"
    return [
        row(f"{name}: NLL", mine.nll, "nats", against=told, at_most=round(bar, 3)),
        row(f"{name}: accuracy", mine.accuracy, "", against=f"joint {other.accuracy:.3f}"),
        row(
            f"{name}: calibration error", mine.calibration_error, "",
            against=theirs, at_most=ERROR,
        ),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cifar10", help="cifar10.parquet")
    parser.add_argument("emoji64", nargs="?", help="emoji64.parquet")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training: no figures")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for corpus, case in zip((given.cifar10, given.emoji64), cases(given.quick), strict=True):
        if corpus is not None:
            with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
                rows += measure(corpus, case, Path(scratch))
    show("gates", rows, as_json=given.json)


if __name__ == "__main__":
    main()
