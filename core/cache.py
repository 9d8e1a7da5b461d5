"""A bounded cache on this machine's disk of blocks of files that lie afar, fetched ahead of need.

A training visits its records in an order that covers all files at once, and that never bends to
where they lie. So what is kept are small blocks, whatever was used last; and since the order is
known, the blocks of the coming batches are fetched in a thread while this one is learnt from. What
is read is the same bytes as from the files themselves, checked block by block.

The cache is one unnamed file in the folder for temporary files (`TMPDIR`): it goes with the
process, however that ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from atoll.core.blocks import BLOCK_BYTES, FarFile
from atoll.core.errors import ConfigError, Failed, Refused
from atoll.core.journal import log
from atoll.core.outage import at_once
from atoll.core.storage import Storage

Block = tuple[FarFile, int]
"""A file and the number of one of its blocks."""

_LEAST_BLOCKS = 64  # 4 MiB; with fewer what was fetched ahead would be gone before it is read
_AT_ONCE = 256  # blocks of one round trip
_LONGEST_RANGE = 64  # blocks of one request
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class BlockCache:
    """At most `gib` GiB of blocks; a file of a patient handle is waited for where that is away.

    For any number of files and threads. Nothing is on disk before a block is read.
    """

    def __init__(self, gib: float) -> None:
        self._file: int | None = None  # a descriptor
        self._capacity = int(gib * 2**30) // BLOCK_BYTES
        if self._capacity < _LEAST_BLOCKS:
            raise ConfigError(
                f"A cache of {gib:g} GiB cannot hold what is read at once",
                allowed=f"{_LEAST_BLOCKS * BLOCK_BYTES / 2**30:g} GiB or more",
                cure="raise cache_gib",
            )
        self._slots: OrderedDict[Block, int] = OrderedDict()  # the one used longest ago first
        self._coming: set[Block] = set()  # being fetched by some thread
        self._changed = threading.Condition()
        self._ahead: threading.Thread | None = None
        self.bytes_fetched = 0

    # -- reading ---------------------------------------------------------------------------------

    def read(self, file: FarFile, starts: Sequence[int], length: int) -> bytearray:
        """`length` bytes from each start on, one after another.

        Raises what its storage does, and `Refused` for a file that is gone or changed.
        """
        out = bytearray(len(starts) * length)
        wanted = _pieces(starts, length)
        while wanted:
            missing = self._take(file, wanted, out)
            for (_, number), data in self._fetched([(file, number) for number in missing]):
                for place, first, last in wanted.pop(number):
                    out[place : place + last - first] = data[first:last]
            if wanted and not missing:
                with self._changed:  # others are fetching the rest
                    self._changed.wait(1.0)
        return out

    def _take(self, file: FarFile, wanted: dict[int, list[_Piece]], out: bytearray) -> list[int]:
        """Copy and cross off what is here; claim and return the blocks that nobody fetches yet."""
        missing = []
        with self._changed:
            for number in list(wanted):
                block = (file, number)
                slot = self._slots.get(block)
                if slot is not None:
                    self._slots.move_to_end(block)
                    start = slot * BLOCK_BYTES
                    for place, first, last in wanted.pop(number):
                        out[place : place + last - first] = self._view[start + first : start + last]
                elif block not in self._coming:
                    self._coming.add(block)
                    missing.append(number)
        return missing

    # -- fetching --------------------------------------------------------------------------------

    def expect(self, blocks: Iterable[Block]) -> None:
        """Begin to fetch what will be read soon, the soonest first; a hint, nothing waits for it.

        No more than half of the cache is filled ahead. While an earlier hint is still followed
        nothing happens: the next one covers what this one named.
        """
        if self._ahead is not None and self._ahead.is_alive():
            return
        with self._changed:
            soon = [b for b in dict.fromkeys(blocks) if b not in self._slots]
        if soon:
            # A daemon: no process waits for what it will not read.
            soon = soon[: self._capacity // 2]
            self._ahead = threading.Thread(target=self._follow, args=(soon,), daemon=True)
            self._ahead.start()

    def _follow(self, blocks: list[Block]) -> None:
        for start in range(0, len(blocks), _AT_ONCE):
            with self._changed:
                taken = {*self._slots, *self._coming} & set(blocks[start : start + _AT_ONCE])
                mine = [b for b in blocks[start : start + _AT_ONCE] if b not in taken]
                self._coming.update(mine)
            try:
                with at_once():
                    for _ in self._fetched(mine):
                        pass
            except Exception as error:
                # Whoever needs the block fetches it again, waits for its store, and is told.
                log.debug("fetching ahead came to an end: %s", error)
                return

    def _fetched(self, claimed: list[Block]) -> Iterator[tuple[Block, bytes]]:
        """Fetch, check and keep claimed blocks; the claim ends with each, or with an error."""
        left = set(claimed)
        try:
            for start in range(0, len(claimed), _AT_ONCE):
                for block, data in self._round_trip(claimed[start : start + _AT_ONCE]):
                    self._keep(block, data)
                    left.discard(block)
                    yield block, data
        finally:
            with self._changed:
                self._coming -= left
                self._changed.notify_all()

    def _round_trip(self, blocks: list[Block]) -> Iterator[tuple[Block, bytes]]:
        """Blocks of any files, asked for at once where they are of one store."""
        by_store: dict[Storage, list[Block]] = defaultdict(list)
        for block in blocks:
            by_store[block[0].storage].append(block)
        for store, its in by_store.items():
            runs = _runs(its)
            for (file, run), data in zip(runs, self._ranges(store, runs), strict=True):
                first = run.start * BLOCK_BYTES
                for number in run:
                    start, end = file.extent(number)
                    part = data[start - first : end - first]
                    yield (file, number), self._checked(file, number, part)

    def _checked(self, file: FarFile, number: int, data: bytes) -> bytes:
        if not file.holds(number, data):
            # Once more: it may have been the way here.
            [data] = self._ranges(file.storage, [(file, range(number, number + 1))])
        if not file.holds(number, data):
            start, end = file.extent(number)
            raise Refused(
                f"Bytes {start} to {end} of {file.storage.uri}/{file.name} are not those that were "
                "recorded",
                cure="the file was changed or damaged; restore it from a copy",
            )
        return data

    def _ranges(self, store: Storage, runs: list[_Run]) -> Sequence[bytes]:
        """The bytes of some runs of blocks, when the store gives them."""
        asked = [
            (file.name, file.extent(run.start)[0], file.extent(run.stop - 1)[1])
            for file, run in runs
        ]
        names = sorted({file.name for file, _ in runs})
        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other files"
        try:
            found = store.read_ranges(asked)
        except FileNotFoundError as error:
            raise Refused(
                f"{store.uri}/{what} is no longer there", cure="restore it from a copy"
            ) from error
        with self._changed:
            self.bytes_fetched += sum(map(len, found))
        return found

    # -- keeping ---------------------------------------------------------------------------------

    def _keep(self, block: Block, data: bytes) -> None:
        with self._changed:
            if self._file is None:
                self._open()
            self._coming.discard(block)
            slot = len(self._slots)
            if slot >= self._capacity:
                slot = self._slots.popitem(last=False)[1]
            self._slots[block] = self._written(slot, data)
            self._changed.notify_all()

    def _open(self) -> None:
        """Make the unnamed file: as large as it may become, and empty, so that it takes no room."""
        with tempfile.TemporaryFile() as file:
            size = self._capacity * BLOCK_BYTES
            os.ftruncate(file.fileno(), size)
            self._file = os.dup(file.fileno())
        # Read through a map, which is quick, and written by calls, which can say that a disk is
        # full: a map would end the process.
        self._view = memoryview(mmap.mmap(self._file, size, access=mmap.ACCESS_READ))

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def _written(self, slot: int, data: bytes) -> int:
        """The slot that the data went to: this one, or on a full disk one that is there already."""
        assert self._file is not None
        try:
            if os.pwrite(self._file, data, slot * BLOCK_BYTES) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return slot
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            here = f"in {tempfile.gettempdir()} for a cache of {self._capacity} blocks"
            if len(self._slots) < _LEAST_BLOCKS:
                raise Failed(
                    f"No space left {here}",
                    cure="free some space, lower cache_gib, or name a roomier folder in TMPDIR",
                ) from error
            self._capacity = len(self._slots)
            log.warning("no space left %s; it goes on with %d", here, self._capacity)
        return self._written(self._slots.popitem(last=False)[1], data)


_Piece = tuple[int, int, int]
"""Where in the result, and from where to where in the block."""


def _pieces(starts: Sequence[int], length: int) -> dict[int, list[_Piece]]:
    """Which part of which block goes where."""
    found: dict[int, list[_Piece]] = defaultdict(list)
    for row, start in enumerate(starts):
        place, end = row * length, start + length
        while start < end:
            number, first = divmod(start, BLOCK_BYTES)
            last = min(BLOCK_BYTES, first + end - start)
            found[number].append((place, first, last))
            place, start = place + last - first, start + last - first
    return found


_Run = tuple[FarFile, range]
"""Blocks of a file without a gap, of which each is one request."""


def _runs(blocks: Sequence[Block]) -> list[_Run]:
    """Blocks, each once, as runs."""
    runs: list[_Run] = []
    for file, number in sorted(blocks, key=lambda block: (block[0].name, block[1])):
        before, run = runs[-1] if runs else (None, range(0))
        if before is file and run.stop == number and len(run) < _LONGEST_RANGE:
            runs[-1] = (file, range(run.start, number + 1))
        else:
            runs.append((file, range(number, number + 1)))
    return runs
