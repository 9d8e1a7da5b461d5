"""The island's loop beside its peers: rows of speeds and ratios."""

from __future__ import annotations

from pathlib import Path

from atoll.core.pack import Pack
from atoll.core.storage import Storage
from benchmarks.rows import Row, row
from benchmarks.trainings import FOLDER, Case, bare, ours, usual
from benchmarks.turns import Schedule, Times, interleave

BARE = 0.98
USUAL = {"cpu": 0.98, "cuda": 1.3}  # on a processor both are bound by the same kernels
CHECKPOINT_SECONDS = 30.0
# The clock that a checkpoint waits for goes on in the turns of the two peers.
CLOCK_SECONDS = 3 * CHECKPOINT_SECONDS


def compare(case: Case, pack: Pack, scratch: Path, schedule: Schedule) -> tuple[Times, list[Row]]:
    """Times of the loop, bare and usual in turns, and the rows about them."""
    run = Storage(scratch / f"run-{case.name}")
    commits: set[str] = set()
    times = interleave(
        lambda steps, before: ours(case, pack, run, steps, before),
        {"bare": bare(case, pack), "usual": usual(case, pack)},
        schedule,
        wait=case.wait,
        between=lambda: commits.update(run.list(f"{FOLDER}/commits")),
    )
    seen = (int(name.rsplit("-", 1)[1].removesuffix(".json")) for name in commits)
    timed = sum(each > schedule.warm * case.batch for each in seen)
    precision = "bf16" if case.low else "no"

    def ratio(peer: str, bar: float, what: str) -> Row:
        pairs = [f"{each:.3f}" for each in times.ratios("ours", peer)]
        return row(
            f"{case.name} ratio to {peer}", times.ratio("ours", peer), "ratio",
            against=f"{what}; median of {len(pairs)} pairs: {', '.join(pairs)}", at_least=bar,
        )  # fmt: skip

    rows = [
        row(f"{case.name} island loop", times.rate("ours") * case.batch, "images/s", digits=1),
        ratio("bare", BARE, "a bare loop in turns"),
        ratio(
            "usual", USUAL[case.device.type],
            f"the usual loop in turns, accelerate with mixed_precision={precision!r}",
        ),
        row(
            f"{case.name} checkpoints in the timed part", timed, "checkpoints",
            against=f"{times.seconds('ours'):.0f} s of the loop's own, after {schedule.warm} "
            f"steps; one is due every {CHECKPOINT_SECONDS:.0f} s of these",
        ),
    ]  # fmt: skip
    if case.device.type == "cpu":
        rows.append(
            row(
                f"{case.name} ratio to bare in work", times.work_ratio("ours", "bare"), "ratio",
                against="processor seconds of all threads, storage's and heartbeats' among them",
            )
        )  # fmt: skip
    return times, rows
