"""Packs: rows, captions and cond_null come back; what does not fit its card is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core import rows as rows_module
from atoll.core import seeds
from atoll.core.blocks import BLOCK_BYTES, BLOCKS_NAME, write_blocks
from atoll.core.cache import BlockCache
from atoll.core.conditioning import Conditioning
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import Refused
from atoll.core.manifest import Artefact, Picture
from atoll.core.pack import (
    CARD_NAME,
    Pack,
    ShardCard,
    join,
    open_pack,
    read_shard_card,
    write_pack,
    write_shard_card,
)
from atoll.core.storage import Storage

MakeCond = Callable[..., Conditioning]
# Rows and unique captions of each file.
FILES = ((5, 3), (4, 4))


def pixels(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, 4, 4), dtype=torch.uint8, generator=generator)


def write(folder: Path, cond: MakeCond, *, name: str = "s0", **card: Any) -> Path:
    folder.mkdir()
    packs = {}
    for number, (rows, captions) in enumerate(FILES):
        file = f"pack-{number:05d}.safetensors"
        table = cond(captions)
        table = Conditioning(table.tokens.half().float(), table.mask, table.pooled, table.is_null)
        write_pack(folder / file, pixels(rows, number), torch.arange(rows) % captions, table)
        packs[file] = rows
    fields = {
        "name": name, "records": 7, "held_out": 2, "packs": packs, "files": {}, "encoder": "e",
        "picture": Picture(channels=3, height=4, width=4),
    }  # fmt: skip
    write_shard_card(folder, ShardCard(**fields | card))
    return folder


@pytest.fixture
def folder(tmp_path: Path, cond: MakeCond) -> Path:
    return write(tmp_path / "s0", cond)


def test_rows_are_those_written_across_files(folder: Path, cond: MakeCond) -> None:
    pack = Pack(folder)
    assert len(pack) == 9
    assert (pack.train, pack.held_out) == (range(7), range(7, 9))
    written = torch.cat([pixels(rows, number) for number, (rows, _) in enumerate(FILES)])
    rows = torch.tensor([8, 0, 5, 5])
    x = pack.x_data(rows)
    assert x.dtype == torch.float32
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), written[rows])
    assert float(x.abs().max()) <= 1
    # Row 5 is row 0 of the second file, whose captions stand behind those of the first.
    captions = [cond(3)[torch.tensor([r % 3])] for r in range(5)]
    captions += [cond(4)[torch.tensor([r % 4])] for r in range(4)]
    got = pack.cond(rows)
    for place, row in enumerate(rows.tolist()):
        assert torch.equal(got.tokens[place], captions[row].tokens[0].half().float())
        assert torch.equal(got.mask[place], captions[row].mask[0])
        assert torch.equal(got.pooled[place], captions[row].pooled[0].half().float())
        assert torch.equal(got.is_null[place], captions[row].is_null[0])


def test_ends_of_the_scale_are_minus_1_and_1(tmp_path: Path, cond: MakeCond) -> None:
    folder = write(tmp_path / "x", cond)
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    write_pack(folder / "pack-00000.safetensors", ends, torch.zeros(2), cond(1))
    card = {"records": 2, "held_out": 0, "packs": {"pack-00000.safetensors": 2}}
    values = json.loads((folder / CARD_NAME).read_text()) | card
    (folder / CARD_NAME).write_text(json.dumps(values))
    assert Pack(folder).x_data(torch.arange(2))[:, 0, 0, 0].tolist() == [-1.0, 1.0]


def test_mirrored_rows_stand_behind_the_others(tmp_path: Path, cond: MakeCond) -> None:
    pack = Pack(write(tmp_path / "x", cond, flips=True))
    rows = torch.tensor([8, 0, 5])
    assert len(pack) == 9
    assert torch.equal(pack.x_data(rows + 9), pack.x_data(rows).flip(-1))
    mixed = pack.x_data(torch.tensor([0, 9 + 5]))
    assert torch.equal(mixed[0], pack.x_data(rows)[1])
    assert torch.equal(mixed[1], pack.x_data(rows)[2].flip(-1))
    assert torch.equal(pack.cond(rows + 9).tokens, pack.cond(rows).tokens)


def test_null_is_the_empty_caption(folder: Path, cond: MakeCond) -> None:
    null = Pack(folder).null
    assert len(null) == 1
    assert null.is_null.tolist() == [True]
    assert torch.equal(null.tokens, cond(3).tokens[:1].half().float())
    assert Pack(folder).text_width == 8


def test_table_must_begin_with_the_empty_caption(tmp_path: Path, cond: MakeCond) -> None:
    with pytest.raises(AssertionError, match="cond_null"):
        write_pack(tmp_path / "x", pixels(1, 0), torch.zeros(1), cond(3)[1:])


def test_joined_packs_have_all_training_rows_and_no_held_out(
    tmp_path: Path, cond: MakeCond
) -> None:
    one = Pack(write(tmp_path / "one", cond))

    def negative(n: int) -> Conditioning:
        c = cond(n)
        return Conditioning(-c.tokens, c.mask, -c.pooled, c.is_null)

    two = Pack(write(tmp_path / "two", negative, records=4, held_out=5))
    joined = join([one, two])
    assert len(joined) == 11
    assert (joined.train, joined.held_out) == (range(11), range(11, 11))
    assert joined.card.name == "all"
    for row in range(11):
        pack, its = (one, row) if row < 7 else (two, row - 7)
        mine, theirs = torch.tensor([row]), torch.tensor([its])
        assert torch.equal(joined.x_data(mine), pack.x_data(theirs))
        assert torch.equal(joined.cond(mine).tokens, pack.cond(theirs).tokens)
        assert torch.equal(joined.cond(mine).is_null, pack.cond(theirs).is_null)
    assert torch.equal(joined.null.tokens, one.null.tokens)


def test_rows_of_several_files_come_in_the_order_they_are_asked_for(folder: Path) -> None:
    """Files of 5 and 4 rows; every pair of rows, and the empty batch."""
    pack = Pack(folder)
    each = torch.cat([pack.x_data(torch.tensor([row])) for row in range(9)])
    for a in range(9):
        for b in range(9):
            assert torch.equal(pack.x_data(torch.tensor([a, b, a])), each[[a, b, a]])
    assert pack.x_data(torch.tensor([], dtype=torch.long)).shape == (0, *each.shape[1:])
    with pytest.raises(IndexError):
        pack.x_data(torch.tensor([9]))


def test_card_round_trip(folder: Path) -> None:
    card = read_shard_card(folder)
    write_shard_card(folder, card)
    assert read_shard_card(folder) == card
    assert card.packs == {"pack-00000.safetensors": 5, "pack-00001.safetensors": 4}


def _card(**changes: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / CARD_NAME).read_text()) | changes
        (folder / CARD_NAME).write_text(json.dumps(values))

    return apply


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "pack-00000.safetensors")
        change(tensors)
        save_file(tensors, folder / "pack-00000.safetensors")

    return apply


STRANGE: dict[str, Callable[[Path], Any]] = {
    "more records than rows": _card(records=8),
    "fewer records than rows": _card(records=6),
    "other rows in a file": _card(packs={"pack-00000.safetensors": 4, "pack-00001.safetensors": 5}),
    "file missing": lambda f: (f / "pack-00001.safetensors").unlink(),
    "file too many": _card(
        packs={
            "pack-00000.safetensors": 5,
            "pack-00001.safetensors": 4,
            "pack-00002.safetensors": 0,
        }
    ),
    "no files": _card(packs={}),
    "no files, no rows": _card(packs={}, records=0, held_out=0),
    "torn file": lambda f: (f / "pack-00001.safetensors").write_bytes(b"abc"),
    "no captions": _tensors(lambda t: t.pop("caption")),
    "captions missing": _tensors(lambda t: t.update(caption=t["caption"][:3])),
    "pixels missing": _tensors(lambda t: t.update(pixels=t["pixels"][:3].clone())),
    "surprise": _tensors(lambda t: t.update(surprise=torch.zeros(1))),
    "no card": lambda f: (f / CARD_NAME).unlink(),
    "torn card": lambda f: (f / CARD_NAME).write_text("{"),
    "list for a card": lambda f: (f / CARD_NAME).write_text("[]"),
    "other schema": _card(schema_version=2),
    "surprise in the card": _card(surprise=1),
}


@pytest.mark.parametrize("how", STRANGE)
def test_what_does_not_fit_is_refused(folder: Path, how: str) -> None:
    STRANGE[how](folder)
    with pytest.raises(Refused):
        Pack(folder)


# -- packs that lie afar -------------------------------------------------------------------------


def publish(folder: Path, place: Storage) -> Artefact:
    """Put a folder of packs on a store, with all the digests that a partition writes."""
    card = json.loads((folder / CARD_NAME).read_text())
    write_blocks(folder, [name for name in card["packs"] if (folder / name).is_file()])
    files = {p.name: sha256_file(p) for p in folder.iterdir() if p.name != CARD_NAME}
    (folder / CARD_NAME).write_text(json.dumps(card | {"files": files}))
    place.publish(folder, "shards/s0")
    return Artefact(path="shards/s0", sha256=sha256_folder(folder))


@pytest.mark.parametrize("small", [0, 2**18])
def test_far_rows_are_the_near_ones(
    folder: Path, flaky: type[Any], monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """Whether a small tensor is fetched whole or by its rows."""
    monkeypatch.setattr(rows_module, "_SMALL", small)
    place = Storage("flaky://run")
    far = open_pack(place.patient(), publish(folder, place), BlockCache(1))
    near = Pack(folder)
    assert (far.is_far, near.is_far) == (small == 0, False)
    assert (len(far), far.card, far.train) == (len(near), near.card, near.train)
    assert (far.text_width, far.pooled_width) == (near.text_width, near.pooled_width)
    assert torch.equal(far.null.tokens, near.null.tokens)
    flaky.failures = 2
    for rows in (torch.tensor([8, 0, 5, 5]), torch.arange(9), torch.tensor([], dtype=torch.long)):
        far.expect(rows)
        assert torch.equal(far.x_data(rows), near.x_data(rows))
        for name, values in vars(near.cond(rows)).items():
            assert torch.equal(getattr(far.cond(rows), name), values)
    with pytest.raises(IndexError):
        far.x_data(torch.tensor([9]))


def test_only_what_is_needed_comes_from_afar(tmp_path: Path, cond: MakeCond) -> None:
    """8 MiB of pictures: rows cross blocks, and a cache of 4 MiB turns over."""
    folder = write(tmp_path / "x", cond)
    pictures = torch.randint(0, 256, (680, 3, 64, 64), dtype=torch.uint8)
    write_pack(folder / "pack-00000.safetensors", pictures, torch.arange(680) % 3, cond(3))
    values = json.loads((folder / CARD_NAME).read_text())
    values |= {"packs": {"pack-00000.safetensors": 680}, "records": 600, "held_out": 80}
    (folder / "pack-00001.safetensors").unlink()
    (folder / CARD_NAME).write_text(json.dumps(values))
    place, cache = Storage(f"memory://{tmp_path.name}"), BlockCache(1 / 256)
    far = open_pack(place, publish(folder, place), cache)
    near = Pack(folder)
    assert far.is_far
    far.x_data(torch.tensor([3, 300]))
    assert cache.bytes_fetched < 8 * BLOCK_BYTES
    for step in range(12):
        rows = torch.from_numpy(seeds.order(0, "x", first=64 * step, count=64, n=600))
        far.expect(torch.from_numpy(seeds.order(0, "x", first=64 * step + 64, count=64, n=600)))
        assert torch.equal(far.x_data(rows), near.x_data(rows))
    place.remove("")


FAR_STRANGE: dict[str, Callable[[Storage], Any]] = {
    "no card": lambda s: s.remove("shards/s0/shard.json"),
    "torn card": lambda s: s.write_bytes("shards/s0/shard.json", b"{"),
    "another card": lambda s: s.write_json(
        "shards/s0/shard.json", s.read_json("shards/s0/shard.json") | {"encoder": "other"}
    ),
    "another file": lambda s: s.write_bytes("shards/s0/pack-00000.safetensors", b"\0" * 4096),
    "file missing": lambda s: s.remove("shards/s0/pack-00001.safetensors"),
    "file too many": lambda s: s.write_bytes("shards/s0/surprise", b"1"),
    "no blocks": lambda s: s.remove(f"shards/s0/{BLOCKS_NAME}"),
    "other blocks": lambda s: s.write_bytes(f"shards/s0/{BLOCKS_NAME}", b"1"),
}


@pytest.mark.parametrize("how", FAR_STRANGE)
def test_what_was_changed_afar_is_refused(folder: Path, tmp_path: Path, how: str) -> None:
    place = Storage(f"memory://{tmp_path.name}")
    made = publish(folder, place)
    FAR_STRANGE[how](place)
    with pytest.raises(Refused):
        open_pack(place, made, BlockCache(1))
    place.remove("")


@pytest.mark.parametrize("how", [h for h in STRANGE if "card" not in h and "schema" not in h])
def test_far_packs_that_do_not_fit_their_card_are_refused(
    folder: Path, tmp_path: Path, how: str
) -> None:
    """With digests that fit: somebody may have recorded it so."""
    STRANGE[how](folder)
    place = Storage(f"memory://{tmp_path.name}")
    made = publish(folder, place)
    with pytest.raises(Refused):
        open_pack(place, made, BlockCache(1))
    place.remove("")
