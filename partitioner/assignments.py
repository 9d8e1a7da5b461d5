"""`partition/assignments.parquet` and `partition/unreadable.json`: which record went where.

Rows stand in the order of record ids and each depends on its own record (and the centroids) alone,
so taking a shard's rows out gives the file that would have been written without the shard.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atoll.core.errors import DataError, Refused
from atoll.core.storage import Storage
from atoll.partitioner.records import Split, Unreadable

COMMONS = "commons"
ASSIGNMENTS_NAME = "partition/assignments.parquet"
UNREADABLE_NAME = "partition/unreadable.json"
_SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("content", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        ("distance", pa.float32()),
        ("margin", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Assigned:
    """Where one record went; `shard` is "commons" for the commons.

    `distance` is 1 - cosine to the shard's centroid and `margin` how much farther the second
    nearest is; None by owner, where there are no centroids.
    """

    record: str
    content: str
    shard: str
    split: Split
    distance: float | None = None
    margin: float | None = None


def write_assignments(run: Storage, rows: Iterable[Assigned]) -> None:
    """Write the file, sorted by record."""
    ordered = sorted(rows, key=lambda row: row.record)
    columns = {name: [getattr(row, name) for row in ordered] for name in _SCHEMA.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, compression="zstd")
    run.write_bytes(ASSIGNMENTS_NAME, buffer.getvalue())


def read_assignments(run: Storage) -> list[Assigned]:
    """All rows, sorted by record."""
    try:
        # Without threads: one that outlives Python aborts it at exit (apache/arrow issue 34314).
        data = pa.BufferReader(run.read_bytes(ASSIGNMENTS_NAME))
        table = pq.ParquetFile(data).read(use_threads=False)
        return [Assigned(**row) for row in table.cast(_SCHEMA).to_pylist()]
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise Refused(
            f"{run.uri}/{ASSIGNMENTS_NAME} is not readable ({str(error).splitlines()[0]})",
            cure="restore it from a copy; nothing was changed",
        ) from error


def write_unreadable(run: Storage, rows: Iterable[dict[str, Any]]) -> None:
    """Write the list of what could not be used."""
    ordered = sorted(rows, key=lambda row: (row["record"], str(row["shard"])))
    run.write_json(UNREADABLE_NAME, {"schema_version": 1, "unreadable": ordered})


def read_unreadable(run: Storage) -> list[dict[str, Any]]:
    """Rows of `record`, `reason` and `shard`, which is None where no shard can be told."""
    return list(run.read_json(UNREADABLE_NAME)["unreadable"])


def listed(unreadable: Sequence[Unreadable], *, by_owner: bool) -> list[dict[str, Any]]:
    """The rows of `unreadable.json`. Without a picture only an owner says which shard it was."""
    rows = []
    for bad in unreadable:
        shard = owner_slug(bad.owner) if by_owner and bad.owner else None
        place = COMMONS if bad.commons else shard
        rows.append({"record": bad.id, "reason": bad.reason, "shard": place})
    return rows


# -- names of shards -----------------------------------------------------------------------------


def cluster_name(index: int) -> str:
    """The shard of a coarse centroid; a centroid without records leaves a gap in the names."""
    return f"shard-{index:02d}"


def owner_slug(owner: str) -> str:
    """An owner's shard as a name for folders and jobs, a function of the owner alone."""
    plain = unicodedata.normalize("NFKD", owner).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:48].rstrip("-")
    return slug or f"owner-{sha256(owner.encode()).hexdigest()[:8]}"


def owner_names(owners: Iterable[str]) -> dict[str, str]:
    """Owner -> shard name; `DataError` where two owners would share one."""
    names: dict[str, str] = {}
    taken: dict[str, str] = {COMMONS: "the commons"}
    for owner in sorted(set(owners)):
        name = owner_slug(owner)
        if name in taken:
            raise DataError(
                f"The owners '{owner}' and '{taken[name]}' would both be shard '{name}'",
                allowed="owners that differ in their letters and digits",
                cure="rename one of them in the corpus",
            )
        names[owner] = taken[name] = name
    return names
