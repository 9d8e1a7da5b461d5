from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from atoll.core.errors import Refused, UsageError
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.partitioner import forget as forget_module
from atoll.partitioner.forget import forget
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig

Write = Callable[[Path, list[dict[str, Any]]], str]
Configure = Callable[..., PartitionConfig]
Digests = Callable[[Storage], dict[str, str]]
Rows = list[dict[str, Any]]


def contents(run: Storage, shard: str) -> set[tuple[bytes, str]]:
    found = set()
    for name in run.list(f"shards/{shard}"):
        if name.endswith(".parquet"):
            for row in pq.read_table(io.BytesIO(run.read_bytes(name))).to_pylist():
                found.add((row["image"], row["caption"]))
    return found


@pytest.fixture
def messy(digits: Rows) -> Rows:
    """Digits with twins within and across owners, and pictures that cannot be read."""
    twins = [{**row, "label": "again"} for row in digits[:30]]
    across = [{**row, "owner": "Bo"} for row in digits[0:80:4]]
    bad = [{**digits[n], "image": digits[n]["image"][:50]} for n in (3, 4, 5)]
    return digits + twins + across + bad


def test_a_forgotten_cluster_leaves_no_trace(
    messy: Rows, parquet: Write, config: Configure, digests: Digests, tmp_path: Path
) -> None:
    settings = config(shards=4, commons="0.2")
    corpus = parquet(tmp_path / "all.parquet", messy)
    for shard in ("shard-01", "shard-03"):
        run = Storage(tmp_path / shard)
        manifest = partition(corpus, run, settings)
        assert list(manifest.shards) == ["shard-00", "shard-01", "shard-02", "shard-03"]
        gone = contents(run, shard)
        untouched = {
            name: digest
            for name, digest in digests(run).items()
            if name.startswith(("encoder/", "commons/", "shards/")) and shard not in name
        }
        forget(run, manifest, shard)
        without = [row for row in messy if (row["image"], row["caption"]) not in gone]
        fresh = Storage(f"memory://fresh-{shard}")
        partition(parquet(tmp_path / "without.parquet", without), fresh, settings)
        assert digests(run) == digests(fresh)
        assert untouched.items() <= digests(run).items()
        assert Manifest.load(run) == manifest == Manifest.load(fresh)
        assert shard not in manifest.shards


def test_a_forgotten_owner_leaves_no_trace(
    messy: Rows, parquet: Write, config: Configure, digests: Digests, tmp_path: Path
) -> None:
    settings = config(by="owner", commons="Museum", max_unreadable=0.1)
    corpus = parquet(tmp_path / "all.parquet", messy)
    for owner, shard in (("Bo", "bo"), ("Cléo", "cleo")):
        run = Storage(tmp_path / shard)
        manifest = partition(corpus, run, settings)
        forget(run, manifest, shard)
        fresh = Storage(f"memory://fresh-{shard}")
        rest = parquet(tmp_path / "rest.parquet", [r for r in messy if r["owner"] != owner])
        partition(rest, fresh, settings)
        assert digests(run) == digests(fresh)


def test_the_ledger_no_longer_leads_from_the_partition_to_the_shard(
    digits: Rows, parquet: Write, config: Configure, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "run")
    corpus = parquet(tmp_path / "c.parquet", digits)
    manifest = partition(corpus, run, config(commons="0.2"))
    forget(run, manifest, "shard-01")
    last = Ledger(run).entries()[-1]
    assert (last.kind, last.sha256) == ("partition", manifest.partition.sha256)
    assert last.shards == ["shard-00", "shard-02"]
    # The command that made the run still finds it done.
    assert partition(corpus, run, config(commons="0.2")) == manifest


def test_what_cannot_be_forgotten_is_refused(
    digits: Rows, parquet: Write, config: Configure, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "run")
    manifest = partition(parquet(tmp_path / "c.parquet", digits), run, config(shards=1))
    before = {name: run.sha256(name) for name in run.list()}
    with pytest.raises(UsageError, match=r"no shard 'shard-0'. Did you mean 'shard-00'\?"):
        forget(run, manifest, "shard-0")
    with pytest.raises(Refused, match="is the only shard"):
        forget(run, manifest, "shard-00")
    assert {name: run.sha256(name) for name in run.list()} == before


def test_an_interrupted_removal_is_finished_by_the_same_call(
    digits: Rows, parquet: Write, config: Configure, digests: Digests, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    corpus = parquet(tmp_path / "c.parquet", digits)
    runs = [Storage(tmp_path / name) for name in ("whole", "torn")]
    for run in runs:
        partition(corpus, run, config(commons="0.2"))
    forget(runs[0], Manifest.load(runs[0]), "shard-02")
    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "write_report", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forget(runs[1], Manifest.load(runs[1]), "shard-02")
    forget(runs[1], Manifest.load(runs[1]), "shard-02")
    assert digests(runs[0]) == digests(runs[1])


def test_a_damaged_partition_is_left_as_it_was(
    digits: Rows, parquet: Write, config: Configure, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "run")
    manifest = partition(parquet(tmp_path / "c.parquet", digits), run, config())
    run.write_bytes("partition/assignments.parquet", b"PAR1 damaged")
    before = {name: run.sha256(name) for name in run.list()}
    with pytest.raises(Refused, match="not readable"):
        forget(run, manifest, "shard-00")
    assert {name: run.sha256(name) for name in run.list()} == before
