"""Whether routings starve shards: shares of sampled pictures beside those of held-out records.

    python -m benchmarks.shares CIFAR10.parquet OUT [--pictures 5000] [--quick] [--json]

The corpus is cut into eight owners of very unequal size (40% to 5%), each with classes of its own,
besides a public one, and the whole way is gone with the commands that a user has. Pictures are
sampled without prompts, so that the prior alone says how often a shard is due. One instrument, the
nearest mean direction of the shards' training records in the encoder's space, reads sampled and
real pictures alike; what two halves of the held-out records differ by is the least that can be
expected. A second run resumes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from atoll.cli.evaluating import instrument_of
from atoll.cli.systems import Model, load_model, sample
from atoll.core import seeds
from atoll.core.journal import progress
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.evaluate.features import embed, to_uint8
from atoll.evaluate.reference import load_records
from atoll.evaluate.shares import Shares, compare
from benchmarks.rows import Row, row, show

# Owner -> classes, and how many records of each.
OWNERS = {
    "a": (("airplane", "bird", "cat"), 5400),
    "b": (("automobile",), 5400),
    "c": (("deer",), 4900),
    "d": (("dog",), 4000),
    "e": (("frog",), 3300),
    "f": (("horse",), 2600),
    "g": (("ship",), 2075),
    "h": (("truck",), 2025),
}
PUBLIC, OF_EACH = "public", 600  # the commons' owner, with some of every class
ROUTINGS = ("once", "mass:0.9", "threshold:0.05", "full", "top-k:1")
BIASED = ("top-k:1",)
MARGIN, SMALLEST = 0.05, 0.8
STEPS, BATCH = 50, 250


def write_corpus(source: str, out: Path, *, share: float) -> None:
    """The source's records with an owner each, `share` of what OWNERS says."""
    table = pq.read_table(source)
    labels = table.column("label").to_pylist()
    owner_of = {label: (name, most) for name, (own, most) in OWNERS.items() for label in own}
    seen = dict.fromkeys(owner_of, 0)
    rows, owners = [], []
    for number, label in enumerate(labels):
        name, most = owner_of[label]
        place, seen[label] = seen[label], seen[label] + 1
        if place < int((OF_EACH + most) * share):
            rows.append(number)
            owners.append(PUBLIC if place < int(OF_EACH * share) else name)
    pq.write_table(table.take(rows).append_column("owner", pa.array(owners)), out)


def train(corpus: Path, run: Path, *, passes: float) -> None:
    """A run with its ensemble, by the commands."""
    small = ("--set", "size=8", "--set", "flips=true")
    atoll("partition", corpus, run, "--by", "owner", "--commons", PUBLIC, "--holdout", 0.25, *small)
    atoll("base", run, "--recipe", "unet-digits", "--passes", 3 * passes)
    atoll("train", run, "--passes", passes)
    atoll("assemble", run)


def atoll(*arguments: object) -> None:
    """Run a command, or end as it ended; what it says goes to stderr."""
    script = Path(sys.executable).with_name("atoll")
    ended = subprocess.run([script, *map(str, arguments)], check=False, stdout=sys.stderr)
    if ended.returncode:
        sys.exit(ended.returncode)


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
    manifest, model = Manifest.load(run), load_model(run.uri)
    instrument = instrument_of(run, manifest)
    real = load_records(run, manifest)
    # Neither the commons' own nor more of one shard than of another: as the hash has held them out.
    private = [i for i, shard in enumerate(real.shards) if shard in manifest.shards]
    order = seeds.order(0, "shares", first=0, count=len(private), n=len(private))
    halves = torch.tensor(private)[torch.from_numpy(order)][: 2 * count].chunk(2)
    counts = [instrument.count(embed(model.encoder, real.pictures[half])) for half in halves]
    floor = compare(instrument.names, *counts, seed=0)
    n = len(halves[0])
    rows = [
        row(
            "two halves of real records, total variation", floor.distance.value, "",
            against=f"N={n}; {_interval(floor)}",
        )
    ]  # fmt: skip
    smallest = min(manifest.shards, key=lambda shard: manifest.shards[shard].records)
    for routing in ROUTINGS:
        pictures, experts = sampled(model, routing, n)
        found = instrument.count(embed(model.encoder, pictures))
        shares = compare(instrument.names, found, sum(counts, torch.zeros_like(found)), seed=0)
        bars = {} if routing in BIASED else {"at_most": floor.distance.value + MARGIN}
        rows.append(
            row(
                f"{routing}, total variation", shares.distance.value, "",
                against=f"N={n} and {2 * n} held-out records; {_interval(shares)}; {experts:.2f} "
                "experts a step", **bars,
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


def _interval(shares: Shares) -> str:
    return f"95% {shares.distance.low:.3f} to {shares.distance.high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", help="CIFAR-10 with the columns image, caption and label")
    parser.add_argument("out", type=Path, help="a folder for corpus and run")
    parser.add_argument("--pictures", type=int, default=5000, help="of every routing")
    parser.add_argument("--passes", type=float, default=30.0, help="of every expert")
    parser.add_argument("--quick", action="store_true", help="a tenth of the records and pictures")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scale = 0.1 if given.quick else 1.0
    given.out.mkdir(parents=True, exist_ok=True)
    corpus, run = given.out / "owners.parquet", given.out / "run"
    if not corpus.exists():
        write_corpus(given.corpus, corpus, share=scale)
    train(corpus, run, passes=given.passes)
    show("shares", measure(Storage(run), int(given.pictures * scale)), as_json=given.json)


if __name__ == "__main__":
    main()
