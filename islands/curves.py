"""Every island's curves for those who look elsewhere: TensorBoard, and a tracker if asked.

Reads `metrics.jsonl`, so that a step knows nothing of it, and writes one events file per shard,
whose bytes follow from the metrics alone: steps are images_seen and every wall time is 0.
TensorBoard's package is not needed to write it. Format: `tensorflow.Event` messages as TFRecord,
https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from atoll.core.errors import MissingError
from atoll.core.journal import log
from atoll.core.storage import Storage
from atoll.islands.signs import HEAD_TRAINING, island_folder

_EVERY_SECONDS = 10.0
# TensorBoard takes any file with this in its name.
EVENTS = "tensorboard/events.out.tfevents.0000000000.atoll"
_PLACES = {"expert": "", "gate_head": f"/{HEAD_TRAINING}"}

Point = tuple[str, int, float]
"""A tag, the images seen, and the value there."""


class Tracker(Protocol):
    """What both trackers' modules offer, which trackio took from wandb."""

    def init(self, **given: Any) -> Any: ...


def tracker_of(name: str | None) -> Tracker | None:
    """The module of a tracker that was asked for; none is ever chosen because it is there."""
    if name is None:
        return None
    try:
        if name == "wandb":
            import wandb as module
        else:
            import trackio as module
    except ImportError as error:
        raise MissingError(
            f"watch.tracker is {name}, which is not installed", cure=f"pip install {name}"
        ) from error
    found: Tracker = module
    return found


def points(run: Storage, shard: str) -> list[Point]:
    """All that the metrics of a shard say so far."""
    found: list[Point] = []
    for part, below in _PLACES.items():
        for line in run.read_lines(f"{island_folder(shard)}{below}/metrics.jsonl"):
            seen = line.get("images_seen")
            if isinstance(seen, int):
                for key, value in sorted(line.items()):
                    found += [
                        (f"{part}/{tag}", seen, float(number))
                        for tag, number in _numbers(key, value)
                        if tag != "images_seen" and isinstance(number, int | float)
                    ]
    return found


def _numbers(key: str, value: object) -> list[tuple[str, object]]:
    """A number by its name, or those of a list (the loss by bins of t) one by one."""
    if isinstance(value, list):
        return [(f"{key}/{index}", each) for index, each in enumerate(value)]
    return [(key, value)]


class Curves:
    """Keeps the curves of some shards up to date while they are trained."""

    def __init__(self, run: Storage, shards: Sequence[str], tracker: str | None = None) -> None:
        self._run = run
        self._counts = dict.fromkeys(shards, 0)
        self._name = tracker
        self._tracker = tracker_of(tracker)
        self._sent: dict[str, dict[str, int]] = {shard: {} for shard in shards}
        self._runs: dict[str, Any] = {}
        self._due = 0.0

    def update(self, *, now: bool = False) -> None:
        """Write what is new, every few seconds or at once."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY_SECONDS
        for shard, count in self._counts.items():
            found = points(self._run, shard)
            if found and len(found) != count:
                self._counts[shard] = len(found)
                self._run.write_bytes(f"{island_folder(shard)}/{EVENTS}", events(found))
                if self._tracker is not None:
                    self._track(shard, found)

    def close(self) -> None:
        """Write the last points and end the tracker's runs."""
        try:
            self.update(now=True)
        finally:
            for run in self._runs.values():
                run.finish()

    def _track(self, shard: str, found: list[Point]) -> None:
        assert self._tracker is not None
        try:
            if shard not in self._runs:
                given = {"project": "atoll", "name": shard}
                if self._name == "wandb":  # one process, a run per shard
                    given["reinit"] = "create_new"
                self._runs[shard] = self._tracker.init(**given)
            for tag, seen, value in found:
                if seen > self._sent[shard].get(tag, -1):
                    self._sent[shard][tag] = seen
                    self._runs[shard].log({tag: value, "images_seen": seen})
        except Exception as error:  # nobody's training ends because a tracker does
            log.warning("the tracker failed and is left alone: %s", error)
            self._tracker = None


def events(found: Iterable[Point]) -> bytes:
    """An events file: the version record, then one scalar per point."""
    records = [_record(_field(3, b"brain.Event:2"))]
    for tag, seen, value in found:
        # Event: step = 2, summary = 5; Summary: value = 1; Value: tag = 1, simple_value = 2.
        scalar = _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
        records.append(_record(b"\x10" + _varint(seen) + _field(5, _field(1, scalar))))
    return b"".join(records)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protocol buffer field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _masked(length) + event + _masked(event)


def _masked(data: bytes) -> bytes:
    """TFRecord's mask over CRC-32C (Castagnoli, RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


_CRC = _table()
