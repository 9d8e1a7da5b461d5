"""Packs: the fixed-shape training tensors of a shard or of the commons, read by row.

`pack-00000.safetensors` ... beside `shard.json`, written by the partitioner, read by islands. Each
file stands alone: `pixels` uint8 `(n, channel, height, width)`, `caption` int32 `(n,)` into a table
of the unique captions: `text_tokens` float16 `(m, length, width)`, `text_mask` uint8 `(m, length)`,
`text_pooled` float16 `(m, dim)`. Row 0 of the table is always the empty caption, cond_null. The
rows held out come after the rows to train on; `shard.json` says how many there are of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.conditioning import Conditioning, concatenate
from atoll.core.errors import Refused
from atoll.core.manifest import Picture, check_schema
from atoll.core.storage import canonical_json

CARD_NAME = "shard.json"
SCHEMA_VERSION = 1
_TENSORS = {"pixels", "caption", "text_tokens", "text_mask", "text_pooled"}


class ShardCard(BaseModel):
    """`shard.json`: what the files beside it hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    name: str  # "commons" for the commons
    records: int  # rows to train on
    held_out: int
    picture: Picture
    encoder: str  # fingerprint of the encoder that embedded the captions
    packs: dict[str, int]  # file name -> rows, in order
    files: dict[str, str]  # file name -> sha256, of every other file of the folder


def write_pack(path: Path, pixels: Tensor, caption: Tensor, table: Conditioning) -> None:
    """Write one file; `table` is the embedded unique captions, the empty one first."""
    assert bool(table.is_null[0]), "row 0 of the caption table is cond_null"
    tensors = {
        "pixels": pixels.to(torch.uint8).contiguous(),
        "caption": caption.to(torch.int32).contiguous(),
        "text_tokens": table.tokens.to(torch.float16).contiguous(),
        "text_mask": table.mask.to(torch.uint8).contiguous(),
        "text_pooled": table.pooled.to(torch.float16).contiguous(),
    }
    save_file(tensors, path)


def write_shard_card(folder: Path, card: ShardCard) -> None:
    """Write `shard.json` into a folder that is still being made."""
    (folder / CARD_NAME).write_bytes(canonical_json(card.model_dump(mode="json")))


def read_shard_card(folder: Path) -> ShardCard:
    """Read `shard.json`; `Refused` when it is missing, damaged or of another version."""
    path = folder / CARD_NAME
    try:
        values: Any = json.loads(path.read_text())
        check_schema(values, SCHEMA_VERSION, str(path))
        return ShardCard.model_validate(values)
    except (OSError, ValueError, ValidationError) as error:
        raise Refused(f"{path} is not a readable shard card ({error})") from error


class _Rows:
    """Rows of several tensors of one shape, as if they were one; nothing is copied to join them."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = torch.tensor([len(part) for part in self._parts], dtype=torch.long).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The rows `(batch,)` in their order, `(batch, ...)`."""
        if len(self._parts) == 1:
            return self._parts[0][rows]
        holder = torch.bucketize(rows, self._ends, right=True)
        picked = self._parts[0].new_empty((len(rows), *self._parts[0].shape[1:]))
        for index in sorted(set(holder.tolist())):
            here = holder == index
            start = int(self._ends[index]) - len(self._parts[index])
            picked[here] = self._parts[index][rows[here] - start]
        return picked

    def first(self, count: int) -> list[Tensor]:
        """The parts of the first `count` rows."""
        starts = [int(end) - len(p) for end, p in zip(self._ends, self._parts, strict=True)]
        return [p[: max(0, count - start)] for start, p in zip(starts, self._parts, strict=True)]


class Pack:
    """The rows of one shard's or the commons' packs; pixels stay in the files until asked for."""

    def __init__(self, folder: Path) -> None:
        self.card = read_shard_card(folder)
        try:
            parts = [load_file(folder / name) for name in self.card.packs]
        except (OSError, SafetensorError) as error:
            raise Refused(f"A pack in {folder} is not readable ({error})") from error
        rows = list(self.card.packs.values())
        if (
            not parts
            or any(part.keys() != _TENSORS for part in parts)
            or [len(part["pixels"]) for part in parts] != rows
            or [len(part["caption"]) for part in parts] != rows
            or sum(rows) != self.card.records + self.card.held_out
        ):
            raise Refused(f"The packs in {folder} do not hold the rows that {CARD_NAME} names")
        self._pixels = _Rows([part["pixels"] for part in parts])
        # Joined once: a table of unique captions is small beside the pixels.
        starts = torch.tensor([0, *(len(part["text_tokens"]) for part in parts)]).cumsum(0)
        self._caption = torch.cat(
            [part["caption"].long() + start for part, start in zip(parts, starts, strict=False)]
        )
        self._table = concatenate(
            [
                Conditioning(
                    part["text_tokens"].float(),
                    part["text_mask"].bool(),
                    part["text_pooled"].float(),
                    torch.arange(len(part["text_tokens"])) == 0,
                )
                for part in parts
            ]
        )

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def train(self) -> range:
        """Rows to train on."""
        return range(self.card.records)

    @property
    def held_out(self) -> range:
        """Rows that no training ever uses."""
        return range(self.card.records, self.card.records + self.card.held_out)

    @property
    def null(self) -> Conditioning:
        """cond_null as a batch of one."""
        return self._table[:1]

    @property
    def text_width(self) -> int:
        return self._table.tokens.shape[2]

    @property
    def pooled_width(self) -> int:
        return self._table.pooled.shape[1]

    def x_data(self, rows: Tensor) -> Tensor:
        """Pixels in [-1, 1], float32 `(batch, channel, height, width)`."""
        return self._pixels[rows].float() / 127.5 - 1

    def cond(self, rows: Tensor) -> Conditioning:
        """The embedded captions of some rows."""
        return self._table[self._caption[rows]]


def join(packs: list[Pack]) -> Pack:
    """The training rows of several packs as one, for a control that sees all the data."""
    joined = object.__new__(Pack)
    rows = [torch.tensor(pack.train) for pack in packs]
    starts = torch.tensor([0, *(len(pack._table) for pack in packs)]).cumsum(0)
    joined._pixels = _Rows([part for p in packs for part in p._pixels.first(p.card.records)])
    joined._caption = torch.cat(
        [p._caption[r] + s for p, r, s in zip(packs, rows, starts[:-1], strict=True)]
    )
    joined._table = concatenate([pack._table for pack in packs])
    joined.card = packs[0].card.model_copy(
        update={"name": "all", "records": len(joined._pixels), "held_out": 0}
    )
    return joined
