"""Experts under a memory budget: each is read from its folder when it is run, over another.

A network that is in memory is given another expert's weights in place, tensor by tensor from the
mapped file, so that of experts of one shape no two need to be there, and what is read ahead is in
the system's page cache alone.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import NETWORK_CONFIG, Card, Denoiser, read_card
from atoll.core.errors import ConfigError, Refused
from atoll.core.starts import weight_files
from atoll.router.ensemble import ExpertVelocity

CPU = torch.device("cpu")
_MAPPED = 64 * 2**20  # bytes of a file that are mapped at a time


@dataclass(frozen=True)
class _Place:
    """An expert's folder: its card, what makes its network the same as another's, and its size."""

    folder: Path
    card: Card
    shape: str
    files: tuple[Path, ...]
    bytes: int


@dataclass
class _Slot:
    """A network in memory, and which expert's weights it has."""

    network: nn.Module
    shape: str
    bytes: int
    expert: int


class PagedExperts(Sequence[ExpertVelocity]):
    """Experts as functions, at most `budget` bytes of their weights in memory at once.

    The least recently run goes first, of experts with the same network by being written over. They
    are on the device of what they are asked about. `dtype` None is float32, as experts are that are
    loaded whole, whatever their files are in. Threads that ask at once are answered in turn.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        budget: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._folders = list(folders)
        self._budget = budget
        # A network computes with one expert's weights until it is given another's.
        self._running = threading.RLock()
        self.loads = 0  # experts brought into memory so far
        self.cast(dtype or torch.float32)

    def cast(self, dtype: torch.dtype) -> None:
        """Have the experts in another dtype from now on; those in memory are read again."""
        places = [_place(folder, dtype) for folder in self._folders]
        largest = max(places, key=lambda place: place.bytes)
        if largest.bytes > self._budget:
            raise ConfigError(
                f"The expert at {largest.folder} has {largest.bytes / 2**30:.2f} GiB of weights, "
                f"more than the {self._budget / 2**30:.2f} GiB that experts may have",
                cure="allow more memory, or load it in 16 bits",
            )
        with self._running:
            self._dtype, self._places = dtype, places
            self._slots: list[_Slot] = []  # the least recently run first
            self._coming: list[int] = []  # still to be brought of what was asked for last

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k: Any) -> Any:
        def velocity(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            with self._running:
                return self.expert(k, x_t.device).velocity(x_t, t, cond)

        return velocity

    @property
    def cards(self) -> list[Card]:
        """What each expert is."""
        return [place.card for place in self._places]

    @property
    def configs(self) -> list[dict[str, Any]]:
        """Each network's configuration, as diffusers wrote it."""
        return [json.loads((place.folder / NETWORK_CONFIG).read_text()) for place in self._places]

    @property
    def folders(self) -> list[Path]:
        """Where they are read from."""
        return list(self._folders)

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts in memory."""
        return self._dtype

    @property
    def resident(self) -> list[int]:
        """The experts in memory, the least recently run first."""
        return [slot.expert for slot in self._slots]

    def order(self, wanted: Sequence[int]) -> list[int]:
        """Those in memory first: they would be written over by the others."""
        with self._running:
            here = [k for k in self.resident if k in wanted]
            self._coming = [k for k in wanted if k not in here]
            self._announce()
            return here + self._coming

    def _announce(self) -> None:
        """Have the next expert read while the one before it is computed with."""
        if self._coming:
            self._read_ahead(self._coming[0])

    def expert(self, k: int, device: torch.device = CPU) -> Denoiser:
        """Expert `k` in memory, brought there if need be; good until another one is asked for."""
        place = self._places[k]
        slot = next((slot for slot in self._slots if slot.expert == k), None)
        if slot is None:
            slot = self._bring(k)
            self._coming = [other for other in self._coming if other != k]
            self._announce()
        else:
            self._slots.remove(slot)
        slot.network.to(device)
        self._slots.append(slot)
        return Denoiser(slot.network, place.card)

    def _bring(self, k: int) -> _Slot:
        """A slot with expert `k`, taken out of the list, within the budget."""
        place = self._places[k]
        self.loads += 1
        room = self._budget - sum(slot.bytes for slot in self._slots)
        if room < place.bytes:
            alike = next((slot for slot in self._slots if slot.shape == place.shape), None)
            if alike is not None:
                self._slots.remove(alike)
                alike.expert = -1  # neither the one nor the other, should reading fail
                self._write_over(alike.network, place)
                alike.expert = k
                return alike
            while room < place.bytes:
                room += self._slots.pop(0).bytes
        network = Denoiser.load(place.folder, self._dtype).network
        return _Slot(network, place.shape, place.bytes, k)

    @torch.no_grad()
    def _write_over(self, network: nn.Module, place: _Place) -> None:
        tensors = network.state_dict()
        missing = set(tensors)
        for name, value in _tensors(place):
            if name not in tensors or tensors[name].shape != value.shape:
                raise Refused(f"The weights in {place.folder} are not those of its config.json")
            tensors[name].copy_(value)
            missing.remove(name)
        if missing:
            raise Refused(f"{place.folder} is without {sorted(missing)[0]}")

    def _read_ahead(self, k: int) -> None:
        """Let the system read an expert's files while others are computed with."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file in self._places[k].files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _place(folder: Path, dtype: torch.dtype) -> _Place:
    card = read_card(folder)
    files = tuple(folder / name for name in weight_files(folder) if name.endswith(".safetensors"))
    config = json.loads((folder / NETWORK_CONFIG).read_text())
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    shape = json.dumps([card.family, told], sort_keys=True)
    return _Place(folder, card, shape, files, sum(_bytes(file, dtype) for file in files))


def _bytes(file: Path, dtype: torch.dtype) -> int:
    """What a file's tensors take in memory, those of floating point in `dtype`."""
    total = 0
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            described = opened.get_slice(name)
            kind = described.get_dtype()  # such as F32, BF16, I64, BOOL
            bits = int("".join(sign for sign in kind if sign.isdigit()) or 8)
            each = dtype.itemsize if "F" in kind else bits // 8
            total += math.prod(described.get_shape()) * each
    return total


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise Refused(f"{file} is not readable ({error})") from error


def _tensors(place: _Place) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an expert, mapped; of each only until the next is asked for."""
    for file in place.files:
        with _opened(file) as opened:
            names = list(opened.keys())
        while names:
            # A mapping stays resident as far as it was read, so it is made anew now and then.
            with _opened(file) as opened:
                mapped = 0
                while names and mapped < _MAPPED:
                    name = names.pop(0)
                    tensor = opened.get_tensor(name)
                    mapped += tensor.nbytes
                    yield name, tensor
                    del tensor
