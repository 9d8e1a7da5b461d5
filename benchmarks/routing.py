"""What routing costs beside the experts that it runs: the same groups by hand, and one by one.

    python -m benchmarks.routing [--quick] [--json]

Eight experts of one recipe with random weights, gate heads of the usual size, and 32 pictures. The
posterior is a closed form, so that the number of experts that a step needs is that of a real corpus
(two or three of eight) and not that of untrained heads; what the heads cost is paid nevertheless.
Ours and its peer take turns in this process. A peer is the bare network, called by hand on just the
rows that want it. Paged experts are measured in a process of their own, by what is resident of
it, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.core import flow, sampler, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.families import FAMILIES
from atoll.core.flow import Prediction
from atoll.core.head import HeadConfig, new_head
from atoll.core.manifest import Picture
from atoll.core.recipes import build, recipe_of
from atoll.core.trunk import TrunkConfig, first_stride, new_trunk
from atoll.router.chooser import SampleSettings, sample_settings, x_noise
from atoll.router.ensemble import Trajectory
from atoll.router.gate import Gate
from atoll.router.paging import PagedExperts
from benchmarks.rows import Row, row, show, unmeasured
from benchmarks.turns import Schedule, alternate

EXPERTS, BATCH, WIDTH = 8, 32, 64
SHARDS = [f"shard-{k:02d}" for k in range(EXPERTS)]
OVER = 1.10  # times the peer
MASS_OVER = 0.15  # experts
ONE_BY_ONE = 3.0
MIXED = ("full", "once", "mass:0.9", "top-k:1", "threshold:0.05", "sample:1", "full>0.5,once")
FULL = Schedule(warm=1, turn=1.0, pair=10.0, pairs=5)
QUICK = Schedule(warm=1, turn=0.1, pair=0.1, pairs=1)


@dataclass(frozen=True)
class Case:
    """What is measured on one device."""

    recipe: str
    picture: Picture
    device: torch.device
    dtype: torch.dtype
    batch: int
    steps: int  # of the solver, a trajectory

    @cached_property
    def networks(self) -> list[nn.Module]:
        made = [
            build(recipe_of(self.recipe), self.picture, WIDTH, seed=k, pooled_width=WIDTH)
            for k in range(EXPERTS)
        ]
        return list(nn.ModuleList(made).to(self.device, self.dtype).eval())

    def card(self, shard: str) -> Card:
        return Card(
            name=shard,
            kind="expert",
            shard=shard,
            base_sha256=None,
            family=recipe_of(self.recipe).family,
            prediction=Prediction.VELOCITY,
            latent_space="pixels",
            images_seen=1,
        )

    @cached_property
    def cond(self) -> Conditioning:
        mask = torch.ones(self.batch, 16, dtype=torch.bool)
        tokens = seeds.normal(0, "tokens", first=0, count=self.batch, shape=(16, WIDTH))
        pooled = seeds.normal(0, "pooled", first=0, count=self.batch, shape=(WIDTH,))
        cond = Conditioning(tokens, mask, pooled, torch.zeros(self.batch, dtype=torch.bool))
        return cond.to(torch.zeros(1, device=self.device))

    @cached_property
    def heads(self) -> Gate:
        labels = dict.fromkeys(SHARDS, 1)
        config = TrunkConfig(
            channels=self.picture.channels, pooled=WIDTH, stride=first_stride(self.picture),
            labels=labels,
        )  # fmt: skip
        trunk = new_trunk(config, seed=0)
        made = {
            shard: new_head(HeadConfig(shard=shard, trunk_sha256=""), trunk) for shard in SHARDS
        }
        return Gate(trunk, made, labels).to(self.device)

    def gate(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The posterior of eight Gaussians in four of the dimensions, at the cost of heads."""
        self.heads(x_t, t, cond)
        centres = 4 * seeds.normal(1, "centres", first=0, count=EXPERTS, shape=(4,)).to(x_t)
        gap = x_t.flatten(1)[:, None, :4] - flow.expand(1 - t, centres[None]) * centres
        spread = t.square() + 0.1 * (1 - t).square()
        return (-gap.square().sum(dim=2) / (2 * spread[:, None])).softmax(dim=1)

    def network(self, k: int, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """An expert by hand."""
        adapter = FAMILIES[recipe_of(self.recipe).family].adapter
        given = x_t.to(self.dtype)
        output = adapter(self.networks[k], given, flow.timestep(t, None), cond.to(given))
        return output.to(x_t)

    def trajectory(self, settings: list[SampleSettings], *, trace: bool = False) -> Trajectory:
        experts = [
            Denoiser(network, self.card(shard)).velocity
            for network, shard in zip(self.networks, SHARDS, strict=True)
        ]
        return Trajectory(
            experts,
            self.gate,
            shards=SHARDS,
            settings=settings,
            cond=self.cond[: len(settings)],
            null=self.cond[:1],
            trace=trace,
        )

    def noise(self, settings: list[SampleSettings]) -> Tensor:
        return x_noise(settings, self.picture.shape).to(self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- trajectories, each ours or by hand --------------------------------------------------------

    def ours(self, settings: list[SampleSettings]) -> Tensor:
        grid = sampler.times(self.steps)
        return sampler.euler(self.trajectory(settings), self.noise(settings), grid)

    @torch.no_grad()
    def alone(self, settings: list[SampleSettings]) -> Tensor:
        """All on the first expert."""

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return self.network(0, x_t, t, self.cond)

        return sampler.euler(velocity, self.noise(settings), sampler.times(self.steps))

    @torch.no_grad()
    def by_hand(self, settings: list[SampleSettings], plan: list[Tensor]) -> Tensor:
        """The groups of `plan`, a step's weights each, one after the other."""
        x_t, grid = self.noise(settings), sampler.times(self.steps)
        for step, weights in enumerate(plan):
            t = torch.full((len(x_t),), float(grid[step]), device=self.device)
            v = torch.zeros_like(x_t)
            for k in range(EXPERTS):
                rows = weights[:, k].nonzero()[:, 0]
                if len(rows):
                    mixed = self.network(k, x_t[rows], t[rows], self.cond[rows])
                    v[rows] += flow.expand(weights[rows, k], mixed) * mixed
            x_t = x_t + (grid[step + 1] - grid[step]) * v
        return x_t


def _again(run: Callable[[], object]) -> Iterator[None]:
    while True:
        yield
        run()


def compare(
    case: Case, schedule: Schedule, ours: Callable[[], object], peer: Callable[[], object]
) -> tuple[float, list[float]]:
    """How many times as long `ours` takes as `peer`: the median of pairs, and each."""
    made = {"ours": _again(ours), "peer": _again(peer)}
    times = alternate(made, schedule, case.wait)
    ratios = [1 / each for each in times.ratios("ours", "peer")]
    return 1 / times.ratio("ours", "peer"), ratios


def routings(case: Case, schedule: Schedule) -> list[Row]:
    """Rows of one expert, several experts, adaptive sets and mixed batches.

    Groups have their bars on a GPU at 16 rows an expert and more, and mixed batches theirs at 32.
    """
    rows = []
    on_gpu = case.device.type == "cuda"
    groups_count = not on_gpu or case.batch >= 16 * EXPERTS
    where = f"GPU, batches of {case.batch}: " if on_gpu else ""

    def ratio(
        name: str, ours: Callable[[], object], peer: Callable[[], object], against: str,
        **bar: float,
    ) -> None:  # fmt: skip
        value, each = compare(case, schedule, ours, peer)
        pairs = ", ".join(f"{one:.3f}" for one in each)
        bar = bar if groups_count else {}
        told = f"{against}; median of {pairs}"
        rows.append(row(f"{where}{name}", value, "times", against=told, **bar))

    one = sample_settings(case.batch, SHARDS, routing=f"oracle:{SHARDS[0]}")
    ratio(
        f"one expert for all {case.batch}", partial(case.ours, one), partial(case.alone, one),
        "that expert alone", at_most=OVER,
    )  # fmt: skip
    for text in ("once", "mass:0.9"):
        settings = sample_settings(case.batch, SHARDS, routing=text)
        trajectory = case.trajectory(settings, trace=True)
        sampler.euler(trajectory, case.noise(settings), sampler.times(case.steps))
        assert trajectory.trace is not None
        plan = [step.weights.to(case.device) for step in trajectory.trace]
        groups = sum(int((step > 0).any(dim=0).sum()) for step in plan) / len(plan)
        mean = trajectory.experts_run / (case.steps * case.batch)
        ratio(
            text,
            partial(case.ours, settings), partial(case.by_hand, settings, plan),
            f"the same groups by hand, {groups:.1f} at a step", at_most=OVER,
        )  # fmt: skip
        value, _ = compare(
            case,
            schedule,
            partial(case.ours, settings),
            partial(case.alone, settings),
        )
        # Small groups cost a processor more than their rows: the bar is one for a GPU.
        counts = on_gpu and groups_count and text != "once"
        bar = {"at_most": mean + MASS_OVER} if counts else {}
        against = f"one expert alone on all {case.batch}; {mean:.2f} experts a picture and step"
        name = f"{where}{text}, in passes of one expert"
        rows.append(row(name, value, "times", against=against, **bar))
    seeded = list(range(case.batch))
    mixed = sample_settings(
        case.batch,
        SHARDS,
        routing=[MIXED[i % len(MIXED)] for i in seeded],
        guidance=[1.0 if i % 3 else 2.5 for i in seeded],
        seed=seeded,
    )

    def one_by_one() -> None:
        for each in mixed:
            case.ours([each])

    value, each = compare(case, schedule, one_by_one, partial(case.ours, mixed))
    bar = {"at_least": ONE_BY_ONE} if on_gpu and case.batch <= BATCH else {}
    against = f"one batch of {case.batch} with routings, guidance and seeds of their own; "
    against += "median of " + ", ".join(f"{one:.2f}" for one in each)
    rows.append(row(f"{where}one by one", value, "times", against=against, digits=2, **bar))
    return rows


def unread() -> list[Row]:
    """Every row that has its bar on a GPU, where there is none."""
    all_of_it, some = f"GPU, batches of {GPU.batch}: ", f"GPU, batches of {BATCH}: "
    rows = [
        row(f"{all_of_it}one expert for all {GPU.batch}", None, "times", at_most=OVER),
        row(f"{all_of_it}once", None, "times", at_most=OVER),
        row(f"{all_of_it}mass:0.9", None, "times", at_most=OVER),
        # Its bar is the mean of experts a step and 0.15, which is measured too.
        row(f"{all_of_it}mass:0.9, in passes of one expert", None, "times"),
        row(f"{some}one by one", None, "times", at_least=ONE_BY_ONE),
    ]
    return [unmeasured(each, "no CUDA device") for each in rows]


# -- memory ----------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """What of this process is in memory: its own pages, and those of files that it has mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def paged_memory(
    folder: Path, recipe: str, picture: Picture, dtype: torch.dtype
) -> dict[str, float]:
    """Most resident bytes beyond those before, as shares of one expert, with room for one."""
    import threading

    torch.set_num_threads(1)
    folders = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    case = Case(recipe, picture, torch.device("cpu"), torch.float32, batch=2, steps=2)
    found: dict[str, float] = {}
    for text in ("once", "full"):
        before, most, done = resident_bytes(), 0, threading.Event()

        def watch(done: threading.Event = done) -> None:
            nonlocal most
            while not done.wait(0.005):
                most = max(most, resident_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        count = 1 if text == "once" else 2
        settings = sample_settings(count, SHARDS[: len(folders)], routing=text)
        experts = PagedExperts(folders, budget=size, dtype=dtype)
        trajectory = Trajectory(
            experts,
            lambda x_t, t, cond: x_t.new_full((len(x_t), len(folders)), 1 / len(folders)),
            shards=SHARDS[: len(folders)],
            settings=settings,
            cond=case.cond[:count],
            null=case.cond[:1],
        )
        sampler.euler(trajectory, case.noise(settings), sampler.times(case.steps))
        done.set()
        thread.join()
        found[text] = (most - before) / size
        found[f"{text} loads"] = experts.loads
        del experts, trajectory
    return found


def memory(
    recipe: str, picture: Picture, count: int, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Rows of the paged mode's peak, in a process that has made no experts, with files of `dtype`.

    A file is a few kilobytes more than the weights in it, which are what a budget counts.
    """
    name = str(dtype)[6:]
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(recipe, picture, torch.device("cpu"), torch.float32, batch=1, steps=1)
        for k in range(count):
            network = build(recipe_of(recipe), picture, WIDTH, seed=k, pooled_width=WIDTH)
            torch.nn.ModuleList([network]).to(dtype)
            Denoiser(network, case.card(SHARDS[k])).save(Path(scratch) / SHARDS[k])
            del network
        command = [sys.executable, "-m", "benchmarks.routing", "--paged", scratch, recipe, name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: Mapping[str, float] = json.loads(told.splitlines()[-1])
    return [
        row(
            f"paged `{text}` in {name}, peak of resident memory", found[text], "experts",
            against=f"{count} experts of {recipe}, room for one; {found[f'{text} loads']:.0f} were "
            "brought in, activations included", at_most=2.0,
        )
        for text in ("once", "full")
    ]  # fmt: skip


CPU = Case(
    "unet-nano", Picture(channels=3, height=32, width=32), torch.device("cpu"), torch.float32,
    batch=BATCH, steps=5,
)  # fmt: skip
GPU = Case(
    "dit-300m", Picture(channels=4, height=32, width=32), torch.device("cuda"), torch.bfloat16,
    batch=128, steps=10,
)  # fmt: skip
PAGED = ("dit-b", GPU.picture, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute, on tiny experts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--paged", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.paged:
        folder, recipe, name = given.paged
        found = paged_memory(Path(folder), recipe, GPU.picture, getattr(torch, name))
        print(json.dumps(found))  # noqa: T201
        return
    rows = routings(CPU, QUICK if given.quick else FULL)
    if torch.cuda.is_available():
        for batch in (BATCH, GPU.batch):
            rows += routings(replace(GPU, batch=batch), QUICK if given.quick else FULL)
    else:
        rows += unread()
    for dtype in (torch.float32, torch.bfloat16):
        rows += memory(*PAGED, dtype)
    show("routing", rows, as_json=given.json)


if __name__ == "__main__":
    main()
