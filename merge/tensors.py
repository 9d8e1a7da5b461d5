"""Streams tensors out of expert folders, and a safetensors file into place, piece by piece.

Reads `diffusion_pytorch_model.safetensors` or diffusers' sharded index beside it; writes the single
file. Format: https://huggingface.co/docs/safetensors (little-endian, header first). The bytes are
those of `safetensors.torch.save_file`, so they depend on names, shapes, dtypes and values only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atoll.core.errors import MissingError, Refused
from atoll.core.storage import sha256_file

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

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
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Layout:
    """A tensor's dtype by the format's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int  # bytes from the start of the file


class Weights:
    """The tensors of one component folder, read in pieces; a context manager that closes files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.layout: dict[str, Layout] = {}
        self._places: dict[str, _Place] = {}
        self._descriptors: dict[Path, int] = {}
        for file in self.files:
            for name, layout, place in _header(file):
                if name in self.layout:
                    raise Refused(f"{folder} holds the tensor '{name}' twice")
                self.layout[name] = layout
                self._places[name] = place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def sha256(self) -> str:
        """Hex sha256 of the weights file; of several, over their sorted `sha256  name` lines."""
        if len(self.files) == 1:
            return sha256_file(self.files[0])
        lines = [f"{sha256_file(file)}  {file.name}\n" for file in self.files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Elements `first` to `first + count` of the flattened tensor, `(count,)`."""
        place, dtype = self._places[name], DTYPES[self.layout[name].dtype]
        piece = torch.empty(count, dtype=dtype)
        if place.file not in self._descriptors:
            self._descriptors[place.file] = os.open(place.file, os.O_RDONLY)
        rest, at = as_bytes(piece), place.offset + first * dtype.itemsize
        while rest:
            got = os.preadv(self._descriptors[place.file], [rest], at)
            if not got:
                raise Refused(f"{place.file} became shorter while it was read")
            rest, at = rest[got:], at + got
        return piece


def as_bytes(piece: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return piece.reshape(-1).view(torch.uint8).numpy().data


def write(
    layouts: Mapping[str, Layout],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    file: BinaryIO | None = None,
) -> str:
    """Write a safetensors file from pieces of each tensor in turn, and return its hex sha256.

    Without a `file` the bytes are only hashed: what the file would be.
    """
    digest = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        if file is not None:
            file.write(data)

    order = sorted(layouts, key=lambda name: (_RANK[layouts[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + layouts[name].bytes
        header[name] = {
            "dtype": layouts[name].dtype,
            "shape": layouts[name].shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    put(len(text).to_bytes(8, "little") + text)
    for name in order:
        written = 0
        for piece in pieces(name):
            put(as_bytes(piece))
            written += piece.nbytes
        assert written == layouts[name].bytes, name
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The weights files of a component folder, sorted by name."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / INDEX_NAME
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except FileNotFoundError:
        raise MissingError(
            f"There are no weights in {folder}", allowed=f"{WEIGHTS_NAME} or {INDEX_NAME}"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{index} is not an index of safetensors files ({error!r})") from error
    # An index from a stranger must not lead out of its folder.
    if not names or not all(isinstance(n, str) and n == os.path.basename(n) for n in names):
        raise Refused(f"{index} names files outside its folder", allowed="names of files beside it")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise MissingError(f"{index} names {name}, which is not there")
    return [folder / name for name in sorted(names)]


def _header(file: Path) -> list[tuple[str, Layout, _Place]]:
    """The checked header of one file."""
    # The format's own library refuses overlaps, gaps, wrong sizes and truncated files.
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refused(f"{file} is not a safetensors file: {error}") from error
    with contextlib.closing(file.open("rb")) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise Refused(
                f"The tensor '{name}' of {file} is {entry['dtype']}",
                allowed=", ".join(DTYPES),
                cure="convert the expert to float32, bfloat16 or float16",
            )
        layout = Layout(entry["dtype"], tuple(entry["shape"]))
        found.append((name, layout, _Place(file, 8 + length + entry["data_offsets"][0])))
    return found
