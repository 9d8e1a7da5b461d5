"""Training speed of an island's loop against a bare loop, and the usual one, of the same model.

    python -m benchmarks.train [--quick] --json

All run in this process on one thread, in turn, on the same records, and are timed after their first
steps. The island's loop writes a checkpoint every 30 seconds, metrics and heartbeats besides; the
others draw their noise and times by torch.randn and write nothing. What a checkpoint costs is
measured by itself, with one after every step: few of those 30 seconds pass here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from atoll.core import recipes
from atoll.core.blocks import write_blocks
from atoll.core.cache import BlockCache
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.flow import Prediction
from atoll.core.manifest import Artefact, Picture, Plan
from atoll.core.pack import Pack, ShardCard, open_pack, write_pack, write_shard_card
from atoll.core.storage import Storage, sha256_file, sha256_folder
from atoll.islands.data import Batches
from atoll.islands.loop import Loop
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import Errors, flow_matching
from atoll.islands.train_denoiser import course_of
from benchmarks.start import seconds_to_first_step

BAR = 0.98
READING = 5.0
THROUGH_CACHE = 0.8
CHECKPOINT_SECONDS = 30.0
START_SECONDS = 15.0


def _pack(folder: Path, picture: Picture, records: int) -> Pack:
    """Random pictures: speed does not depend on what is in them."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (records, *picture.shape), generator=draw, dtype=torch.uint8)
    table = Conditioning(
        torch.randn(11, 16, 64, generator=draw),
        torch.ones(11, 16, dtype=torch.bool),
        torch.randn(11, 64, generator=draw),
        torch.arange(11) == 0,
    )
    caption = torch.randint(1, 11, (records,), generator=draw)
    write_pack(folder / "pack-00000.safetensors", pixels, caption, table)
    write_blocks(folder, ["pack-00000.safetensors"])
    card = ShardCard(
        name="bench", records=records, held_out=0, picture=picture, encoder="none",
        packs={"pack-00000.safetensors": records},
        files={file.name: sha256_file(file) for file in folder.iterdir()},
    )  # fmt: skip
    write_shard_card(folder, card)
    return Pack(folder)


def _far(folder: Path) -> Pack:
    """The same pack on a store, whose rows come through the cache."""
    store = Storage("memory://bench")
    store.publish(folder, "pack")
    made = Artefact(path="pack", sha256=sha256_folder(folder))
    return open_pack(store, made, BlockCache(1))


def _denoiser(recipe: recipes.Recipe, picture: Picture) -> Denoiser:
    card = Card(
        name="bench", kind="base", shard=None, base_sha256=None, family=recipe.family,
        prediction=Prediction.VELOCITY, latent_space="pixels", images_seen=0,
    )  # fmt: skip
    return Denoiser(recipes.build(recipe, picture, 64, seed=0), card)


