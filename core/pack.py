"""Packs: the fixed-shape training tensors of a shard or of the commons, read by row.

`pack-00000.safetensors` ... beside `shard.json`, written by the partitioner, read by islands. Each
file stands alone: `pixels` uint8 `(n, channel, height, width)`, or `latents` float16 of that shape
and, where training sees flips, `mirrored`: the latents of the mirrored pictures, which are not the
mirrored latents. `caption` int32 `(n,)` into a table of the unique captions: `text_tokens` float16
`(m, length, width)`, `text_mask` uint8 `(m, length)`, `text_pooled` float16 `(m, dim)`. Row 0 of
the table is always the empty caption, cond_null. The rows held out come after the rows to train on;
`shard.json` says how many there are of each, and `blocks.safetensors` what every part of these
files must be (`core/blocks.py`). Where a run has buckets every file is of one shape, which
`shard.json` names; the rows to train on come bucket by bucket, and so do those held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.blocks import BLOCKS_NAME, read_blocks
from atoll.core.buckets import Bucket, buckets_among
from atoll.core.cache import BlockCache
from atoll.core.conditioning import Conditioning
from atoll.core.digest import canonical_json, sha256_named
from atoll.core.errors import Refused
from atoll.core.manifest import PIXELS, Artefact, Picture, check_artefact, check_schema
from atoll.core.rows import FarTensor, Rows, far_tensors, one_behind_another
from atoll.core.storage import Storage

CARD_NAME = "shard.json"
LABELS_NAME = "labels.safetensors"  # of the commons: `label` `(n,)`, what each row shows
SCHEMA_VERSION = 1
_TEXT = ("text_tokens", "text_mask", "text_pooled")


class ShardCard(BaseModel):
    """`shard.json`: what the files beside it hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    name: str  # "commons" for the commons
    records: int  # rows to train on
    held_out: int
    picture: Picture
    encoder: str  # fingerprint of the encoder that embedded the captions
    latent_space: str = PIXELS
    flips: bool = False  # whether training sees every record mirrored as well
    packs: dict[str, int]  # file name -> rows, in order
    files: dict[str, str]  # file name -> sha256, of every other file of the folder
    # Pack's name -> its shape, where the run has buckets; absent where all are `picture`.
    shapes: dict[str, Picture] | None = Field(
        default=None, exclude_if=lambda shapes: shapes is None
    )

    @property
    def stored(self) -> tuple[str, ...]:
        """The tensors of x_data in every file, the one that all have first."""
        if self.latent_space == PIXELS:
            return ("pixels",)
        return ("latents", "mirrored") if self.flips else ("latents",)


