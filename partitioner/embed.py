"""Pictures -> unit vectors, such that a record's vector depends on that record alone.

A matrix product may round a row differently in a batch of another shape: after a removal the
records that stay would stand in other batches and move by a last bit. So every batch has one fixed
shape, and a probe shows that a row's place in it does not matter; where it does, pictures are
embedded one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atoll.core.embedding import Encoder, encoder_from_spec, fit
from atoll.core.journal import log, progress
from atoll.partitioner.records import Record, Spool
from atoll.partitioner.settings import PartitionConfig

Floats = NDArray[np.float32]
BATCH = 64


class _Pictures(Sequence[Image.Image]):
    """Pictures of records, decoded as they are asked for."""

    def __init__(self, records: Sequence[Record], spool: Spool) -> None:
        self._records = records
        self._spool = spool

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        return self._spool.picture(self._records[index])


def make_encoder(training: Sequence[Record], spool: Spool, config: PartitionConfig) -> Encoder:
    """The encoder that `--encoder` names, or one fitted on the training records given."""
    if config.encoder != "fit":
        return encoder_from_spec(config.encoder)
    captions = [record.caption for record in training]
    return fit(_Pictures(training, spool), captions, config.fit, seed=config.seed)


class Embedder:
    """Embeds records by an encoder, reproducibly record by record."""

    def __init__(self, encoder: Encoder, spool: Spool, probe: Sequence[Record]) -> None:
        self._encoder = encoder
        self._spool = spool
        self._batch = BATCH if self._place_is_nothing(probe[:4]) else 1
        if self._batch == 1:
            log.warning("this machine rounds by the place in a batch; embedding one by one")

    def _place_is_nothing(self, probe: Iterable[Record]) -> bool:
        """Whether one picture in every place of a batch gives one and the same vector."""
        for record in probe:
            rows = self._encoder.embed_images([self._spool.picture(record)] * BATCH)
            if not bool((rows == rows[0]).all()):
                return False
        return True

    def __call__(self, records: Sequence[Record]) -> Floats:
        """Unit vectors `(n, dim)` of all records."""
        return np.concatenate(list(self.batches(records)))

    def batches(self, records: Sequence[Record]) -> Iterator[Floats]:
        """Unit vectors, some rows at a time."""
        with progress("embedding", len(records)) as advance:
            for start in range(0, len(records), self._batch):
                part = [self._spool.picture(r) for r in records[start : start + self._batch]]
                padded = part + part[-1:] * (self._batch - len(part))
                rows: Floats = self._encoder.embed_images(padded).numpy()[: len(part)]
                advance(len(part))
                yield rows
