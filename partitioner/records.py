"""Rows -> records: content ids, the split by hash, duplicates, and what cannot be read.

Original bytes wait in a spool on local disk, so that each later step can take them in the order it
needs without holding a corpus in memory. Every decision here is a function of the record itself,
or of it and the commons: no private record decides for a record of another shard.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from PIL import Image

from atoll.core import seeds
from atoll.core.disk import no_space_is_failure
from atoll.core.errors import DataError, UsageError, did_you_mean
from atoll.core.journal import log, progress
from atoll.core.pictures import UnreadableImage, decode
from atoll.partitioner.readers import Row, Source, open_source
from atoll.partitioner.settings import PartitionConfig, commons_fraction, names_a_corpus

Split = Literal["train", "held-out"]
TRAIN: Split = "train"
HELD_OUT: Split = "held-out"
_LISTED = 10


@dataclass(frozen=True, slots=True)
class Record:
    """One training example; its bytes are in the spool.

    `id` is the hash of everything that it holds, `content` of picture and caption alone: two
    records of one content are duplicates, whoever owns them.
    """

    id: str
    content: str
    caption: str
    label: str | None
    owner: str | None
    offset: int
    length: int
    size: tuple[int, int]  # height and width of the picture


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row without a usable picture: its id, why, and whose it is."""

    id: str
    reason: str
    owner: str | None
    commons: bool = False


@dataclass
class Scan:
    """All that one pass over a corpus found."""

    uri: str
    rows: int = 0
    uncaptioned: int = 0
    records: list[Record] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Gathered:
    """The commons and the private records, readable, in the order of their ids.

    No content is twice in the commons, and none of the commons is among the private records.
    """

    commons: list[Record]
    private: list[Record]
    unreadable: list[Unreadable]


class Spool:
    """Original bytes, appended once and read at random, in a file that vanishes by itself."""

    def __init__(self) -> None:
        # The name is gone at once, so that a killed process leaves nothing behind.
        self._file = tempfile.TemporaryFile(prefix="atoll-spool-")  # noqa: SIM115
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, data: bytes) -> int:
        """Keep the bytes; where they begin."""
        with no_space_is_failure("the spool of the corpus"):
            self._file.write(data)
        start, self._end = self._end, self._end + len(data)
        return start

    def read(self, record: Record) -> bytes:
        """The original bytes of a record."""
        self._file.flush()
        return os.pread(self._file.fileno(), record.length, record.offset)

    def picture(self, record: Record) -> Image.Image:
        """The decoded picture of a record, RGB."""
        return decode(self.read(record))


def digest(*parts: bytes | str | None) -> str:
    """Hex sha256 of parts, each with its length, so that no two lists of parts read the same."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(b"-" if data is None else b"%d:" % len(data))
        hasher.update(data or b"")
    return hasher.hexdigest()


def record_id(row: Row) -> str:
    """The id of a row: of its picture's bytes, caption, label and owner."""
    return digest(row.image, row.caption, row.label, row.owner)


def split_of(record: Record, holdout: float) -> Split:
    """Which side of the split a record is on, for ever, wherever it goes."""
    return HELD_OUT if seeds.fraction(record.id, salt="held-out") < holdout else TRAIN


def canonical(records: Iterable[Record], holdout: float) -> list[Record]:
    """Training records in the order of their ids, then the held-out ones in theirs."""
    return sorted(records, key=lambda record: (split_of(record, holdout) == HELD_OUT, record.id))


