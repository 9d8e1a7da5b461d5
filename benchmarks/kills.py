"""An island's job under random SIGKILLs: what each kill cost, and whether the bits are the same.

    python -m benchmarks.kills [--quick] [--json]

Trains one island of the handwritten digits undisturbed, then again and again with kills at random
moments, one training on each core: while it starts, in its expert's training, in its gate head's,
and while it publishes. The rows of a stage say how many kills it took, how much the worst of them
lost, and whether every training that was killed there came to the bits of the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from atoll.cli.digits import write_digits
from atoll.core.embedding import FitConfig
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands.base import train_base
from atoll.islands.settings import (
    BaseConfig,
    DenoiserTraining,
    HeadTraining,
    TrainConfig,
    TrunkTraining,
    plan_beside,
)
from atoll.islands.supervise import plan_islands, write_order
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig
from benchmarks.rows import row, show

SHARD = "shard-00"
HERE = f"islands/{SHARD}"
RESULTS = ("expert", "gate_head", "preview.png", "metrics.jsonl")
TRAIN = TrainConfig(
    training=DenoiserTraining(passes=20, checkpoints=20),
    head=HeadTraining(images=8192, batch=16, bands=2, checkpoints=20),
    preview=4,
    preview_steps=2,
)


@dataclass
class Stage:
    """What happened to kills at one stage of a job."""

    lost: list[tuple[int, float]] = field(default_factory=list)  # steps, intervals between commits
    same: list[bool] = field(default_factory=list)  # bits, of the trainings that were killed there


def _made(folder: Path) -> Path:
    """A run of the digits with a base, and an order for one island."""
    place = Storage(folder)
    run = Storage(folder / "run")
    settings = PartitionConfig(shards=3, commons="0.25", holdout=0.15, fit=FitConfig(steps=20))
    manifest = partition(write_digits(place), run, settings)
    training = DenoiserTraining(passes=1, checkpoints=1)
    trunk = TrunkTraining(images=256, width=8)
    config = BaseConfig(recipe="unet-tiny", training=training, trunk=trunk)
    train_base(run, manifest, config)
    plan_islands(run, manifest, TRAIN)
    write_order(run, manifest, TRAIN, SHARD)
    return folder / "run"


def _start(run: Storage) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "atoll.islands.job", run.uri, SHARD],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _seen(run: Storage, folder: str) -> int:
    """The images that the last whole line of a training's metrics tells of."""
    name = f"{folder}/metrics.jsonl"
    lines = run.read_bytes(name).decode().splitlines() if run.exists(name) else []
    return int(json.loads(lines[-1])["images_seen"]) if lines else 0


def _committed(run: Storage, folder: str) -> int:
    commits = run.list(f"{folder}/commits")
    return int(commits[-1].rsplit("-", 1)[1].removesuffix(".json")) if commits else 0


def _stage(run: Storage) -> tuple[str, tuple[int, float]]:
    """Where a killed job was, and how many steps and intervals between commits it lost."""
    if not run.exists(f"{HERE}/commits"):
        return "starting", (0, 0.0)
    plan = Manifest.load(run).shard(SHARD).plan
    assert plan is not None
    for name, folder, part, course, checkpoints in (
        ("expert", HERE, "expert", plan, TRAIN.training.checkpoints),
        (
            "gate head",
            f"{HERE}/gate_head_training",
            "gate_head",
            plan_beside(TRAIN.head, plan),
            TRAIN.head.checkpoints,
        ),
    ):
        if not run.exists(f"{HERE}/{part}"):
            lost = max(0, _seen(run, folder) - _committed(run, folder))
            return name, (lost // course.batch, lost * checkpoints / course.images_seen)
    return "publishing", (0, 0.0)


def _digests(run: Storage) -> dict[str, str]:
    return {name: run.sha256(f"{HERE}/{name}") for name in RESULTS}


def kills(wanted: int, *, seed: int, at_once: int = 1) -> dict[str, Stage]:
    """So many kills, over as many trainings as it takes, `at_once` of them side by side."""
    stages: dict[str, Stage] = defaultdict(Stage)
    with tempfile.TemporaryDirectory() as scratch:
        made = _made(Path(scratch))
        straight = _copy(made, Path(scratch) / "straight")
        began = time.monotonic()
        if _start(straight).wait():
            raise SystemExit("the undisturbed training failed")
        seconds = time.monotonic() - began
        expected = _digests(straight)
        shares = [wanted // at_once + (lane < wanted % at_once) for lane in range(at_once)]

        def lane(number: int) -> None:
            draw, left, trainings = random.Random(f"{seed}-{number}"), shares[number], 0
            while left:
                trainings += 1
                run = _copy(made, Path(scratch) / f"killed-{number}-{trainings}")
                touched = _killed(run, draw, left, 0.8 * seconds, stages)
                left -= len(touched)
                same = _digests(run) == expected
                for stage in touched:
                    stages[stage].same.append(same)
                shutil.rmtree(run.local(""))

        with ThreadPoolExecutor(at_once) as lanes:
            list(lanes.map(lane, range(at_once)))
    return dict(stages)


def _killed(
    run: Storage, draw: random.Random, most: int, longest: float, stages: dict[str, Stage]
) -> list[str]:
    """Bring one job to its end under kills; at which stages they met it."""
    touched: list[str] = []
    while not run.exists(f"{HERE}/exit.json"):
        job = _start(run)
        # Some while it starts, most while it works, and not more than are wanted.
        alive = draw.uniform(0.2, longest) if len(touched) < most else 600.0
        try:
            job.wait(timeout=alive)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
            stage, lost = _stage(run)
            stages[stage].lost.append(lost)
            touched.append(stage)
    return touched


def _copy(made: Path, to: Path) -> Storage:
    shutil.copytree(made, to)
    return Storage(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="10 kills instead of 200")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    at_once = len(os.sched_getaffinity(0))
    for name, stage in kills(10 if given.quick else 200, seed=2026, at_once=at_once).items():
        steps, intervals = (max(lost[i] for lost in stage.lost) for i in (0, 1))
        # Two: the commit at the end of an interval may still be on its way to the disk.
        rows += [
            row(f"{name}: kills", len(stage.lost), "kills"),
            row(f"{name}: most that one lost", steps, "steps"),
            row(
                f"{name}: that is", intervals, "intervals", at_most=2, digits=2,
                against="as the last line of metrics has it, of a hundred in a training: up to a "
                "fifth of an interval more",
            ),
            row(
                f"{name}: bits equal", int(all(stage.same)), "",
                against="the undisturbed training", at_least=1,
            ),
        ]  # fmt: skip
    show("kills", rows, as_json=given.json)


if __name__ == "__main__":
    main()
