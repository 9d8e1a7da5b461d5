"""Whether routings starve shards: shares of sampled pictures beside those of held-out records.

    python -m benchmarks.shares CIFAR10.parquet OUT [--pictures 5000] [--quick] [--json]

Eight owners of 40% to 5% of the records have photographs at 8x8, each on a film of one tone: black
and white, sepia, cyanotype and so on. That is what makes an instrument: the nearest of the owners'
mean directions reads sampled and real pictures alike, and knows held-out records for their owner's.
Where shards are clusters of one kind of picture, records lie at their borders, and 18% of what an
expert draws is read as a neighbour's whatever the routing (docs/LOG.md). The commons is other
photographs, on all films. From there the whole way is gone with the commands that a user has.
Pictures are sampled without prompts, so that the prior alone says how often a shard is due. What
two halves of all held-out records differ by is the least that can be expected, and what is apart
from `once`, which draws by the prior, is the routing's doing. Routings are sampled side by side,
one on each processor, each on one thread. A second run resumes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel
from torch import Tensor

from atoll.cli.evaluating import instrument_of
from atoll.cli.systems import Model, load_model, sample
from atoll.core import seeds
from atoll.core.embedding import load_encoder
from atoll.core.journal import progress
from atoll.core.manifest import Manifest
from atoll.core.pictures import decode
from atoll.core.storage import Storage
from atoll.evaluate.features import embed, to_uint8
from atoll.evaluate.reference import load_records
from atoll.evaluate.shares import Shares, compare
from benchmarks.rows import Row, row, show

COMMONS, PUBLIC, RECORDS = "public.parquet", 6000, 24000
SIZE, HOLDOUT = 8, 0.5  # pixels of a side; so many are 5,000 and more to compare with, twice
ROUTINGS = ("full", "mass:0.9", "threshold:0.05", "once", "top-k:1")  # the slowest first
PRIOR = "once"  # draws shards by the prior itself
BIASED = ("top-k:1",)
BASE_PASSES = 0.6  # beside one of an expert
# For every pass of an expert. By default they are as many as base and expert see, which is too few
# for a gate that is to be exact (docs/LOG.md).
TRUNK_IMAGES, HEAD_IMAGES = 20_000, 6_667
MARGIN, SMALLEST, KNOWN = 0.05, 0.8, 0.8
STEPS, BATCH = 25, 100

Film = Callable[[Image.Image], Image.Image]


def _toned(shadows: str, lights: str) -> Film:
    return lambda picture: ImageOps.colorize(ImageOps.grayscale(picture), shadows, lights)


FILMS: dict[str, tuple[float, Film]] = {  # and the part of all records that are on it
    "black-and-white": (0.40, _toned("black", "white")),
    "sepia": (0.15, _toned("#1e140a", "#ffe6b4")),
    "cyanotype": (0.12, _toned("#06163a", "#dcecff")),
    "redscale": (0.09, _toned("#280000", "#ff9650")),
    "night-vision": (0.08, _toned("#001400", "#b4ffb4")),
    "purple": (0.06, _toned("#140028", "#f0b4ff")),
    "gold": (0.05, _toned("#191200", "#fff050")),
    "teal": (0.05, _toned("#001414", "#78fff0")),
}


def write_corpus(source: str, out: Path, *, share: float) -> None:
    """A share of the records at 8x8, on their owners' films; the public ones beside them."""
    table = pq.read_table(source, columns=["image", "caption"])
    for path, first, count in (
        (out.with_name(COMMONS), 0, int(PUBLIC * share)),
        (out, PUBLIC, int(RECORDS * share)),
    ):
        images, captions = (
            table.slice(first, count).column(name).to_pylist() for name in ("image", "caption")
        )
        films = films_of(count)
        developed = [
            _png(FILMS[film][1](_small(data))) for film, data in zip(films, images, strict=True)
        ]
        described = [f"{text}, {film}" for film, text in zip(films, captions, strict=True)]
        columns = {"image": developed, "caption": described, "owner": films}
        pq.write_table(pa.table(columns), path)


def films_of(count: int) -> list[str]:
    """Which film each of `count` records is on; the corpus' order is random already."""
    ends = (np.cumsum([part for part, _ in FILMS.values()]) * count).round().astype(int)
    return np.repeat(list(FILMS), np.diff(ends, prepend=0)).tolist()


def _small(data: bytes) -> Image.Image:
    return decode(data).resize((SIZE, SIZE), Image.Resampling.BOX)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def train(corpus: Path, run: Path, *, passes: float) -> None:
    """A run with its ensemble, by the commands."""
    atoll(
        "partition", corpus, run, "--by", "owner", "--commons", corpus.with_name(COMMONS),
        "--holdout", HOLDOUT,
    )  # fmt: skip
    base = ("--recipe", "unet-digits", "--passes", BASE_PASSES * passes)
    atoll("base", run, *base, "--set", f"trunk.images={int(TRUNK_IMAGES * passes)}")
    atoll("train", run, "--passes", passes, "--set", f"head.images={int(HEAD_IMAGES * passes)}")
    atoll("assemble", run)


def atoll(*arguments: object) -> None:
    """Run a command, or end as it ended; what it says goes to stderr."""
    script = Path(sys.executable).with_name("atoll")
    ended = subprocess.run([script, *map(str, arguments)], check=False, stdout=sys.stderr)
    if ended.returncode:
        sys.exit(ended.returncode)


class Found(BaseModel):
    """What was sampled under one routing: pictures by the nearest shard, and experts a step."""

    ensemble_sha256: str
    steps: int
    counts: list[int]
    experts: float