class _Clock:
    """Images per second between two steps of a training that calls it before each of its steps."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last, self._step = first, last, -1
        self._marks: dict[int, float] = {}

    def __call__(self) -> None:
        self._step += 1
        if self._step in (self._first, self._last):
            self._marks[self._step] = time.perf_counter()

    def rate(self, batch: int) -> float:
        """Images per second."""
        seconds = self._marks[self._last] - self._marks[self._first]
        return (self._last - self._first) * batch / seconds


Training = Callable[[recipes.Recipe, Picture, Pack, int, _Clock], None]


def _ours(
    recipe: recipes.Recipe,
    picture: Picture,
    pack: Pack,
    steps: int,
    clock: _Clock,
    *,
    checkpoints: int = 1,
) -> None:
    denoiser, batch = _denoiser(recipe, picture), recipe.batch
    config = DenoiserTraining(checkpoints=checkpoints, checkpoint_seconds=CHECKPOINT_SECONDS)
    batches = Batches(
        pack, config, rows=pack.train, seed=0, stream="bench", device=torch.device("cpu")
    )
    loss = flow_matching(denoiser, batches, config)

    def timed(first: int, count: int) -> Errors:
        clock()
        return loss(first, count)

    course = course_of(config, Plan(batch=batch, images_seen=steps * batch), 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        Loop(Storage(folder), "bench", denoiser.network, course, name="bench").run(timed)


def _bare(recipe: recipes.Recipe, picture: Picture, pack: Pack, steps: int, clock: _Clock) -> None:
    denoiser, batch = _denoiser(recipe, picture), recipe.batch
    network = denoiser.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    averaged = [p.detach().clone() for p in network.parameters()]
    for _ in range(steps):
        clock()
        rows = torch.randint(0, len(pack), (batch,))
        loss = _plain_loss(denoiser, pack.x_data(rows), pack.cond(rows), pack.null)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.detach() for p in network.parameters()], 0.005)


def _usual(recipe: recipes.Recipe, picture: Picture, pack: Pack, steps: int, clock: _Clock) -> None:
    """As the training examples of diffusers write it, on accelerate."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    denoiser, batch = _denoiser(recipe, picture), recipe.batch
    network = denoiser.network.train()
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(
        _Rows(pack, steps * batch), batch_size=batch, shuffle=True, drop_last=True,
        collate_fn=lambda rows: (pack.x_data(torch.tensor(rows)), pack.cond(torch.tensor(rows))),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    average = EMAModel(network.parameters(), decay=0.995)
    network, optimizer = accelerator.prepare(network, optimizer)
    trained = Denoiser(network, denoiser.card)
    for x_data, cond in loader:
        clock()
        with accelerator.accumulate(network):
            loss = _plain_loss(trained, x_data, cond, pack.null)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        average.step(network.parameters())
        loss.detach().item()  # for the progress bar


class _Rows(Dataset[int]):
    """Row numbers, over and over."""

    def __init__(self, pack: Pack, length: int) -> None:
        self._rows, self._length = len(pack), length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index % self._rows


def _plain_loss(
    denoiser: Denoiser, x_data: Tensor, cond: Conditioning, null: Conditioning
) -> Tensor:
    """The same objective with torch's own random numbers."""
    batch = len(x_data)
    x_noise, t = torch.randn_like(x_data), torch.sigmoid(torch.randn(batch))
    x_t = (1 - t[:, None, None, None]) * x_data + t[:, None, None, None] * x_noise
    cond = cond.dropped(torch.rand(batch) < 0.1, null)
    return functional.mse_loss(denoiser.output(x_t, t, cond), x_noise - x_data)


def _checkpointing(recipe: recipes.Recipe, picture: Picture, pack: Pack, steps: int) -> float:
    """Seconds of training that one checkpoint costs, until it is on the disk."""
    seconds = []
    for checkpoints in (1, steps):
        clock = _Clock(1, steps - 1)
        _ours(recipe, picture, pack, steps, clock, checkpoints=checkpoints)
        seconds.append(recipe.batch / clock.rate(recipe.batch))
    return max(0.0, seconds[1] - seconds[0])


def _reading(recipe: recipes.Recipe, pack: Pack, seconds: float) -> float:
    """Noised images per second that one core makes ready."""
    batches = Batches(
        pack, DenoiserTraining(), rows=pack.train, seed=0, stream="bench",
        device=torch.device("cpu"),
    )  # fmt: skip
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        batches(done, recipe.batch)
        done += recipe.batch
    return done / (time.perf_counter() - started)


def measure(
    name: str, picture: Picture, *, warm: int, steps: int, pairs: int
) -> list[dict[str, object]]:
    """Rows for one recipe: speeds, and the median ratios over interleaved rounds."""
    recipe = recipes.recipe_of(name)
    rates: list[dict[str, float]] = []
    trainings: dict[str, Training] = {"ours": _ours, "bare": _bare, "usual": _usual}
    with tempfile.TemporaryDirectory() as folder:
        pack = _pack(Path(folder) / "pack", picture, 2_048)
        for _ in range(pairs):
            rates.append({})
            for kind, training in trainings.items():
                clock = _Clock(warm, warm + steps - 1)
                training(recipe, picture, pack, warm + steps, clock)
                rates[-1][kind] = clock.rate(recipe.batch)
        far = _far(Path(folder) / "pack")
        turns = [(_reading(recipe, pack, 1.0), _reading(recipe, far, 1.0)) for _ in range(pairs)]
        reading = statistics.median(near for near, _ in turns)
        through = statistics.median(cached / near for near, cached in turns)
        lost = _checkpointing(recipe, picture, pack, max(4, steps // 5))
    ours = statistics.median(rate["ours"] for rate in rates)

    def row(what: str, value: float, against: str, bar: float) -> dict[str, object]:
        return {
            "name": f"{name} {what}", "value": round(value, 3), "unit": "ratio",
            "against": against, "bar": bar, "holds": value >= bar,
        }  # fmt: skip

    def ratio(peer: str) -> float:
        return statistics.median(rate["ours"] / rate[peer] for rate in rates)

    return [
        {
            "name": f"{name} island loop", "value": round(ours, 1), "unit": "images/s",
            "against": "", "bar": None, "holds": None,
        },
        row("ratio to bare", ratio("bare"), "a bare loop, same run", BAR),
        row("ratio to usual", ratio("usual"), "the usual loop on accelerate, same run", BAR),
        row(f"with a checkpoint every {CHECKPOINT_SECONDS:.0f} s",
            CHECKPOINT_SECONDS / (CHECKPOINT_SECONDS + lost), "the same loop without", BAR),
        row("pack reading", reading / ours, "the training that it feeds", READING),
        row("reading through the cache", through, "the same pack on this disk", THROUGH_CACHE),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (
        {"warm": 10, "steps": 30, "pairs": 3}
        if given.quick
        else {"warm": 50, "steps": 250, "pairs": 7}
    )
    rows = measure("unet-digits", Picture(channels=1, height=8, width=8), **sizes)
    fewer = {**sizes, "warm": sizes["warm"] // 5, "steps": sizes["steps"] // 5}
    rows += measure("unet-nano", Picture(channels=3, height=32, width=32), **fewer)
    seconds = seconds_to_first_step()
    rows.append(
        {
            "name": "from `atoll train` to the first step, on a local head",
            "value": round(seconds, 2), "unit": "s", "against": "", "bar": START_SECONDS,
            "holds": seconds <= START_SECONDS,
        }
    )  # fmt: skip
    machine = f"{platform.machine()}, torch {torch.__version__}, one thread"
    result = {"benchmark": "train", "machine": machine, "rows": rows}
    text = json.dumps(result) if given.json else json.dumps(result, indent=2)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
