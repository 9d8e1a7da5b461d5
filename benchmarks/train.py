"""Training speed of an island's loop against a bare loop, and the usual one, of the same model.

    python -m benchmarks.train [--quick] [--only WHAT] [--profile] --json

The three take turns of a second or two in this process, so that what slows the machine slows all of
them alike. The island's loop is the real one: heartbeats, metrics, and a checkpoint every 30
seconds of its own. All is on one thread; rows that need a GPU say so where there is none. On the
CPU all takes about 20 minutes; a recipe for a GPU (`--only dit-xl`) less than ten.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from benchmarks import cpu, gpu
from benchmarks.rows import Row, row, show
from benchmarks.start import seconds_of_an_empty_job, seconds_to_first_step
from benchmarks.turns import Schedule

START_SECONDS = 15.0
FULL = Schedule(warm=50, turn=1.5, pair=20.0, pairs=7)
QUICK = Schedule(warm=6, turn=1.0, pair=3.0, pairs=3)


def on_cpu(name: str, *, quick: bool, profile: bool) -> list[Row]:
    """A small recipe on one thread."""
    case = cpu.case_of(name, cpu.PICTURES[name])
    return cpu.measure(case, QUICK if quick else FULL, profile=profile)


def on_gpu(name: str, *, quick: bool, profile: bool) -> list[Row]:
    """A large recipe, where there is a GPU."""
    if not torch.cuda.is_available():
        return gpu.absent(name, "no CUDA device")
    return gpu.measure(
        gpu.case_of(name), gpu.QUICK if quick else gpu.FULL,
        share=gpu.SHARES[name], ablate=name == gpu.ABLATED, profile=profile,
    )  # fmt: skip


def start(*, quick: bool) -> list[Row]:
    """How soon an island takes its first step, and how much of that is Ray's and the imports'."""
    pairs = [(seconds_to_first_step(), seconds_of_an_empty_job()) for _ in range(1 if quick else 3)]
    ours, least = ([pair[n] for pair in pairs] for n in (0, 1))
    return [
        row(
            "from `atoll train` to the first step, on a local head", median(ours), "s",
            against=f"starts: {', '.join(f'{seconds:.1f}' for seconds in ours)}",
            at_most=START_SECONDS, digits=2,
        ),
        row(
            "the start, ratio to an empty job", median(a / b for a, b in pairs), "ratio",
            against="in turns: the same head and a job that only imports torch and the network, "
            f"{median(least):.1f} s",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="under two minutes on a CPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true", help="and the ten longest kernels")
    parser.add_argument("--only", choices=["cpu", "gpu", "start", *cpu.PICTURES, *gpu.SHARES])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    how = {"quick": given.quick, "profile": given.profile}
    for name in cpu.PICTURES:
        if given.only in (None, "cpu", name):
            rows += on_cpu(name, **how)
    if given.only in (None, "cpu", "start"):
        rows += start(quick=given.quick)
    for name in gpu.SHARES:
        if given.only in (None, "gpu", name):
            rows += on_gpu(name, **how)
    show("train", rows, as_json=given.json)


if __name__ == "__main__":
    main()
