"""All randomness of a run, as functions of (seed, words, position); nothing is carried in a state.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a keyed
function of a counter. Item i of a stream owns a block of counters, so that the noise of record
number images_seen = i is the same whatever the batch, the worker or the place where a run resumed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORDS_A_COUNTER = 4  # Philox gives four 64-bit words for one counter


def key(seed: int, *words: str | int) -> int:
    """A 128-bit key for the stream named by `words`."""
    text = "\x1f".join((str(seed), *(str(word) for word in words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A torch generator for one purpose that is drawn once (initial weights, a reservoir)."""
    return torch.Generator().manual_seed(key(seed, *words) & ((1 << 63) - 1))


def _words(
    seed: int, words: tuple[str | int, ...], first: int, count: int, each: int
) -> NDArray[np.uint64]:
    """64-bit words `(count, each)` of items `first` to `first + count - 1` of a stream."""
    counters = -(-each // _WORDS_A_COUNTER)
    philox = np.random.Philox(key=key(seed, *words))
    philox.advance(first * counters)
    raw = philox.random_raw(count * counters * _WORDS_A_COUNTER)
    return np.asarray(raw, dtype=np.uint64).reshape(count, -1)[:, :each]


def uniform(seed: int, *words: str | int, first: int, count: int, each: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), float64 `(count, each)`, for items `first` onwards of a stream."""
    raw = _words(seed, words, first, count, each)
    # 52 bits and a half: with 53 the half would be rounded away, and 1 could come out.
    return torch.from_numpy(((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def normal(
    seed: int, *words: str | int, first: int, count: int, shape: tuple[int, ...] = ()
) -> Tensor:
    """Standard normals, float32 `(count, *shape)`, for items `first` onwards of a stream.

    Box-Muller on pairs of 32-bit halves, in float64 and rounded once: a last-bit difference between
    a vectorised and a scalar logarithm then never reaches the result.
    """
    size = int(np.prod(shape, dtype=np.int64)) if shape else 1
    raw = _words(seed, words, first, count, -(-size // 2))
    first_half = ((raw >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    second_half = ((raw & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(first_half))
    angle = 2.0 * np.pi * second_half
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    flat = pairs.reshape(count, -1)[:, :size].astype(np.float32)
    return torch.from_numpy(flat).reshape(count, *shape)


def runs(items: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(seed, first, count) of neighbours that are one stream, from each item's (seed, position).

    For batches whose items have seeds of their own: what is drawn for the runs, one after another,
    is what would be drawn for every item alone.
    """
    seed = first = count = 0
    for item in items:
        if count and item == (seed, first + count):
            count += 1
            continue
        if count:
            yield seed, first, count
        (seed, first), count = item, 1
    if count:
        yield seed, first, count


class _Permutations:
    """Those used last: a stream over several shapes goes from one to the other and back."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._lock = most_bytes, threading.Lock()
        self._kept: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self.bytes = 0  # counted as they come and go: of a small shard they are many

    def __call__(self, stream: int, n: int) -> NDArray[np.int64]:
        with self._lock:
            order = self._kept.pop((stream, n), None)
            if order is None:
                order = np.random.Generator(np.random.Philox(key=stream)).permutation(n)
                order.flags.writeable = False
                self.bytes += order.nbytes
            self._kept[stream, n] = order
            while len(self._kept) > 1 and self.bytes > self._most:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
            return order


_permutation = _Permutations(256 << 20)


def order(seed: int, *words: str | int, first: int, count: int, n: int) -> NDArray[np.int64]:
    """Which of `n` records stand at positions `first` to `first + count - 1` of endless epochs.

    Every epoch is a permutation of its own: each record once, none twice.
    """
    positions = np.arange(first, first + count)
    picked = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        picked[here] = _permutation(key(seed, *words, "epoch", int(epoch)), n)[positions[here] % n]
    return picked


def fraction(text: str, *, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone: which side of a split a record is on."""
    digest = hashlib.sha256(f"{salt}\x1f{text}".encode()).digest()
    return int.from_bytes(digest[:7], "little") / 2.0**56
