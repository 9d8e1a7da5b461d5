"""The tensors of one network: in which files they lie, read in pieces, hashed on the way.

Reads a safetensors file, or the several that an index beside them names. Format:
https://huggingface.co/docs/safetensors (little-endian, header first).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atoll.core.errors import MissingError, Refused, UsageError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_NAMES = (WEIGHTS_NAME, "model.safetensors")  # diffusers' and transformers'

# The format's names, in the order in which the library lays tensors out: wide ones first, so that
# every tensor stays aligned. Others (float8, float64, complex) have no place in a soup.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNREAD = (".bin", ".ckpt", ".pt", ".pth")
_AHEAD_BYTES = 1 << 25  # of a file afar that wait for those before them
_HASHED_BYTES = 1 << 22  # at a time, where a file is read for its digest alone


Reader = Callable[[Path, int, memoryview], int]
"""`reader(path, at, into)` fills memory with a file's bytes from `at` on, and says how many."""


@dataclass(frozen=True)
class Layout:
    """A tensor's dtype by the format's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.count * self.torch_dtype.itemsize


class Weights:
    """The tensors of one network; a context manager that opens and closes its files.

    While it is open, any thread may read. Every file is hashed from its start to its end beside the
    reading, so that what is read in the order of the file is read once.
    """

    def __init__(self, paths: Sequence[Path], reader: Reader | None = None) -> None:
        self.layout: dict[str, Layout] = {}
        self.metadata: dict[str, str] = {}  # what headers say beside
        self._files: list[_File] = []
        self._places: dict[str, tuple[_File, int]] = {}  # file, and bytes from its start
        for path in paths:
            file = _File(path, reader)
            self._files.append(file)
            metadata, tensors = _header(path)
            self.metadata |= metadata
            for name, layout, offset in tensors:
                if name in self.layout:
                    raise Refused(f"{path.parent} holds the tensor '{name}' twice")
                self.layout[name] = layout
                self._places[name] = (file, offset)

    @property
    def paths(self) -> list[Path]:
        """Of the files."""
        return [file.path for file in self._files]

    def __enter__(self) -> Self:
        for file in self._files:
            file.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    def sha256(self) -> dict[Path, str]:
        """Hex sha256 of every file; what was not read since they were opened is read for it."""
        return {file.path: file.sha256() for file in self._files}

    def read(self, name: str, first: int, piece: Tensor) -> None:
        """Fill `piece`, `(count,)`, with the flattened tensor's elements from `first` on."""
        file, offset = self._places[name]
        file.read(offset + first * piece.itemsize, as_bytes(piece))


class _File:
    """One file, read at any place and hashed in order."""

    def __init__(self, path: Path, reader: Reader | None) -> None:
        self.path = path
        self._reader = reader
        self._descriptor = -1
        self._hashing = threading.Lock()

    def open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._sha256, self._hashed = hashlib.sha256(), 0  # bytes from the start
        self._ahead: dict[int, bytes] = {}  # by where they begin: fetched, and not hashed yet

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, at: int, into: memoryview) -> None:
        self._fill(at, into)
        end = at + len(into)
        with self._hashing:
            # Another thread may be ahead, or behind: then the gap is read here. From afar it would
            # come a second time, so that what is there already waits for it, within limits.
            waiting = sum(map(len, self._ahead.values()))
            if self._reader and self._hashed < at and waiting + len(into) <= _AHEAD_BYTES:
                self._ahead[at] = bytes(into)
                return
            self._hash_up_to(at)
            if self._hashed < end:
                self._sha256.update(into[self._hashed - at :])
                self._hashed = end
            while data := self._ahead.pop(self._hashed, None):
                self._sha256.update(data)
                self._hashed += len(data)

    def sha256(self) -> str:
        with self._hashing:
            self._hash_up_to(os.fstat(self._descriptor).st_size)
            return self._sha256.hexdigest()

    def _hash_up_to(self, end: int) -> None:
        while self._hashed < end:
            data: bytes | memoryview | None = self._ahead.pop(self._hashed, None)
            if data is None:
                stop = min([end, *(start for start in self._ahead if start > self._hashed)])
                data = memoryview(bytearray(min(stop - self._hashed, _HASHED_BYTES)))
                self._fill(self._hashed, data)
            self._sha256.update(data)
            self._hashed += len(data)

    def _fill(self, at: int, into: memoryview) -> None:
        while into:
            if self._reader is None:
                got = os.preadv(self._descriptor, [into], at)
            else:
                got = self._reader(self.path, at, into)
            if not got:
                raise Refused(f"{self.path} became shorter while it was read")
            into, at = into[got:], at + got


def as_bytes(piece: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return piece.reshape(-1).view(torch.uint8).numpy().data


def find_weights(folder: Path, variant: str | None = None) -> tuple[str, list[Path]]:
    """The name that a network's weights have in a folder, without variant, and the files they are.

    A variant is taken where there is one, as diffusers does it; an index names its files.
    """
    if variant is not None and (not variant or "/" in variant):
        raise UsageError(f"'{variant}' is no variant", allowed="such as fp16")
    tried = [variant, None] if variant else [None]
    for wanted in tried:
        for name in _NAMES:
            file = folder / _varied(name, wanted)
            if file.is_file():
                return name, [file]
            index = folder / _varied(f"{name}.index.json", wanted)
            if index.is_file():
                return name, _indexed(index)
    others = sorted(
        file.name for file in folder.glob("*") if file.suffix in (".safetensors", *UNREAD)
    )
    raise MissingError(
        f"There are no weights in {folder}" + (f", only {', '.join(others)}" if others else ""),
        allowed=" or ".join([*_NAMES, f"{WEIGHTS_NAME}.index.json"]),
        cure="of a variant, as in NAME.fp16.safetensors, say --variant fp16; save others as "
        "safetensors, pickles are not read"
        if others
        else "",
    )


def _varied(name: str, variant: str | None) -> str:
    """`model.safetensors` as `model.fp16.safetensors`; an index has it before its last part."""
    if variant is None:
        return name
    stem, _, end = name.rpartition(".")
    return f"{stem}.{variant}.{end}"


def _indexed(index: Path) -> list[Path]:
    folder = index.parent
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{index} is not an index of safetensors files ({error!r})") from error
    # An index from a stranger must not lead out of its folder.
    if not names or not all(isinstance(n, str) and n == os.path.basename(n) for n in names):
        raise Refused(f"{index} names files outside its folder", allowed="names of files beside it")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise MissingError(f"{index} names {name}, which is not there")
    return [folder / name for name in sorted(names)]


def _header(file: Path) -> tuple[dict[str, str], list[tuple[str, Layout, int]]]:
    """A file's checked header: its metadata, and each tensor's name, layout and first byte."""
    # The format's own library refuses overlaps, gaps, wrong sizes and truncated files.
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refused(f"{file} is not a safetensors file: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        # The library lets a tensor that is named twice be the last of the two.
        named = json.loads(opened.read(length), object_pairs_hook=list)
    if len(dict(named)) < len(named):
        raise Refused(f"{file} names a tensor twice")
    found, metadata = [], {}
    for name, pairs in named:
        if name == "__metadata__":
            metadata = dict(pairs)
            continue
        entry = dict(pairs)
        if entry["dtype"] not in DTYPES:
            raise Refused(
                f"The tensor '{name}' of {file} is {entry['dtype']}",
                allowed=", ".join(DTYPES),
                cure="convert the expert to float32, bfloat16 or float16",
            )
        layout = Layout(entry["dtype"], tuple(entry["shape"]))
        found.append((name, layout, 8 + length + entry["data_offsets"][0]))
    return metadata, found
