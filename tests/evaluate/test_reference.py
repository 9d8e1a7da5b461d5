"""Held-out records read back from a run's folders: pixels from packs, captions from Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from atoll.core.conditioning import Conditioning
from atoll.core.errors import DataError, Refused
from atoll.core.manifest import Commons, Encoder, Manifest, Partition, Picture, Shard
from atoll.core.pack import ShardCard, write_pack, write_shard_card
from atoll.core.storage import Storage
from atoll.evaluate.reference import TRAIN, load_records

PICTURE = Picture(channels=1, height=2, width=2)


def write_shard(folder: Path, name: str, splits: list[str], *, packed: int | None = None) -> None:
    """A shard whose record i, in the order of its Parquet file, is all grey of level i."""
    folder.mkdir(parents=True)
    table = {
        "id": [f"{name}-{i}" for i in range(len(splits))],
        "image": [b""] * len(splits),
        "caption": [f"{name} {i}" for i in range(len(splits))],
        "label": [None if i == 0 else str(i) for i in range(len(splits))],
        "owner": [None] * len(splits),
        "split": splits,
    }
    pyarrow.parquet.write_table(pa.table(table), folder / "data-00000.parquet")
    order = [i for i, s in enumerate(splits) if s == "train"]
    held = [i for i, s in enumerate(splits) if s == "held-out"][:packed]
    levels = torch.tensor(order + held, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    null = Conditioning(
        torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 3),
        torch.ones(1, dtype=torch.bool),
    )  # fmt: skip
    rows = len(levels)
    write_pack(
        folder / "pack-00000.safetensors", levels.expand(-1, 1, 2, 2), torch.zeros(rows), null
    )
    card = ShardCard(
        name=name,
        records=len(order),
        held_out=len(held),
        picture=PICTURE,
        encoder="",
        packs={"pack-00000.safetensors": rows},
        files={"data-00000.parquet": "", "pack-00000.safetensors": ""},
    )
    write_shard_card(folder, card)


def manifest() -> Manifest:
    def shard(name: str) -> Shard:
        return Shard(path=f"shards/{name}", sha256="", records=0, held_out=0)

    return Manifest(
        picture=PICTURE,
        encoder=Encoder(path="", sha256="", spec="fit"),
        partition=Partition(path="", sha256="", by="clusters"),
        commons=Commons(path="commons", sha256="", declared="0.1", records=0, held_out=0),
        shards={"b": shard("b"), "a": shard("a")},
        seed=0,
    )


def test_records_keep_picture_caption_label_and_shard_together(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/a", "a", ["held-out", "train", "held-out"])
    write_shard(tmp_path / "shards/b", "b", ["train", "held-out"])
    write_shard(tmp_path / "commons", "commons", ["train", "train", "train", "held-out"])
    run = Storage(tmp_path)
    records = load_records(run, manifest())
    assert records.captions == ("a 0", "a 2", "b 1", "commons 3")
    assert records.labels == (None, "2", "1", "3")
    assert records.shards == ("a", "a", "b", "commons")
    assert records.pictures[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    train = load_records(run, manifest(), split=TRAIN)
    assert train.captions == ("a 1", "b 0", "commons 0", "commons 1", "commons 2")
    assert train.pictures[:, 0, 0, 0].tolist() == [1, 0, 0, 1, 2]


def test_a_run_without_held_out_records_says_what_to_do(tmp_path: Path) -> None:
    for name in ("shards/a", "shards/b", "commons"):
        write_shard(tmp_path / name, name, ["train"])
    with pytest.raises(DataError, match="no held-out records"):
        load_records(Storage(tmp_path), manifest())


def test_packs_and_parquet_that_do_not_match_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/a", "a", ["train", "held-out", "held-out"], packed=1)
    write_shard(tmp_path / "shards/b", "b", ["train"])
    write_shard(tmp_path / "commons", "commons", ["train"])
    with pytest.raises(Refused, match="2 held-out records and 1 packed"):
        load_records(Storage(tmp_path), manifest())
