"""On a GPU: share of its own speed, the loop against its peers, each feature's part, and memory."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import torch

from atoll.core import recipes
from atoll.core.denoiser import Denoiser
from atoll.core.manifest import Picture
from atoll.core.pack import Pack
from atoll.islands.compute import Device, chosen_device, computing, matmul_rate
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import prepare
from benchmarks.profiling import kernels
from benchmarks.rows import Row, row, unmeasured
from benchmarks.speeds import BARE, CLOCK_SECONDS, USUAL, compare
from benchmarks.steps import ABLATIONS, Features, stepping
from benchmarks.trainings import Case, make_pack
from benchmarks.turns import Schedule, alternate

# Share of the bf16 matrix-product rate of the same GPU that training reaches.
SHARES = {"dit-xl": 0.45, "uvit-600m": 0.40}
ABLATED = "dit-xl"  # the one whose features are switched off

LATENT = Picture(channels=4, height=32, width=32)  # 256 tokens of 2x2
BATCH = 64

FULL = Schedule(warm=50, turn=2.0, pair=6.0, pairs=7)
QUICK = Schedule(warm=10, turn=1.0, pair=2.0, pairs=3)
OF_FEATURES = Schedule(warm=6, turn=1.0, pair=1.0, pairs=3)


def case_of(name: str) -> Case:
    """A large recipe as an island on a GPU trains it: compiled, in bf16, on latents and text."""
    config = DenoiserTraining(
        checkpoints=1, checkpoint_seconds=CLOCK_SECONDS, precision="bfloat16", compile=True
    )
    return Case(name, LATENT, BATCH, config, chosen_device("cuda"), tokens=(77, 768))


def absent(name: str, why: str) -> list[Row]:
    """The rows that a GPU would have filled."""
    rows = [
        row(f"{name} share of the matrix-product rate", None, "ratio", at_least=SHARES[name]),
        row(f"{name} ratio to bare", None, "ratio", at_least=BARE),
        row(f"{name} ratio to usual", None, "ratio", at_least=USUAL["cuda"]),
        row(f"{name} peak memory", None, "GiB"),
    ]
    if name == ABLATED:
        rows += [row(f"{name} with {feature}", None, "ratio") for feature in ABLATIONS]
    return [unmeasured(each, why) for each in rows]


def measure(
    case: Case, schedule: Schedule, *, share: float, ablate: bool, profile: bool = False
) -> list[Row]:
    """All rows of one recipe; `share` is the least of the matrix-product rate.

    On a CPU the same is done, but for the peak of memory, which only a GPU's allocator tells.
    """
    kind: Device = "cuda" if case.device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder, computing(kind, torch.get_num_threads()):
        scratch = Path(folder)
        pack = make_pack(scratch / "pack", case)
        rows = memory(case, pack)
        with _freed():
            times, speeds = compare(case, pack, scratch, schedule)
        speed = times.rate("ours") * case.batch
        rows = [*speeds, _share(case, pack, speed, share), *rows]
        if ablate:
            with _freed():
                rows += ablations(case, pack, OF_FEATURES)
        if profile:
            with _freed():
                rows += kernels(case, pack)
    return rows


@contextmanager
def _freed() -> Iterator[None]:
    """What is trained inside leaves no weights and no compiled code behind."""
    try:
        yield
    finally:
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _share(case: Case, pack: Pack, speed: float, bar: float) -> Row:
    dtype = torch.bfloat16 if case.low else torch.float32
    forward = recipes.forward_flops(
        recipes.outline(case.recipe, case.picture, case.tokens[1]),
        case.recipe.family, case.picture, pack.null,
    )  # fmt: skip
    case.deterministic(False)
    each, rate = recipes.training_flops(forward), matmul_rate(case.device, dtype)
    return row(
        f"{case.name} share of the matrix-product rate", speed * each / rate, "ratio",
        against=f"{rate / 1e12:.1f} TFLOP/s of {str(dtype).removeprefix('torch.')}, measured here; "
        f"{each / 1e9:.1f} GFLOP an image, three times those of a forward pass",
        at_least=bar, digits=6,
    )  # fmt: skip


def memory(case: Case, pack: Pack) -> list[Row]:
    """Peaks of memory, as it stands and compiled, beside what an outline foretells."""
    outline = recipes.outline(case.recipe, case.picture, case.tokens[1])
    held = recipes.training_bytes(recipes.parameter_count(outline))
    saved = recipes.saved_bytes(
        case.recipe, case.picture, pack.null, batch=case.batch,
        precision=torch.bfloat16 if case.low else torch.float32,
    )  # fmt: skip
    foretold = f"{held / 2**30:.2f} GiB held and {saved / 2**30:.2f} saved for the backward pass"
    rows = []
    for name, features in (("", Features()), (", not compiled", Features(compiled=False))):
        made = row(f"{case.name} peak memory{name}", None, "GiB")
        if case.device.type != "cuda":
            rows.append(unmeasured(made, f"no CUDA device; foretold: {foretold}"))
            continue
        with _freed():
            peak = _peak(case, pack, features)
        against = f"{foretold}: {peak / (held + saved):.0%} of that"
        rows.append(row(made["name"], peak / 2**30, "GiB", against=against, digits=2))
    return rows


def _peak(case: Case, pack: Pack, features: Features) -> int:
    """Most bytes that tensors took at once over a few steps."""
    before = torch.cuda.memory_allocated(case.device)
    steps = stepping(case, pack, _placed(case), features)
    next(steps)
    next(steps)  # the optimiser has its moments from here on
    torch.cuda.reset_peak_memory_stats(case.device)
    for _ in islice(steps, 3):
        pass
    steps.close()
    return torch.cuda.max_memory_allocated(case.device) - before


def ablations(case: Case, pack: Pack, schedule: Schedule) -> list[Row]:
    """How much faster the step is with each feature than with all the others alone."""
    denoiser, rows = _placed(case), []
    for name, features in ABLATIONS.items():
        with (
            closing(stepping(case, pack, denoiser, Features())) as everything,
            closing(stepping(case, pack, denoiser, features)) as without,
        ):
            times = alternate({"all": everything, "without": without}, schedule, case.wait)
        gc.collect()
        rows.append(
            row(
                f"{case.name} with {name}", times.ratio("all", "without"), "ratio",
                against=f"the same step without it, {schedule.pairs} pairs in turns",
            )
        )  # fmt: skip
    return rows


def _placed(case: Case) -> Denoiser:
    denoiser = case.denoiser()
    prepare(denoiser, case.training, case.device)
    return denoiser
