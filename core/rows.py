"""Rows of tensors in safetensors files, near or far, picked by number.

A file on this machine is mapped into memory and a far one read through the block cache; several
tensors stand one behind another as if they were one. Nothing is copied to join them, and a far
tensor's rows are fetched when they are asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.blocks import BLOCK_BYTES, FarFile
from atoll.core.cache import Block, BlockCache
from atoll.core.errors import Refused

_SMALL = 4 * BLOCK_BYTES
_DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F16": torch.float16}


@dataclass(frozen=True, eq=False)
class FarTensor:
    """A tensor of a far file: its first byte there, and its shape."""

    file: FarFile
    cache: BlockCache
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The rows `(n,)` in their order, `(n, ...)`."""
        return self._read(self._starts(rows), self._row_bytes, len(rows))

    def whole(self) -> Tensor:
        """All rows, in one piece."""
        return self._read([self.offset], self.size, len(self))

    def blocks(self, rows: Tensor) -> Iterator[Block]:
        """The blocks that hold the rows, those of the first rows first."""
        starts = rows.numpy() * self._row_bytes + self.offset
        extent = -(-self._row_bytes // BLOCK_BYTES)  # and often one more, where a row crosses
        touched = (starts[:, None] + np.arange(extent + 1) * BLOCK_BYTES) // BLOCK_BYTES
        last = (starts + self._row_bytes - 1) // BLOCK_BYTES
        numbers, where = np.unique(np.minimum(touched, last[:, None]), return_index=True)
        for number in numbers[where.argsort()].tolist():
            yield self.file, number

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return len(self) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _starts(self, rows: Tensor) -> list[int]:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {rows.tolist()} of {len(self)}")
        starts: list[int] = (rows * self._row_bytes + self.offset).tolist()
        return starts

    def _read(self, starts: list[int], length: int, rows: int) -> Tensor:
        data = self.cache.read(self.file, starts, length)
        if not data:
            return torch.empty((rows, *self.shape[1:]), dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(rows, *self.shape[1:])


def far_tensors(file: FarFile, cache: BlockCache) -> dict[str, Tensor | FarTensor]:
    """The tensors of a far safetensors file by name, small ones whole, as they are at hand then.

    Raises `Refused` where its header is not one.
    """
    try:
        size = int.from_bytes(cache.read(file, [0], 8), "little")
        if not 0 < size <= file.size - 8:
            raise ValueError(f"a header of {size} bytes in a file of {file.size}")
        header = json.loads(cache.read(file, [8], size))
        header.pop("__metadata__", None)
        far = {name: _far(file, cache, 8 + size, entry) for name, entry in header.items()}
        return {name: t.whole() if t.size <= _SMALL else t for name, t in far.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Refused(
            f"{file.storage.uri}/{file.name} is not a readable safetensors file ({error})",
            cure="restore it from a copy",
        ) from error


def _far(file: FarFile, cache: BlockCache, data: int, entry: Any) -> FarTensor:
    start, end = entry["data_offsets"]
    shape, dtype = tuple(int(n) for n in entry["shape"]), _DTYPES[entry["dtype"]]
    if (
        not shape
        or min(shape) < 0
        or not 0 <= start <= end <= file.size - data
        or end - start != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"a tensor {entry}")
    return FarTensor(file, cache, data + start, shape, dtype)


class Rows:
    """Rows of several tensors, the first `lengths` of each, as if they were one tensor."""

    def __init__(
        self, parts: Sequence[Tensor | FarTensor], lengths: Sequence[int] | None = None
    ) -> None:
        lengths = [len(part) for part in parts] if lengths is None else lengths
        here = [(part, length) for part, length in zip(parts, lengths, strict=True) if length]
        self.parts = [part for part, _ in here]
        self.lengths = [length for _, length in here]
        self._ends = torch.tensor(self.lengths, dtype=torch.long).cumsum(0)
        self.shape = tuple(parts[0].shape[1:])  # of a row, or of the first one's
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The rows `(batch,)` in their order, `(batch, ...)`; `ValueError` if shapes differ."""
        if len(self.parts) == 1:
            return self.parts[0][rows]
        held = list(self._held(rows))
        shapes = {tuple(part.shape[1:]) for part, _, _ in held} or {self.shape}
        if len(shapes) > 1:
            raise ValueError(f"rows of shapes {sorted(shapes)} are no one tensor; ask for each")
        picked = torch.empty((len(rows), *shapes.pop()), dtype=self.dtype)
        for part, mine, its in held:
            picked[mine] = part[its]
        return picked

    def blocks(self, rows: Tensor) -> Iterator[Block]:
        """The blocks of far files that hold the rows."""
        for part, _, its in self._held(rows):
            if isinstance(part, FarTensor):
                yield from part.blocks(its)

    @property
    def is_far(self) -> bool:
        """Whether any of them is fetched when it is asked for."""
        return any(isinstance(part, FarTensor) for part in self.parts)

    def first(self, count: int) -> Rows:
        """The first `count` rows."""
        starts = [int(end) - length for end, length in zip(self._ends, self.lengths, strict=True)]
        lengths = [
            min(length, max(0, count - start))
            for start, length in zip(starts, self.lengths, strict=True)
        ]
        return Rows(self.parts, lengths)

    def _held(self, rows: Tensor) -> Iterator[tuple[Tensor | FarTensor, Tensor, Tensor]]:
        """Each part that holds some of the rows, which of them these are, and their numbers."""
        holder = torch.bucketize(rows, self._ends, right=True)
        for index in sorted(set(holder.tolist())):
            mine = holder == index
            start = int(self._ends[index]) - self.lengths[index]
            yield self.parts[index], mine, rows[mine] - start


def one_behind_another(rows: Sequence[Rows]) -> Rows:
    """Several as one."""
    if len(rows) == 1:
        return rows[0]
    parts = [part for each in rows for part in each.parts]
    return Rows(parts, [length for each in rows for length in each.lengths])
