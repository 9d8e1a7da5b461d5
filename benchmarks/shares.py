"""Whether routings starve shards: shares of sampled pictures beside those of held-out records.

    python -m benchmarks.shares CIFAR10.parquet OUT [--pictures 5000] [--quick] [--json]

The pictures, at 8x8, are partitioned into eight clusters by a public tenth of them, thinned to what
each cluster is to have of all others (40% to 5%), and partitioned again: by the same public tenth,
so into the same clusters. Records that lie between two clusters are left out: pictures of a small
expert are less sharp than records, and where clusters touch, 28% of the largest one's are read
as a neighbour's, whatever the routing (docs/LOG.md). From there the whole way is gone with the
commands that a user has. Pictures are sampled without prompts, so that the prior alone says how
often a shard is due. One instrument, the nearest of the clusters' centroids, reads sampled and real
pictures alike: it must know each shard's held-out records for its own, and what two halves of all
of them differ by is the least that can be expected. What is apart from `once`, which draws by the
prior, is the routing's doing. Routings are sampled side by side, one on each processor, each on one
thread. A second run resumes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

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

PARTS = (0.40, 0.15, 0.12, 0.09, 0.08, 0.06, 0.05, 0.05)  # of all records but the public ones
COMMONS, PUBLIC_PART = "public.parquet", 0.1
GAP = 0.04  # of cosines, to the nearest centroid and to the next
SIZE, HOLDOUT = 8, 0.68  # pixels of a side; so many are 5,000 and more to compare with, twice
ROUTINGS = ("once", "mass:0.9", "threshold:0.05", "full", "top-k:1")
BIASED = ("top-k:1",)
BASE_PASSES = 0.6  # beside one of an expert, whose records are fewer
MARGIN, SMALLEST, KNOWN = 0.05, 0.8, 0.8
STEPS, BATCH = 50, 100


def write_corpus(source: str, out: Path, *, share: float) -> None:
    """A share of the source's records at 8x8, thinned cluster by cluster."""
    table = pq.read_table(source, columns=["image", "caption"])
    table = table.slice(0, int(len(table) * share))
    small = [_small(data) for data in table.column("image").to_pylist()]
    table = table.set_column(0, "image", pa.array([_png(picture) for picture in small]))
    public = int(len(table) * PUBLIC_PART)
    commons, every, run = (out.with_name(name) for name in (COMMONS, "every.parquet", "every"))
    pq.write_table(table.slice(0, public), commons)
    table = table.slice(public)
    pq.write_table(table, every)
    cut(every, run)
    storage = Storage(run)
    manifest = Manifest.load(storage)
    encoder = load_encoder(storage.local(manifest.encoder.path))
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in small[public:]]))
    features = functional.normalize(embed(encoder, pixels.permute(0, 3, 1, 2)).double(), dim=1)
    centres = instrument_of(storage, manifest).centres.double()
    nearest, next_to_it = (features @ centres.T).topk(2, dim=1).values.T
    apart = (nearest - next_to_it > GAP).nonzero().reshape(-1)
    clusters = (features[apart] @ centres.T).argmax(dim=1).tolist()
    pq.write_table(table.take(apart[thinned(clusters)].numpy()), out)


def thinned(clusters: Sequence[int]) -> list[int]:
    """Which rows stay: the largest cluster has the largest part, and so on."""
    sizes = Counter(clusters).most_common()
    whole = min(size / part for (_, size), part in zip(sizes, PARTS, strict=True))
    left = {cluster: int(whole * part) for (cluster, _), part in zip(sizes, PARTS, strict=True)}
    rows = []
    for number, cluster in enumerate(clusters):
        if left[cluster]:
            left[cluster] -= 1
            rows.append(number)
    return rows


def _small(data: bytes) -> Image.Image:
    return decode(data).resize((SIZE, SIZE), Image.Resampling.BOX)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def cut(corpus: Path, run: Path) -> None:
    """Partition by the public records beside the corpus, which alone say where clusters are."""
    atoll(
        "partition", corpus, run, "--shards", len(PARTS), "--commons", corpus.with_name(COMMONS),
        "--holdout", HOLDOUT, "--set", "flips=true",
    )  # fmt: skip


def train(corpus: Path, run: Path, *, passes: float) -> None:
    """A run with its ensemble, by the commands."""
    cut(corpus, run)
    atoll("base", run, "--recipe", "unet-digits", "--passes", BASE_PASSES * passes)
    atoll("train", run, "--passes", passes)
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
        # `once` draws shards by the prior itself: what it is off by, experts are, and what another
        # is apart from it, that routing does.
        if each is not made[0]:
            apart = compare(
                instrument.names, torch.tensor(each.counts), torch.tensor(made[0].counts), seed=0
            )
            rows.append(
                row(
                    f"{routing}, total variation from {ROUTINGS[0]}", apart.distance.value, "",
                    against=f"{_interval(apart)}; two samples of one law {apart.noise_level:.3f}",
                )
            )  # fmt: skip
        got = shares.counts[smallest] / n
        due = shares.reference[smallest] / (2 * n)
        bars = {} if routing in BIASED else {"at_least": SMALLEST}
        rows.append(
            row(
                f"{routing}, the smallest shard's part of its share", got / due, "",
                against=f"{smallest}: {got:.1%}, real records {due:.1%}", **bars,
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
    parser.add_argument("--passes", type=float, default=100.0, help="of every expert")
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
