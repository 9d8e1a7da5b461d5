"""Training speed of an island's loop against a bare loop of the same model, batch and precision.

    python -m benchmarks.train [--quick] --json

Both run in this process on one thread, in turn, on the same records; the island's loop writes its
checkpoints, metrics and heartbeat besides. The bare loop draws its noise and times by torch.randn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from atoll.core import recipes
from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import Card, Denoiser
from atoll.core.flow import Prediction
from atoll.core.manifest import Picture, Plan
from atoll.core.pack import Pack, ShardCard, write_pack, write_shard_card
from atoll.core.storage import Storage
from atoll.islands.base import course_of
from atoll.islands.data import Batches
from atoll.islands.loop import Loop
from atoll.islands.settings import DenoiserTraining
from atoll.islands.step import flow_matching

BAR = 0.98


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
    card = ShardCard(
        name="bench", records=records, held_out=0, picture=picture, encoder="none",
        packs={"pack-00000.safetensors": records}, files={},
    )  # fmt: skip
    write_shard_card(folder, card)
    return Pack(folder)


def _denoiser(recipe: recipes.Recipe, picture: Picture) -> Denoiser:
    card = Card(
        name="bench", kind="base", shard=None, base_sha256=None, family=recipe.family,
        prediction=Prediction.VELOCITY, latent_space="pixels", images_seen=0,
    )  # fmt: skip
    return Denoiser(recipes.build(recipe, picture, 64, seed=0), card)


def _ours(recipe: recipes.Recipe, picture: Picture, pack: Pack, steps: int) -> float:
    denoiser, batch = _denoiser(recipe, picture), recipe.batch
    config = DenoiserTraining(checkpoints=1)  # one per run, as every half minute of a real one
    batches = Batches(
        pack, config, rows=pack.train, seed=0, stream="bench", device=torch.device("cpu")
    )
    loss = flow_matching(denoiser, batches, config)
    course = course_of(config, Plan(batch=batch, images_seen=steps * batch), 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(Storage(folder), "bench", denoiser.network, course, name="bench")
        started = time.perf_counter()
        loop.run(loss)
        return steps * batch / (time.perf_counter() - started)


def _bare(recipe: recipes.Recipe, picture: Picture, pack: Pack, steps: int) -> float:
    denoiser, batch = _denoiser(recipe, picture), recipe.batch
    network = denoiser.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    averaged = [p.detach().clone() for p in network.parameters()]
    started = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(0, len(pack), (batch,))
        x_data, cond = pack.x_data(rows), pack.cond(rows)
        x_noise, t = torch.randn_like(x_data), torch.sigmoid(torch.randn(batch))
        x_t = (1 - t[:, None, None, None]) * x_data + t[:, None, None, None] * x_noise
        cond = cond.dropped(torch.rand(batch) < 0.1, pack.null)
        loss = functional.mse_loss(denoiser.output(x_t, t, cond), x_noise - x_data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.detach() for p in network.parameters()], 0.005)
    return steps * batch / (time.perf_counter() - started)


def measure(name: str, picture: Picture, *, steps: int, pairs: int) -> list[dict[str, object]]:
    """Rows for one recipe: our speed, and the median ratio over interleaved pairs."""
    recipe = recipes.recipe_of(name)
    with tempfile.TemporaryDirectory() as folder:
        pack = _pack(Path(folder) / "pack", picture, 2_048)
        _bare(recipe, picture, pack, 2)  # first kernels
        speeds = [
            (_ours(recipe, picture, pack, steps), _bare(recipe, picture, pack, steps))
            for _ in range(pairs)
        ]
    ours = statistics.median(speed for speed, _ in speeds)
    ratio = statistics.median(a / b for a, b in speeds)
    return [
        {
            "name": f"{name} island loop", "value": round(ours, 1), "unit": "images/s",
            "against": "", "bar": None, "holds": None,
        },
        {
            "name": f"{name} ratio", "value": round(ratio, 3), "unit": "ratio",
            "against": "bare loop, same run", "bar": BAR, "holds": ratio >= BAR,
        },
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps, pairs = (30, 3) if given.quick else (150, 7)
    rows = measure("unet-digits", Picture(channels=1, height=8, width=8), steps=steps, pairs=pairs)
    small = Picture(channels=3, height=32, width=32)
    rows += measure("unet-nano", small, steps=max(8, steps // 6), pairs=pairs)
    machine = f"{platform.machine()}, torch {torch.__version__}, one thread"
    result = {"benchmark": "train", "machine": machine, "rows": rows}
    text = json.dumps(result) if given.json else json.dumps(result, indent=2)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