def without_duplicates(records: Iterable[Record]) -> list[Record]:
    """By id, one record of each content: the one with the smallest id."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record.id):
        first.setdefault(record.content, record)
    return list(first.values())


# -- one pass over a corpus ----------------------------------------------------------------------


def scan(source: Source, spool: Spool) -> Scan:
    """Read and decode every row once."""
    found = Scan(source.uri)
    with progress(f"reading {source.uri}", source.rows) as advance:
        for row in source.read():
            found.rows += 1
            found.uncaptioned += not row.caption
            try:
                picture = decode(row.image)
            except UnreadableImage as error:
                found.unreadable.append(Unreadable(record_id(row), str(error), row.owner))
                found.complaints.append(f"{row.where}: {error}")
            else:
                found.records.append(_record(row, spool, (picture.height, picture.width)))
            advance(1)
    return found


def _record(row: Row, spool: Spool, size: tuple[int, int]) -> Record:
    return Record(
        id=record_id(row),
        content=digest(row.image, row.caption),
        caption=row.caption,
        label=row.label,
        owner=row.owner,
        offset=spool.append(row.image),
        length=len(row.image),
        size=size,
    )


def _check(found: Scan, config: PartitionConfig) -> None:
    """Refuse a corpus that is empty, unreadable beyond the stated share or without captions."""
    if found.rows == 0:
        raise DataError(f"{found.uri} is empty: it has no rows")
    bad, listed = len(found.unreadable), "; ".join(found.complaints[:_LISTED])
    more = f"; and {bad - _LISTED} more" if bad > _LISTED else ""
    if bad > config.max_unreadable * found.rows or not found.records:
        raise DataError(
            f"{bad} of {found.rows} pictures of {found.uri} are unreadable: {listed}{more}",
            allowed=f"at most {config.max_unreadable:.1%}",
            cure="repair or leave out those pictures, or raise --set max_unreadable=SHARE",
        )
    if bad:
        log.warning("%d of %d pictures are unreadable: %s%s", bad, found.rows, listed, more)
    if found.uncaptioned > config.max_uncaptioned * found.rows:
        raise DataError(
            f"{found.uncaptioned} of {found.rows} rows of {found.uri} have no caption",
            allowed=f"at most {config.max_uncaptioned:.1%}",
            cure="name the right column with --set columns.caption=NAME, or raise "
            "--set max_uncaptioned=SHARE",
        )
    if found.uncaptioned:
        log.warning("%d of %d rows have no caption", found.uncaptioned, found.rows)


# -- commons and private -------------------------------------------------------------------------


def gather(corpus: str, spool: Spool, config: PartitionConfig) -> Gathered:
    """Read the corpus, and the second one if the commons is one, and divide them."""
    source = open_source(corpus, config)  # both are found before either is read
    by_uri = commons_fraction(config) is None and names_a_corpus(config.commons)
    second = open_source(config.commons, _second(config)) if by_uri else None
    found = scan(source, spool)
    _check(found, config)
    if config.by_owner:
        _check_owners(found, config)
    if second is None:
        commons, private = _divide(found.records, config)
        owners = {record.owner for record in commons} if config.by_owner else set()
        unreadable = [
            Unreadable(bad.id, bad.reason, bad.owner, commons=bad.owner in owners)
            for bad in found.unreadable
        ]
    else:
        public = scan(second, spool)
        _check(public, config)
        commons, private = public.records, found.records
        unreadable = found.unreadable + [
            Unreadable(bad.id, bad.reason, bad.owner, commons=True) for bad in public.unreadable
        ]
    commons = without_duplicates(commons)
    shared = {record.content for record in commons}
    # The commons wins: what everybody may see needs no removal, and the twin that survives must
    # not depend on a shard.
    kept = [record for record in private if record.content not in shared]
    if len(kept) < len(private):
        log.info("%d private records repeat the commons and are dropped", len(private) - len(kept))
    _check_sizes(commons, kept, config)
    unreadable = sorted(unreadable, key=lambda bad: (bad.id, bad.commons))
    return Gathered(commons, sorted(kept, key=lambda record: record.id), unreadable)


def _second(config: PartitionConfig) -> PartitionConfig:
    """How to read a commons of its own: it need not have the owners' column."""
    columns = config.columns.model_copy(update={"owner": None})
    return config.model_copy(update={"by": "clusters", "columns": columns})


def _divide(
    records: Sequence[Record], config: PartitionConfig
) -> tuple[list[Record], list[Record]]:
    """Commons and private records of one corpus, by hash or by owner."""
    fraction = commons_fraction(config)
    if fraction is not None:
        is_public = [seeds.fraction(record.id, salt="commons") < fraction for record in records]
    else:
        named = _named_owners(records, config)
        is_public = [record.owner in named for record in records]
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record, public in zip(records, is_public, strict=True):
        sides[0 if public else 1].append(record)
    return sides


def _named_owners(records: Iterable[Record], config: PartitionConfig) -> set[str]:
    owners = sorted({record.owner for record in records if record.owner is not None})
    named = {name.strip() for name in config.commons.split(",") if name.strip()}
    for name in sorted(named.difference(owners)):
        raise UsageError(
            f"--commons names '{name}', and no record has that {config.by}. "
            f"{did_you_mean(name, owners)}".strip(),
            allowed=", ".join(owners[:20]) + (", ..." if len(owners) > 20 else ""),
        )
    return named


def _check_owners(found: Scan, config: PartitionConfig) -> None:
    nameless = sum(record.owner is None for record in found.records)
    if nameless:
        raise DataError(
            f"{nameless} of {len(found.records)} records have no {config.by}",
            cure=f"fill in the column '{config.by}', or leave those records out",
        )


def _check_sizes(
    commons: Sequence[Record], private: Sequence[Record], config: PartitionConfig
) -> None:
    if not private:
        raise DataError(
            "No private records are left beside the commons", cure="give a smaller --commons"
        )
    if config.shards is not None and len(private) < config.shards:
        raise DataError(
            f"--shards {config.shards} is more than the {len(private)} private records",
            allowed=f"1 to {len(private)}",
        )
    training = sum(split_of(record, config.holdout) == TRAIN for record in commons)
    if training < max(2, config.shards or 0):
        raise DataError(
            f"The commons has {training} records to train on, too few to fit an encoder"
            + (f" and {config.shards} centroids" if config.shards else ""),
            cure="give a larger --commons, or a larger corpus",
        )
