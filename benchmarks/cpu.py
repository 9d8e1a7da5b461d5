"""On one thread: the loop against its peers, and how fast a pack is read."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from atoll.core.cache import BlockCache
from atoll.core.digest import sha256_folder
from atoll.core.manifest import Artefact, Picture
from atoll.core.pack import Pack, open_pack
from atoll.core.recipes import recipe_of
from atoll.core.storage import Storage
from atoll.islands.settings import DenoiserTraining
from benchmarks.profiling import kernels
from benchmarks.rows import Row, row
from benchmarks.speeds import CLOCK_SECONDS, compare
from benchmarks.trainings import Case, make_pack
from benchmarks.turns import Schedule

READING = 5.0
THROUGH_CACHE = 0.8
PICTURES = {
    "unet-digits": Picture(channels=1, height=8, width=8),
    "unet-nano": Picture(channels=3, height=32, width=32),
}


def case_of(name: str, picture: Picture) -> Case:
    """A recipe on this machine's processor, with checkpoints by the clock alone."""
    config = DenoiserTraining(checkpoints=1, checkpoint_seconds=CLOCK_SECONDS)
    return Case(name, picture, recipe_of(name).batch, config, torch.device("cpu"))


def measure(
    case: Case, schedule: Schedule, *, reading: float = 1.0, profile: bool = False
) -> list[Row]:
    """Rows for one recipe; each way of reading is timed for `reading` seconds at once."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pack = make_pack(scratch / "pack", case)
        times, rows = compare(case, pack, scratch, schedule)
        far = _far(scratch / "pack")
        turns = [
            (_reading(case, pack, reading), _reading(case, far, reading))
            for _ in range(schedule.pairs)
        ]
        top = kernels(case, pack) if profile else []
    near = statistics.median(near for near, _ in turns)
    through = statistics.median(cached / near for near, cached in turns)
    rate = times.rate("ours") * case.batch
    return [
        *rows,
        row(
            f"{case.name} pack reading", near / rate, "ratio",
            against="the training that it feeds", at_least=READING,
        ),
        row(
            f"{case.name} reading through the cache", through, "ratio",
            against="the same pack on this disk", at_least=THROUGH_CACHE,
        ),
        *top,
    ]  # fmt: skip


def _far(folder: Path) -> Pack:
    """The same pack on a store, whose rows come through the cache."""
    store = Storage("memory://bench")
    store.publish(folder, "pack")
    made = Artefact(path="pack", sha256=sha256_folder(folder))
    return open_pack(store, made, BlockCache(1))


def _reading(case: Case, pack: Pack, seconds: float) -> float:
    """Noised images per second that one core makes ready."""
    batches = case.batches(pack)
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        batches(done, case.batch)
        done += case.batch
    return done / (time.perf_counter() - started)
