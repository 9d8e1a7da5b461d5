"""`partition/report.html`: sizes, distances, a montage and the telling words of every shard.

Made of the shards' own files and `partition/` alone, without clocks or paths, so that writing it
again after a shard's files are gone gives the page that never knew the shard.
"""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageOps

from atoll.core.pack import ShardCard, read_shard_card
from atoll.core.pictures import decode
from atoll.core.storage import Storage
from atoll.partitioner.assignments import COMMONS, Assigned, read_assignments, read_unreadable
from atoll.partitioner.placement import is_skewed
from atoll.partitioner.previous import saved_config
from atoll.partitioner.records import TRAIN
from atoll.partitioner.words import count_words, telling_words

REPORT_NAME = "partition/report.html"
_TILE, _COLUMNS, _ROWS = 48, 8, 4
_WORDS = 8
_BINS = 24
_LISTED_TWINS = 12


@dataclass(frozen=True)
class Spread:
    """Of distances or margins: a tenth, half and nine tenths lie below; a histogram's heights."""

    low: float
    middle: float
    high: float
    bars: list[float]


@dataclass(frozen=True)
class Section:
    """What the page shows of a shard or of the commons."""

    name: str
    train: int
    held_out: int
    share: float  # of all records of the run
    width: float  # of its bar, 1 for the largest
    distance: Spread | None
    margin: Spread | None
    words: list[str]
    montage: str  # PNG, base64
    shown: int
    shapes: list[tuple[str, int]]  # and how many records are of each; empty where there is one

    @property
    def records(self) -> int:
        return self.train + self.held_out


def write_report(run: Storage) -> None:
    """Write the page from what the other files of the run say."""
    page = _environment().from_string(_template()).render(**_context(run))
    run.write_bytes(REPORT_NAME, page.encode())


def _template() -> str:
    return Path(__file__).with_name("report.html").read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    return environment


def _context(run: Storage) -> dict[str, Any]:
    rows: dict[str, list[Assigned]] = defaultdict(list)
    for row in read_assignments(run):
        rows[row.shard].append(row)
    names = [*sorted(set(rows) - {COMMONS}), COMMONS]
    folders = {name: _folder(name) for name in names}
    cards = {name: read_shard_card(run.local(folders[name])) for name in names}
    captions = {name: _captions(run, folders[name], cards[name]) for name in names}
    words = telling_words(
        {name: count_words(captions[name]) for name in names},
        {name: captions[name].total() for name in names},
        most=_WORDS,
    )
    sections = [
        _section(
            name, rows, words[name], _montage(run, folders[name], cards[name]), _shapes(cards[name])
        )
        for name in names
    ]
    private = [section for section in sections if section.name != COMMONS]
    config = saved_config(run)
    return {
        "commons": sections[-1],
        "shards": private,
        "sections": sections,
        "skewed": is_skewed([section.records for section in private]),
        "largest": max((section.share for section in private), default=0.0),
        "smallest": min((section.share for section in private), default=0.0),
        "total": sum(section.records for section in sections),
        "private": sum(section.records for section in private),
        "held_out": sum(section.held_out for section in sections),
        "twins": _twins(rows),
        "most_twins": _LISTED_TWINS,
        "unreadable": Counter(str(row["reason"]) for row in read_unreadable(run)).most_common(),
        "config": config,
        "picture": cards[COMMONS].picture,
        "encoder": cards[COMMONS].encoder,
    }


def _folder(name: str) -> str:
    return COMMONS if name == COMMONS else f"shards/{name}"


def _section(
    name: str,
    rows: dict[str, list[Assigned]],
    words: list[str],
    montage: tuple[str, int],
    shapes: list[tuple[str, int]],
) -> Section:
    here = rows[name]
    everything = [row for group in rows.values() for row in group]
    train = sum(row.split == TRAIN for row in here)
    largest = max(len(group) for group in rows.values())
    return Section(
        name=name,
        train=train,
        held_out=len(here) - train,
        share=len(here) / len(everything),
        width=len(here) / largest,
        distance=_spread([r.distance for r in here], [r.distance for r in everything]),
        margin=_spread([r.margin for r in here], [r.margin for r in everything]),
        words=words,
        montage=montage[0],
        shown=montage[1],
        shapes=shapes,
    )


def _spread(values: Sequence[float | None], all_values: Sequence[float | None]) -> Spread | None:
    """The histogram reaches from 0 to the largest of all values, so that shards compare."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return None
    largest = max(value for value in all_values if value is not None)
    low, middle, high = (float(value) for value in np.quantile(known, (0.1, 0.5, 0.9)))
    counts, _ = np.histogram(known, bins=_BINS, range=(0.0, largest or 1.0))
    return Spread(low, middle, high, [round(float(bar), 3) for bar in counts / counts.max()])


def _captions(run: Storage, folder: str, card: ShardCard) -> Counter[str]:
    """How often each caption occurs."""
    found: Counter[str] = Counter()
    for name in _data_files(card):
        table = pq.read_table(run.local(f"{folder}/{name}"), columns=["caption"])
        found.update(table.column("caption").to_pylist())
    return found


def _data_files(card: ShardCard) -> list[str]:
    return sorted(name for name in card.files if name.endswith(".parquet"))


def _shapes(card: ShardCard) -> list[tuple[str, int]]:
    """The shapes of a folder with buckets, each with how many of its records are of it."""
    found: Counter[str] = Counter()
    for name, picture in (card.shapes or {}).items():
        found[picture.size] += card.packs[name]
    return found.most_common()


def _montage(run: Storage, folder: str, card: ShardCard) -> tuple[str, int]:
    """A sheet of the first records, which ids make a random sample: base64 PNG, and how many.

    Where there are buckets, of the first records of each shape.
    """
    first: dict[str, int] = {}
    for number, picture in enumerate((card.shapes or {}).values()):
        first.setdefault(picture.size, number)
    numbers = list(first.values())[: _COLUMNS * _ROWS] or [0]
    images = []
    for number in numbers:
        table = pq.ParquetFile(run.local(f"{folder}/data-{number:05d}.parquet"))
        most = _COLUMNS * _ROWS // len(numbers)
        batch = next(table.iter_batches(batch_size=most, columns=["image"]))
        images += batch.column("image").to_pylist()
    sheet = Image.new("RGBA", (_COLUMNS * _TILE, -(-len(images) // _COLUMNS) * _TILE))
    for number, data in enumerate(images):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(_tile(decode(data)), (column * _TILE, row * _TILE))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=False)
    return base64.b64encode(buffer.getvalue()).decode(), len(images)


def _tile(image: Image.Image) -> Image.Image:
    """Small pictures are enlarged by whole pixels, large ones are resampled."""
    small = max(image.size) < _TILE
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (_TILE, _TILE), method)


def _twins(rows: dict[str, list[Assigned]]) -> list[tuple[list[str], int]]:
    """Groups of shards that hold the same picture with the same caption, and how many of them."""
    places: dict[str, set[str]] = defaultdict(set)
    for name, group in rows.items():
        for row in group:
            places[row.content].add(name)
    groups = Counter(tuple(sorted(names)) for names in places.values() if len(names) > 1)
    return [
        (list(names), count)
        for names, count in sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    ]
