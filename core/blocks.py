"""Files that lie afar, cut into blocks that are fetched and checked one by one.

`blocks.safetensors` stands beside the files that are read by offset: for each, its size in bytes
and the sha256 of every block of 64 KiB. So a part of a file is known to be right without the whole,
and the digest of this one small file vouches for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from atoll.core.errors import Refused
from atoll.core.storage import Storage

BLOCKS_NAME = "blocks.safetensors"
# Some rows of small pictures, or a part of a large one: below this a request costs more time than
# its bytes do, and digests take a two-thousandth of the space.
BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True, eq=False)
class FarFile:
    """A file of a storage, its size in bytes, and the digests of its blocks, 32 bytes each."""

    storage: Storage
    name: str
    size: int
    digests: bytes

    def extent(self, block: int) -> tuple[int, int]:
        """The first byte of a block, and the one behind its last."""
        return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)

    def holds(self, block: int, data: bytes) -> bool:
        """Whether these are the bytes of that block."""
        return hashlib.sha256(data).digest() == self.digests[32 * block : 32 * (block + 1)]


def write_blocks(folder: Path, names: Sequence[str]) -> None:
    """Write the digests of the blocks of some files of a local folder that is still being made."""
    tensors = {}
    for name in names:
        digests = bytearray()
        with (folder / name).open("rb") as file:
            while data := file.read(BLOCK_BYTES):
                digests += hashlib.sha256(data).digest()
        tensors[f"{name}/sha256"] = torch.frombuffer(digests, dtype=torch.uint8).reshape(-1, 32)
        tensors[f"{name}/bytes"] = torch.tensor([(folder / name).stat().st_size])
    save_file(tensors, folder / BLOCKS_NAME)


def read_blocks(
    storage: Storage, folder: str, names: Sequence[str], data: bytes
) -> dict[str, FarFile]:
    """The files `names` of `folder`, by the content of their `blocks.safetensors`.

    Raises `Refused` where that is damaged or does not know one of them.
    """
    try:
        tensors = load(data)
        return {name: _file(storage, f"{folder}/{name}", tensors, name) for name in names}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise Refused(
            f"{storage.uri}/{folder}/{BLOCKS_NAME} does not fit the files beside it ({error})",
            cure="restore the folder from a copy",
        ) from error


def _file(storage: Storage, path: str, tensors: dict[str, Tensor], name: str) -> FarFile:
    digests, size = tensors[f"{name}/sha256"], int(tensors[f"{name}/bytes"])
    if digests.dtype != torch.uint8 or digests.shape != (-(-size // BLOCK_BYTES), 32):
        raise ValueError(f"{name} of {size} bytes has digests {tuple(digests.shape)}")
    return FarFile(storage, path, size, digests.numpy().tobytes())
