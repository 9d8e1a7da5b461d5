"""Streams the tensors of several weights files through a rule into others, piece by piece.

In: open `Weights`, the layout of what comes out, and a rule that makes a piece of one tensor from
the same piece of all. Out: one safetensors file or several of that layout, or their digests alone.
Their bytes are those of `safetensors.torch.save_file`, so they depend on names, shapes, dtypes and
values only.

Pieces are made by several threads and written in the order of the file. Memory is taken once: it
does not grow with the model, and with the number of files pieces become smaller.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from atoll.core.journal import progress
from atoll.merge import exact
from atoll.merge.weights import DTYPES, Layout, Weights, as_bytes

Rule = Callable[[str, int, Sequence[Tensor], Sequence[Tensor]], None]
"""`rule(name, first, values, outs)` fills a piece of a tensor, `(count,)`, from those of each file.

It begins at `first` of the flattened tensor.
"""


@dataclass(frozen=True)
class Out:
    """A file to write, and what its header says of it; without a path it is only hashed.

    Its tensors are those that all files of a stream have, or of `layouts`, which have their names
    and shapes: then they lie in the order of the others.
    """

    path: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] | None = None

    def of(self, layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """What it holds, of a stream's."""
        return layouts if self.layouts is None else self.layouts


_MEMORY_BYTES = 1 << 28  # in all buffers
_PIECE_BYTES = 1 << 23  # of one file at a time; disks like them large
_WAITING = 10  # pieces that are made while a large one before them still is
_ALIGNED = 64  # bytes: a cache line
_SYNCED_BYTES = 1 << 28  # between two requests that written data be put on the disk
_NO_FALLOCATE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


