"""Which shard each record goes to: the nearest centroid's, or its owner's.

Besides which of several contents a record of the commons has, which the gate's trunk is taught.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atoll.core.errors import DataError
from atoll.core.journal import log
from atoll.partitioner.assignments import COMMONS, Assigned, cluster_name, owner_names
from atoll.partitioner.cluster import Centroids, assign, fit_centroids
from atoll.partitioner.embed import Embedder
from atoll.partitioner.records import (
    TRAIN,
    Gathered,
    Record,
    split_of,
    without_duplicates,
)
from atoll.partitioner.settings import PartitionConfig

_SKEW = 4.0
_CONTENTS = 16  # of a commons whose shards are owners, at most


@dataclass(frozen=True)
class Placement:
    """The records of each shard, without duplicates, and a row for each record of the run."""

    shards: dict[str, list[Record]]
    rows: list[Assigned]
    contents: dict[str, int]  # record of the commons -> its nearest centroid


def place_by_owner(gathered: Gathered, embed: Embedder, config: PartitionConfig) -> Placement:
    """Every owner is a shard."""
    names = owner_names(str(record.owner) for record in gathered.private)
    rows = [_row(record, names[str(record.owner)], config) for record in gathered.private]
    rows += [_row(record, COMMONS, config) for record in gathered.commons]
    placed = _grouped(gathered.private, rows, {}, config)  # may refuse, before anything is embedded
    return replace(placed, contents=_contents(gathered.commons, embed, config))


def _contents(
    commons: Sequence[Record], embed: Embedder, config: PartitionConfig
) -> dict[str, int]:
    """The commons cut by centroids of its own training records, none of them a shard's."""
    vectors = embed(commons)
    training = vectors[[split_of(record, config.holdout) == TRAIN for record in commons]]
    distinct = len(np.unique(training, axis=0))
    count = max(1, min(_CONTENTS, distinct // config.clusters.records_per_fine))
    centroids = fit_centroids(training, count, config.clusters, seed=config.seed)
    nearest = assign(vectors, centroids.coarse).index.tolist()
    return dict(zip((record.id for record in commons), nearest, strict=True))


def place_by_clusters(
    gathered: Gathered, centroids: Centroids, embed: Embedder, config: PartitionConfig
) -> Placement:
    """Every record goes to its nearest coarse centroid; the commons is measured and stays."""
    records = gathered.commons + gathered.private
    rows: list[Assigned] = []
    contents: dict[str, int] = {}
    for vectors in embed.batches(records):
        found = assign(vectors, centroids.coarse)
        for nearest, distance, margin in zip(
            found.index, found.distance, found.margin, strict=True
        ):
            number = len(rows)
            private = number >= len(gathered.commons)
            shard = cluster_name(int(nearest)) if private else COMMONS
            row = _row(records[number], shard, config)
            known = None if math.isnan(margin) else float(margin)
            rows.append(replace(row, distance=float(distance), margin=known))
            if not private:
                contents[records[number].id] = int(nearest)
    return _grouped(gathered.private, rows, contents, config)


def training_only(records: Sequence[Record], config: PartitionConfig) -> list[Record]:
    """The records that something may be trained on."""
    return [record for record in records if split_of(record, config.holdout) == TRAIN]


def fitted_centroids(
    fitting: Sequence[Record], embed: Embedder, config: PartitionConfig
) -> Centroids:
    """Centroids of the given training records."""
    assert config.shards is not None, "check_options asks for it"
    return fit_centroids(embed(fitting), config.shards, config.clusters, seed=config.seed)


def is_skewed(records: Sequence[int]) -> bool:
    """Whether the largest shard holds several times what the smallest does."""
    return len(records) > 1 and max(records) > _SKEW * min(records)


def _row(record: Record, shard: str, config: PartitionConfig) -> Assigned:
    return Assigned(record.id, record.content, shard, split_of(record, config.holdout))


def _grouped(
    private: Sequence[Record],
    rows: Sequence[Assigned],
    contents: dict[str, int],
    config: PartitionConfig,
) -> Placement:
    """Drop duplicates within each shard; across shards they are only listed."""
    place = {row.record: row.shard for row in rows}
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in private:
        groups[place[record.id]].append(record)
    shards = {name: without_duplicates(groups[name]) for name in sorted(groups)}
    dropped = len(private) - sum(map(len, shards.values()))
    if dropped:
        log.info("%d duplicates within shards are dropped", dropped)
    for name, records in shards.items():
        # Its island would have nothing to train on, and one record less must not decide silently.
        if not training_only(records, config):
            raise DataError(
                f"Shard '{name}' has {len(records)} records, all of them held out by their hash",
                cure="give fewer --shards, a smaller --holdout, or leave those records out",
            )
    kept = {record.id for records in shards.values() for record in records}
    by_id = {row.record: row for row in rows if row.shard == COMMONS or row.record in kept}
    return Placement(shards, list(by_id.values()), contents)