def write_pack(
    path: Path,
    x_data: Tensor,
    caption: Tensor,
    table: Conditioning,
    *,
    mirrored: Tensor | None = None,
) -> None:
    """Write one file; `table` is the embedded unique captions, the empty one first.

    `x_data` are uint8 pixels, or float16 latents, of which `mirrored` may be those of the mirrored
    pictures.
    """
    assert bool(table.is_null[0]), "row 0 of the caption table is cond_null"
    assert x_data.dtype in (torch.uint8, torch.float16)
    assert mirrored is None or mirrored.dtype == x_data.dtype == torch.float16
    tensors = {
        "pixels" if x_data.dtype == torch.uint8 else "latents": x_data.contiguous(),
        **({} if mirrored is None else {"mirrored": mirrored.contiguous()}),
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
        return _card(path.read_bytes(), str(path))
    except OSError as error:
        raise Refused(f"{path} is not a readable shard card ({error})") from error


def _card(data: bytes, where: str) -> ShardCard:
    try:
        values: Any = json.loads(data)
        check_schema(values, SCHEMA_VERSION, where)
        return ShardCard.model_validate(values)
    except ValueError as error:  # ValidationError is one
        raise Refused(f"{where} is not a readable shard card ({error})") from error


class Pack:
    """The rows of one shard's or the commons' packs; they stay in the files until asked for.

    Where the card says so every row is there twice: row `n + i` of `n` is row `i` mirrored.
    """

    def __init__(self, folder: Path) -> None:
        card = read_shard_card(folder)
        try:
            parts = [load_file(folder / name) for name in card.packs]
        except (OSError, SafetensorError) as error:
            raise Refused(f"A pack in {folder} is not readable ({error})") from error
        self._fill(card, parts, str(folder))

    @classmethod
    def afar(cls, run: Storage, artefact: Artefact, cache: BlockCache) -> Pack:
        """Packs that are not on this machine, read by offset through the cache.

        Checked from the artefact's digest down: it covers `shard.json`, which names the digest of
        `blocks.safetensors`, which has those of the blocks.
        """
        folder = artefact.path
        card = _far_card(run, artefact)
        data = _small_file(run, f"{folder}/{BLOCKS_NAME}")
        if hashlib.sha256(data).hexdigest() != card.files.get(BLOCKS_NAME):
            raise Refused(
                f"{run.uri}/{folder}/{BLOCKS_NAME} is not the file that {CARD_NAME} names"
            )
        files = read_blocks(run, folder, list(card.packs), data)
        pack = object.__new__(cls)
        parts = [far_tensors(file, cache) for file in files.values()]
        pack._fill(card, parts, f"{run.uri}/{folder}", cache)
        return pack

    def _fill(
        self,
        card: ShardCard,
        parts: Sequence[Mapping[str, Tensor | FarTensor]],
        where: str,
        cache: BlockCache | None = None,
    ) -> None:
        rows = list(card.packs.values())
        if (
            not parts
            or any(part.keys() != {*card.stored, "caption", *_TEXT} for part in parts)
            or any([len(part[name]) for part in parts] != rows for name in card.stored)
            or [len(part["caption"]) for part in parts] != rows
            or sum(rows) != card.records + card.held_out
        ):
            raise Refused(f"The packs in {where} do not hold the rows that {CARD_NAME} names")
        self._shapes = _shapes(card)
        if card.shapes is not None and any(
            tuple(part[name].shape[1:]) != card.shapes[file].shape
            for file, part in zip(card.packs, parts, strict=True)
            for name in card.stored
        ):
            raise Refused(f"The packs in {where} do not have the shapes that {CARD_NAME} names")
        self.card = card
        self._cache = cache
        self._stored = [Rows([part[name] for part in parts]) for name in card.stored]
        self._x_data = one_behind_another(self._stored)
        self._text = {name: Rows([part[name] for part in parts]) for name in _TEXT}
        # A number a record, and which are of the empty caption, is all that is held in memory.
        starts = torch.tensor([0, *(len(part["text_tokens"]) for part in parts)]).cumsum(0)
        self._caption = torch.cat(
            [_whole(part["caption"]).long() + s for part, s in zip(parts, starts[:-1], strict=True)]
        )
        self._is_null = torch.zeros(int(starts[-1]), dtype=torch.bool)
        self._is_null[starts[:-1]] = True

    def __len__(self) -> int:
        """Records; mirrored ones are not counted."""
        return len(self._stored[0])

    @property
    def train(self) -> range:
        """Rows to train on."""
        return range(self.card.records)

    @property
    def held_out(self) -> range:
        """Rows that no training ever uses."""
        return range(self.card.records, self.card.records + self.card.held_out)

    def buckets(self, rows: range) -> list[Bucket]:
        """Which of some rows are of one shape, for each shape in the order of its first row."""
        return buckets_among(self._shapes, rows)

    @cached_property
    def null(self) -> Conditioning:
        """cond_null as a batch of one."""
        return self._captions(torch.tensor([0]))

    @property
    def text_width(self) -> int:
        return self._text["text_tokens"].shape[1]

    @property
    def pooled_width(self) -> int:
        return self._text["text_pooled"].shape[0]

    @property
    def is_far(self) -> bool:
        """Whether rows come from afar, and sooner where it is said early which are next."""
        return any(rows.is_far for rows in (self._x_data, *self._text.values()))

    def x_data(self, rows: Tensor) -> Tensor:
        """Pixels in [-1, 1] or scaled latents, float32 `(batch, channel, height, width)`."""
        if self.card.latent_space != PIXELS:
            return self._x_data[rows].float()
        x_data = self._x_data[self._records(rows)].float() / 127.5 - 1
        if not self.card.flips:
            return x_data
        # Pixels need no second copy: mirrored they are the same ones backwards.
        return torch.where((rows >= len(self))[:, None, None, None], x_data.flip(-1), x_data)

    def cond(self, rows: Tensor) -> Conditioning:
        """The embedded captions of some rows."""
        return self._captions(self._caption[self._records(rows)])

    def expect(self, rows: Tensor) -> None:
        """Say which rows are next, the soonest first: what comes from afar is fetched meanwhile."""
        if self._cache is not None:
            captions = self._caption[self._records(rows)]
            places = rows if self.card.latent_space != PIXELS else self._records(rows)
            text = (table.blocks(captions) for table in self._text.values())
            self._cache.expect(chain(self._x_data.blocks(places), *text))

    def _records(self, rows: Tensor) -> Tensor:
        """The records that rows, mirrored ones among them, are of."""
        return rows % len(self) if self.card.flips else rows

    def _captions(self, captions: Tensor) -> Conditioning:
        text = {name: table[captions] for name, table in self._text.items()}
        return Conditioning(
            text["text_tokens"].float(),
            text["text_mask"].bool(),
            text["text_pooled"].float(),
            self._is_null[captions],
        )


def _shapes(card: ShardCard) -> list[tuple[range, Picture]]:
    """Runs of rows of one shape, and the shape."""
    if card.shapes is None:
        return [(range(sum(card.packs.values())), card.picture)]
    if card.shapes.keys() != card.packs.keys():
        raise Refused(f"{CARD_NAME} of {card.name} names the shapes of other files than its packs")
    runs, end = [], 0
    for picture, names in groupby(card.packs, key=card.shapes.__getitem__):
        start, end = end, end + sum(card.packs[name] for name in names)
        runs.append((range(start, end), picture))
    return runs


def _whole(tensor: Tensor | FarTensor) -> Tensor:
    return tensor.whole() if isinstance(tensor, FarTensor) else tensor


def open_pack(run: Storage, artefact: Artefact, cache: BlockCache) -> Pack:
    """The packs of a shard or of the commons, checked against the digest on record.

    A run on this machine is read in place; of one elsewhere only what is used comes here.
    """
    if run.is_local:
        check_artefact(run, artefact)
        return Pack(run.local(artefact.path))
    return Pack.afar(run, artefact, cache)


def _far_card(run: Storage, artefact: Artefact) -> ShardCard:
    """`shard.json` of a folder elsewhere, whose digests together are the artefact's."""
    place = f"{run.uri}/{artefact.path}"
    data = _small_file(run, f"{artefact.path}/{CARD_NAME}")
    card = _card(data, f"{place}/{CARD_NAME}")
    found = sha256_named({**card.files, CARD_NAME: hashlib.sha256(data).hexdigest()})
    there = {name.removeprefix(f"{artefact.path}/") for name in run.list(artefact.path)}
    if found != artefact.sha256 or there != {*card.files, CARD_NAME}:
        raise Refused(
            f"{place} is not the folder that was recorded",
            cure="its files were changed since; restore them from a copy",
        )
    return card


def _small_file(run: Storage, name: str) -> bytes:
    try:
        return run.read_bytes(name)
    except FileNotFoundError as error:
        raise Refused(
            f"{run.uri}/{name} is missing", cure="restore it from a copy, or partition again"
        ) from error


def join(packs: list[Pack]) -> Pack:
    """The training rows of several packs as one, for a control that sees all the data."""
    joined = object.__new__(Pack)
    rows = [torch.tensor(pack.train) for pack in packs]
    starts = torch.tensor([0, *(len(pack._is_null) for pack in packs)]).cumsum(0)
    joined._cache = packs[0]._cache
    joined._stored = [
        one_behind_another(
            [rows.first(pack.card.records) for pack, rows in zip(packs, each, strict=True)]
        )
        for each in zip(*(pack._stored for pack in packs), strict=True)
    ]
    joined._x_data = one_behind_another(joined._stored)
    joined._text = {name: one_behind_another([p._text[name] for p in packs]) for name in _TEXT}
    joined._caption = torch.cat(
        [p._caption[r] + s for p, r, s in zip(packs, rows, starts[:-1], strict=True)]
    )
    joined._is_null = torch.cat([pack._is_null for pack in packs])
    firsts = accumulate((len(pack.train) for pack in packs), initial=0)
    joined._shapes = [
        (range(start + run.start, start + run.stop), bucket.picture)
        for start, pack in zip(firsts, packs, strict=False)
        for bucket in pack.buckets(pack.train)
        for run in bucket.runs
    ]
    joined.card = packs[0].card.model_copy(
        update={"name": "all", "records": len(joined), "held_out": 0}
    )
    return joined
