"""The real side of every comparison: a run's records of one split, as its packs hold them.

Reads `shards/*/`, `commons/`: pixels from the packs, so that real pictures went through the same
resize as those that were trained on (a resize of another kind is worth more Frechet distance than a
model); captions and labels from the Parquet files beside them. Of a run on latents the pictures too
are read there, and resized in the same way: what the autoencoder loses counts against a model. So
are those of a run of several shapes, to the main one, in which models are asked for pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import torch
from torch import Tensor

from atoll.core.errors import DataError, Refused
from atoll.core.manifest import Manifest, Picture
from atoll.core.pack import Pack
from atoll.core.pictures import decode, training_pixels
from atoll.core.storage import Storage
from atoll.evaluate.features import to_uint8

HELD_OUT = "held-out"
TRAIN = "train"


@dataclass(frozen=True)
class Records:
    """Real pictures, uint8 `(n, channel, height, width)`, and what is known of each."""

    pictures: Tensor
    captions: tuple[str, ...]
    labels: tuple[str | None, ...]
    shards: tuple[str, ...]  # "commons" for the commons

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int]) -> Records:
        """Some of the records, in the order of `rows`."""
        return Records(
            self.pictures[torch.tensor(list(rows), dtype=torch.long)],
            tuple(self.captions[row] for row in rows),
            tuple(self.labels[row] for row in rows),
            tuple(self.shards[row] for row in rows),
        )


def load_records(run: Storage, manifest: Manifest, *, split: str = HELD_OUT) -> Records:
    """All records of a split, shard by shard and the commons last; `DataError` when empty."""
    folders = {name: shard.path for name, shard in sorted(manifest.shards.items())}
    folders["commons"] = manifest.commons.path
    several = manifest.picture if manifest.buckets else None
    size = several if manifest.vae is None else manifest.vae.picture
    parts = [_read(run.local(path), name, split, size) for name, path in folders.items()]
    records = Records(
        torch.cat([part.pictures for part in parts]),
        tuple(caption for part in parts for caption in part.captions),
        tuple(label for part in parts for label in part.labels),
        tuple(shard for part in parts for shard in part.shards),
    )
    if not len(records):
        raise DataError(
            f"The run at {run.uri} has no {split} records",
            cure="partition with --holdout above 0",
        )
    return records


def _read(folder: Path, shard: str, split: str, size: Picture | None) -> Records:
    pack = Pack(folder)
    rows = {HELD_OUT: pack.held_out, TRAIN: pack.train}[split]
    files = [name for name in sorted(pack.card.files) if name.endswith(".parquet")]
    columns = ["caption", "label", "split", *(["image"] if size is not None else [])]
    found = [
        row
        for name in files
        for row in pyarrow.parquet.read_table(folder / name, columns=columns).to_pylist()
        if row["split"] == split
    ]
    if len(found) != len(rows):
        raise Refused(
            f"{folder} holds {len(found)} {split} records and {len(rows)} packed ones",
            cure="restore the folder from a copy, or partition again",
        )
    if size is None:
        pictures = to_uint8(pack.x_data(torch.tensor(rows, dtype=torch.long)))
    else:
        pictures = torch.empty((len(found), *size.shape), dtype=torch.uint8)
        for place, row in enumerate(found):
            image = decode(row["image"])
            pictures[place] = training_pixels(image, (size.height, size.width), size.channels)
    return Records(
        pictures,
        tuple(str(row["caption"]) for row in found),
        tuple(None if row["label"] is None else str(row["label"]) for row in found),
        (shard,) * len(found),
    )
