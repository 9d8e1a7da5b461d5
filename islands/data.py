"""Batches of an island: rows of its pack, noised, as functions of (seed, stream, images_seen).

Nothing is carried from batch to batch, so a resumed training, any number of workers and any part of
a batch see the very numbers that an undisturbed run would. All is drawn on the CPU, so that it is
the same for every device; `Ahead` does it while the accelerator is busy with the batch before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from atoll.core import flow, seeds
from atoll.core.conditioning import Conditioning
from atoll.core.pack import Pack
from atoll.islands.settings import DenoiserTraining, TimeConfig
from atoll.islands.turns import places

T = TypeVar("T")

_AHEAD = 8  # batches whose rows come from afar before they are needed


@dataclass(frozen=True)
class Batch:
    """Points of the path and what a network should put out there.

    `x_t` and `wanted` `(batch, channel, height, width)`, `t` `(batch,)` in (0, 1), and within the
    span of the noise schedule where the training is on one.
    """

    x_t: Tensor
    t: Tensor
    cond: Conditioning
    wanted: Tensor


def times(config: TimeConfig, seed: int, stream: str, *, first: int, count: int) -> Tensor:
    """Training times `(count,)` in (0, 1) of records `first` onwards of a stream."""
    if config.sampling == "logit-normal":
        normal = seeds.normal(seed, stream, "time", first=first, count=count)
        return flow.logit_normal(normal, mean=config.mean, std=config.std)
    uniform = seeds.uniform(seed, stream, "time", first=first, count=count)[:, 0]
    if config.sampling == "mode":
        uniform = flow.mode(uniform, scale=config.scale)
    return uniform.float()


def rows_at(
    pack: Pack,
    rows: range,
    seed: int,
    *words: str,
    first: int,
    count: int,
    batch: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Which of the pack's `rows` stand at `first` to `first + count - 1` of a stream, `(count,)`.

    Where these are of several shapes the stream is one of batches, each of one shape (`turns.py`).
    Where the pack says so every other one is mirrored, by a coin of (seed, stream, position), and
    never a record that is held out. What will be asked for next, as many every `stride` positions
    (`count` if not said), is named to the pack, which fetches it meanwhile if it lies afar.
    """

    buckets = pack.buckets(rows)

    def drawn(first: int, count: int) -> Tensor:
        found = places(buckets, seed, *words, first=first, count=count, batch=batch)
        if not pack.card.flips or rows != pack.train:
            return found
        coin = seeds.uniform(seed, *words, "flip", first=first, count=count)[:, 0]
        return found + len(pack) * (coin < 0.5)

    if pack.is_far:
        later = [first + n * (stride or count) for n in range(1, _AHEAD + 1)]
        pack.expect(torch.cat([drawn(each, count) for each in later]))
    return drawn(first, count)


def drop(cond: Conditioning, null: Conditioning, uniform: Tensor, rate: float) -> Conditioning:
    """Condition dropout (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1)."""
    return cond.dropped(uniform[:, 0] < rate, null)


class Batches:
    """The noised batches of some rows of a pack, by position.

    Of a pack of several shapes `batch` positions, from a multiple of it on, are of one shape, and
    so must be what is asked for at once. `stride` is as of `rows_at`: one of several ranks asks for
    its share alone.
    """

    def __init__(
        self,
        pack: Pack,
        config: DenoiserTraining,
        *,
        rows: range,
        seed: int,
        stream: str,
        device: torch.device,
        batch: int | None = None,
        stride: int | None = None,
    ) -> None:
        self._pack = pack
        self._config = config
        self._rows = rows
        self._seed = seed
        self._stream = stream
        self._device = device
        self._batch, self._stride = batch, stride

    def __call__(self, first: int, count: int) -> Batch:
        """Records `first` to `first + count - 1` of the stream, on the device."""
        pack, seed, stream = self._pack, self._seed, self._stream
        where = {"first": first, "count": count}
        rows = rows_at(
            pack, self._rows, seed, stream, "order", **where, batch=self._batch, stride=self._stride
        )
        x_data = pack.x_data(rows)
        uniform = seeds.uniform(seed, stream, "dropout", **where)
        cond = drop(pack.cond(rows), pack.null, uniform, self._config.condition_dropout)
        t = times(self._config.time, seed, stream, **where).clamp(*flow.span(self._config.schedule))
        x_noise = seeds.normal(seed, stream, "x_noise", shape=tuple(x_data.shape[1:]), **where)
        x_t = flow.interpolate(x_data, x_noise, t).to(self._device, non_blocking=True)
        return Batch(
            x_t=x_t,
            t=t.to(x_t),
            cond=cond.to(x_t),
            wanted=flow.target(x_data, x_noise, t, self._config.objective).to(x_t),
        )


class Ahead(Generic[T]):
    """Makes the next batch in a thread while this one is learnt from.

    What comes next, `stride` positions on, is guessed and never decided: any position may be asked
    for, at the same result.
    """

    def __init__(self, make: Callable[[int, int], T], stride: int) -> None:
        self._make = make
        self._stride = stride
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._guessed: tuple[int, int] | None = None
        self._coming: Future[T] | None = None

    def __call__(self, first: int, count: int) -> T:
        """The batch at a position; the next one is begun."""
        coming, guessed = self._coming, self._guessed
        made = coming.result() if coming is not None and guessed == (first, count) else None
        self._guessed = (first + self._stride, count)
        self._coming = self._thread.submit(self._make, *self._guessed)
        return self._make(first, count) if made is None else made

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(cancel_futures=True)


@contextmanager
def ahead(
    make: Callable[[int, int], T], device: torch.device, *, stride: int
) -> Iterator[Callable[[int, int], T]]:
    """`make`, ahead of its time where that costs the training no processor."""
    if device.type == "cpu":
        yield make
        return
    coming = Ahead(make, stride)
    try:
        yield coming
    finally:
        coming.close()