def found(run_uri: str, count: int, routing: str) -> Found:
    """Sample and count; from the file beside the run where that was done before."""
    torch.set_num_threads(1)
    run = Storage(run_uri)
    manifest = Manifest.load(run)
    assert manifest.ensemble is not None
    file = Path(f"{run_uri}-counts", f"{routing.replace(':', '-')}.json")
    if file.exists():
        there = Found.model_validate_json(file.read_text())
        made_of = (there.ensemble_sha256, there.steps, sum(there.counts))
        if made_of == (manifest.ensemble.sha256, STEPS, count):
            return there
    model = load_model(run.uri)
    pictures, experts = sampled(model, routing, count)
    counts = instrument_of(run, manifest).count(embed(model.encoder, pictures)).tolist()
    made = Found(
        ensemble_sha256=manifest.ensemble.sha256, steps=STEPS, counts=counts, experts=experts
    )
    file.parent.mkdir(exist_ok=True)
    file.write_text(made.model_dump_json())
    return made


def sampled(model: Model, routing: str, count: int) -> tuple[Tensor, float]:
    """uint8 pictures without prompts, and experts a step."""
    parts, experts = [], 0.0
    with progress(f"sampling {routing}", count) as advance:
        for first in range(0, count, BATCH):
            prompts = [""] * min(BATCH, count - first)
            made = sample(model, prompts, routing=routing, steps=STEPS, first=first)
            parts.append(to_uint8(made.x_data))
            experts += made.experts_per_step * len(prompts) / count
            advance(len(prompts))
    return torch.cat(parts), experts


def measure(run: Storage, count: int) -> list[Row]:
    """The rows of all routings."""
    manifest = Manifest.load(run)
    encoder = load_encoder(run.local(manifest.encoder.path))
    instrument = instrument_of(run, manifest)
    real = load_records(run, manifest)
    # Neither the commons' own nor more of one shard than of another: as the hash has held them out.
    private = [i for i, shard in enumerate(real.shards) if shard in manifest.shards]
    features = embed(encoder, real.pictures[private])
    own = instrument.own(features, [real.shards[i] for i in private])
    order = seeds.order(0, "shares", first=0, count=len(private), n=len(private))
    halves = torch.from_numpy(order)[: 2 * count].chunk(2)
    counts = [instrument.count(features[half]) for half in halves]
    floor = compare(instrument.names, *counts, seed=0)
    n = len(halves[0])
    worst = min(own, key=lambda shard: own[shard])
    rows = [
        row(
            "held-out records that the instrument knows for their shard's, the least of all shards",
            own[worst], "", against=f"{worst}; all: {_listed(own)}", at_least=KNOWN,
        ),
        row(
            "two halves of real records, total variation", floor.distance.value, "",
            against=f"N={n}; {_interval(floor)}",
        ),
    ]  # fmt: skip
    smallest = min(manifest.shards, key=lambda shard: manifest.shards[shard].records)
    reference = sum(counts, torch.zeros_like(counts[0]))
    processors = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processors, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(partial(found, run.uri, n), ROUTINGS))
    for routing, each in zip(ROUTINGS, made, strict=True):
        shares = compare(instrument.names, torch.tensor(each.counts), reference, seed=0)
        bars = {} if routing in BIASED else {"at_most": floor.distance.value + MARGIN}
        rows.append(
            row(
                f"{routing}, total variation", shares.distance.value, "",
                against=f"N={n} and {2 * n} held-out records; {_interval(shares)}; "
                f"{each.experts:.2f} experts a step", **bars,
            )
        )  # fmt: skip
        # What it is off by, experts are, and what another is apart from it, that routing does.
        if routing != PRIOR:
            drawn = torch.tensor(made[ROUTINGS.index(PRIOR)].counts)
            apart = compare(instrument.names, torch.tensor(each.counts), drawn, seed=0)
            rows.append(
                row(
                    f"{routing}, total variation from {PRIOR}", apart.distance.value, "",
                    against=f"{_interval(apart)}; two samples of one law {apart.noise_level:.3f}",
                )
            )  # fmt: skip
        got, due = shares.counts[smallest] / n, shares.reference[smallest] / (2 * n)
        parts = {name: 2 * shares.counts[name] / shares.reference[name] for name in shares.counts}
        least = min(parts, key=lambda shard: parts[shard])
        bars = {} if routing in BIASED else {"at_least": SMALLEST}
        rows.append(
            row(
                f"{routing}, the smallest shard's part of its share", parts[smallest], "",
                against=f"{smallest}: {got:.1%}, real records {due:.1%}; the least of all shards: "
                f"{least}, {parts[least]:.3f}", **bars,
            )
        )  # fmt: skip
    return rows


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{part:.0%}" for part in parts.values())


def _interval(shares: Shares) -> str:
    return f"95% {shares.distance.low:.3f} to {shares.distance.high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", help="CIFAR-10 with the columns image and caption")
    parser.add_argument("out", type=Path, help="a folder for corpus and run")
    parser.add_argument("--pictures", type=int, default=5000, help="of every routing")
    parser.add_argument("--passes", type=float, default=30.0, help="of every expert")
    parser.add_argument("--quick", action="store_true", help="a tenth of the records and pictures")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scale = 0.1 if given.quick else 1.0
    given.out.mkdir(parents=True, exist_ok=True)
    corpus, run = given.out / "corpus.parquet", given.out / "run"
    if not corpus.exists():
        write_corpus(given.corpus, corpus, share=scale)
    train(corpus, run, passes=given.passes)
    show("shares", measure(Storage(run), int(given.pictures * scale)), as_json=given.json)


if __name__ == "__main__":
    main()
