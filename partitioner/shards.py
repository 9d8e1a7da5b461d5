"""Writes the folder of a shard or of the commons: records, training tensors, card.

`data-*.parquet` holds the original bytes and is the source of truth; `pack-*.safetensors` beside
it the same rows as `core/pack.py` defines them, and the digests by which these are read in parts.
Nothing in the folder depends on another shard. Where there are buckets a file holds records of one,
which are in order by split, by bucket and by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from atoll.core.blocks import write_blocks
from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.digest import sha256_file
from atoll.core.embedding import Encoder
from atoll.core.journal import progress
from atoll.core.latents import Autoencoder
from atoll.core.manifest import PIXELS, Picture
from atoll.core.pack import LABELS_NAME, ShardCard, write_pack, write_shard_card
from atoll.core.pictures import training_pixels
from atoll.core.storage import Storage
from atoll.partitioner.buckets import nearest
from atoll.partitioner.records import TRAIN, Record, Spool, canonical, split_of
from atoll.partitioner.settings import PartitionConfig

_ROW_GROUP = 256
_TEXT_BATCH = 256
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("owner", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardWriter:
    """What all folders of a run have in common."""

    run: Storage
    spool: Spool
    encoder: Encoder
    autoencoder: Autoencoder | None
    picture: Picture  # in pixels; of several shapes the main one
    buckets: Sequence[Picture]  # likewise, all shapes; empty where there is one
    config: PartitionConfig

    def shape(self, picture: Picture) -> Picture:
        """The shape of a picture's training tensor."""
        return picture if self.autoencoder is None else self.autoencoder.latents_of(picture)

    @cached_property
    def latent_space(self) -> str:
        return PIXELS if self.autoencoder is None else self.autoencoder.latent_space

    def write(
        self,
        folder: str,
        name: str,
        records: Sequence[Record],
        *,
        labels: Mapping[str, int] | None = None,
    ) -> ShardCard:
        """Write `folder` with the given records, in canonical order; its card.

        `labels` are numbers by record, for `labels.safetensors` (`core/pack.py`).
        """
        ordered = canonical(records, self.config.holdout)
        training = sum(split_of(record, self.config.holdout) == TRAIN for record in ordered)
        splits = [ordered[:training], ordered[training:]] if self.buckets else [ordered]
        parts = [part for records in splits for part in self._files(records)]
        packs, shapes = {}, {}
        with self.run.writing_folder(folder) as place:
            with progress(f"writing {name}", len(ordered)) as advance:
                for number, (picture, part) in enumerate(parts):
                    pack = f"pack-{number:05d}.safetensors"
                    self._write_records(place / f"data-{number:05d}.parquet", part)
                    self._write_pack(place / pack, part, picture)
                    packs[pack], shapes[pack] = len(part), self.shape(picture)
                    advance(len(part))
            if labels is not None:
                numbers = [labels[record.id] for _, part in parts for record in part]
                save_file({"label": torch.tensor(numbers)}, place / LABELS_NAME)
            write_blocks(place, list(packs))
            card = ShardCard(
                name=name,
                records=training,
                held_out=len(ordered) - training,
                picture=self.shape(self.picture),
                encoder=self.encoder.fingerprint(),
                latent_space=self.latent_space,
                flips=self.config.flips,
                packs=packs,
                files={file.name: sha256_file(file) for file in sorted(place.iterdir())},
                shapes=shapes if self.buckets else None,
            )
            write_shard_card(place, card)
        return card

    def _files(self, records: Sequence[Record]) -> Iterator[tuple[Picture, Sequence[Record]]]:
        """The records of each file in their order, and the shape of its pictures."""
        groups = [(self.picture, records)]
        if self.buckets:
            sizes = [(picture.height, picture.width) for picture in self.buckets]
            given = [nearest(record.size, sizes) for record in records]
            groups = [
                (picture, [r for r, index in zip(records, given, strict=True) if index == mine])
                for mine, picture in enumerate(self.buckets)
            ]
        step = self.config.records_per_file
        for picture, group in groups:
            for start in range(0, len(group), step):
                yield picture, group[start : start + step]

    def _write_records(self, path: Path, records: Sequence[Record]) -> None:
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for start in range(0, len(records), _ROW_GROUP):
                part = records[start : start + _ROW_GROUP]
                columns = {
                    "id": [record.id for record in part],
                    "image": [self.spool.read(record) for record in part],
                    "caption": [record.caption for record in part],
                    "label": [record.label for record in part],
                    "owner": [record.owner for record in part],
                    "split": [split_of(record, self.config.holdout) for record in part],
                }
                writer.write_table(pa.table(columns, schema=SCHEMA))

    def _write_pack(self, path: Path, records: Sequence[Record], picture: Picture) -> None:
        size = (picture.height, picture.width)
        pixels = torch.empty((len(records), *picture.shape), dtype=torch.uint8)
        for row, record in enumerate(records):
            pixels[row] = training_pixels(self.spool.picture(record), size, picture.channels)
        captions = ["", *sorted({record.caption for record in records} - {""})]
        where = {caption: row for row, caption in enumerate(captions)}
        caption = torch.tensor([where[record.caption] for record in records])
        table = self._table(captions)
        if self.autoencoder is None:
            write_pack(path, pixels, caption, table)
            return
        mirrored = self.autoencoder.encode(pixels.flip(-1)) if self.config.flips else None
        write_pack(path, self.autoencoder.encode(pixels), caption, table, mirrored=mirrored)

    def _table(self, captions: Sequence[str]) -> Conditioning:
        """Embedded captions; halved at once, since tokens of a large encoder are most of a pack."""
        parts = []
        for start in range(0, len(captions), _TEXT_BATCH):
            part = self.encoder.condition(captions[start : start + _TEXT_BATCH])
            parts.append(Conditioning(_half(part.tokens), part.mask, part.pooled, part.is_null))
        return concatenate(parts)


def _half(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16)