def stream(
    sources: Sequence[Weights],
    layouts: Mapping[str, Layout],
    rule: Rule,
    *,
    outs: Sequence[Out],
    what: str = "averaging",
    threads: int | None = None,
) -> list[str]:
    """Make every tensor of `layouts` by the rule, write the files, and return their hex sha256.

    Without a file to write the rule only looks. Its progress is called `what`. `threads` are all
    processors if not given. Which pieces there are, and who makes them, shows in no bit if the rule
    is pointwise.
    """
    exact.check_denormals()
    threads = threads or len(os.sched_getaffinity(0))
    slots = threads + _WAITING
    every = [out.of(layouts) for out in outs]
    order = _order(layouts)
    heads = [header(each, out.metadata, order) for out, each in zip(outs, every, strict=True)]
    written = every or [layouts]  # without a file what is looked at counts
    widths = {name: sum(each[name].torch_dtype.itemsize for each in written) for name in order}
    with contextlib.ExitStack() as closing:
        sizes = [len(head) + _size(each) for head, each in zip(heads, every, strict=True)]
        sinks = [
            closing.enter_context(_Sink(out.path, size))
            for out, size in zip(outs, sizes, strict=True)
        ]
        total = sum(map(_size, written))
        advance = closing.enter_context(progress(what, total, in_bytes=True))
        putting = closing.enter_context(ThreadPoolExecutor(threads, "put"))

        def put(parts: Sequence[memoryview]) -> None:
            """The next bytes of every file."""
            list(putting.map(_Sink.put, sinks, parts))

        put([memoryview(head) for head in heads])
        buffers: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
        for _ in range(slots):
            buffers.put(_Buffers(_MEMORY_BYTES // slots))
        pool = closing.enter_context(ThreadPoolExecutor(threads, "stream"))
        closing.callback(pool.shutdown, cancel_futures=True)
        # Every thread computes on one processor; the others have pieces of their own.
        closing.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)

        def made(piece: _Piece) -> tuple[_Buffers, list[Tensor], int]:
            taken = buffers.get()
            parts = taken.of(piece.count, _dtypes(piece.name, sources, every))
            values, results = parts[: len(sources)], parts[len(sources) :]
            for source, value in zip(sources, values, strict=True):
                source.read(piece.name, piece.first, value)
            rule(piece.name, piece.first, values, results)
            return taken, results, piece.count * widths[piece.name]

        def put_made(future: Future[tuple[_Buffers, list[Tensor], int]]) -> None:
            taken, results, size = future.result()
            put([as_bytes(result) for result in results])
            buffers.put(taken)
            advance(size)

        at_work: deque[Future[tuple[_Buffers, list[Tensor], int]]] = deque()
        for piece in _pieces(sources, layouts, every, _MEMORY_BYTES // slots):
            if len(at_work) == slots:
                put_made(at_work.popleft())
            at_work.append(pool.submit(made, piece))
        while at_work:
            put_made(at_work.popleft())
        return [sink.sha256.hexdigest() for sink in sinks]


def save(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout], out: Out) -> str:
    """Write tensors that are in memory as `stream` would, and return the file's hex sha256."""
    order = _order(layouts)
    head = header(layouts, out.metadata, order)
    with _Sink(out.path, len(head) + _size(layouts)) as sink:
        sink.put(memoryview(head))
        for name in order:
            sink.put(as_bytes(tensors[name].contiguous()))
        return sink.sha256.hexdigest()


def header(
    layouts: Mapping[str, Layout], metadata: Mapping[str, str], order: Sequence[str]
) -> bytes:
    """What comes before the tensors: its own length, and where each of them lies."""
    # Without a format diffusers takes a file for a stranger's.
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        begin, end = end, end + layouts[name].bytes
        entries[name] = {
            "dtype": layouts[name].dtype,
            "shape": layouts[name].shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def _order(layouts: Mapping[str, Layout]) -> list[str]:
    return sorted(layouts, key=lambda name: (_RANK[layouts[name].dtype], name))


def _size(layouts: Mapping[str, Layout]) -> int:
    return sum(layout.bytes for layout in layouts.values())


@dataclass(frozen=True)
class _Piece:
    """Elements of a flattened tensor."""

    name: str
    first: int
    count: int


def _pieces(
    sources: Sequence[Weights],
    layouts: Mapping[str, Layout],
    outs: Sequence[Mapping[str, Layout]],
    memory: int,
) -> Iterator[_Piece]:
    """All tensors in the order of the file, in pieces for which that many bytes are enough."""
    for name in _order(layouts):
        widths = [dtype.itemsize for dtype in _dtypes(name, sources, outs)]
        room = (memory - _ALIGNED * len(widths)) // sum(widths)
        step = max(min(_PIECE_BYTES // max(widths), room), 1)
        if step > exact.CHUNK:
            step -= step % exact.CHUNK
        for first in range(0, layouts[name].count, step):
            yield _Piece(name, first, min(step, layouts[name].count - first))


def _dtypes(
    name: str, sources: Sequence[Weights], outs: Sequence[Mapping[str, Layout]]
) -> list[torch.dtype]:
    """Of a tensor in every file, and of the results."""
    every = [*(source.layout for source in sources), *outs]
    return [DTYPES[layout[name].dtype] for layout in every]


class _Buffers:
    """Memory for one piece of every file and of the results."""

    def __init__(self, memory: int) -> None:
        self._memory = torch.empty(memory, dtype=torch.uint8)

    def of(self, count: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Tensors of `count` elements each, of these dtypes, with any content."""
        found, at = [], 0
        for dtype in dtypes:
            end = at + count * dtype.itemsize
            found.append(self._memory[at:end].view(dtype))
            at = end + -end % _ALIGNED
        return found


class _Sink:
    """The file, written and hashed from its start to its end; a context manager."""

    def __init__(self, path: Path | None, size: int) -> None:
        self._path, self._size = path, size
        self._descriptor = -1
        self._written = self._synced = 0
        self._syncing = ThreadPoolExecutor(1, "sync")
        self._sync: Future[None] | None = None
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            # In one stretch, and no space left is found before anything is computed.
            os.posix_fallocate(self._descriptor, 0, self._size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                os.close(self._descriptor)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._syncing.shutdown()
        if self._path is not None:
            os.close(self._descriptor)

    def put(self, data: memoryview) -> None:
        """The next bytes."""
        self.sha256.update(data)
        while self._path is not None and data:
            done = os.pwrite(self._descriptor, data, self._written)
            self._written += done
            data = data[done:]
        if self._written - self._synced >= _SYNCED_BYTES:
            # So that whoever waits for the whole file to be on the disk need not wait for all.
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncing.submit(os.fdatasync, self._descriptor)
            self._synced = self._written
