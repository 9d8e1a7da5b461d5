from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from atoll.core import seeds
from atoll.core.embedding import load_encoder
from atoll.core.errors import AtollError, ConfigError, DataError, Refused, UsageError
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest, check_artefact
from atoll.core.pack import LABELS_NAME, Pack
from atoll.core.pictures import decode, training_pixels
from atoll.core.storage import Storage
from atoll.partitioner import pipeline
from atoll.partitioner.assignments import owner_names, owner_slug, read_assignments
from atoll.partitioner.embed import BATCH, Embedder
from atoll.partitioner.pipeline import partition
from atoll.partitioner.readers import Row
from atoll.partitioner.records import Spool, gather, record_id
from atoll.partitioner.settings import Columns, PartitionConfig, check_options

Write = Callable[[Path, list[dict[str, Any]]], str]
Configure = Callable[..., PartitionConfig]
Digests = Callable[[Storage], dict[str, str]]
Rows = list[dict[str, Any]]


def records(run: Storage, folder: str) -> Rows:
    found: Rows = []
    for name in run.list(folder):
        if name.endswith(".parquet"):
            found += pq.read_table(io.BytesIO(run.read_bytes(name))).to_pylist()
    return found


@pytest.fixture(scope="module")
def corpus(digits: Rows, parquet: Write, tmp_path_factory: pytest.TempPathFactory) -> str:
    return parquet(tmp_path_factory.mktemp("corpus") / "digits.parquet", digits)


@pytest.fixture(scope="module")
def run(corpus: str, config: Configure, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    run = Storage(tmp_path_factory.mktemp("run") / "run")
    partition(corpus, run, config(commons="0.2"))
    return run


def test_each_record_in_exactly_one_shard_and_split(run: Storage, digits: Rows) -> None:
    manifest = Manifest.load(run)
    places: dict[tuple[bytes, str], list[str]] = {}
    ids = []
    for folder in ("commons", *(shard.path for shard in manifest.shards.values())):
        rows = records(run, folder)
        ids += [row["id"] for row in rows]
        for row in rows:
            places.setdefault((row["image"], row["caption"]), []).append(folder)
        held = [row["split"] == "held-out" for row in rows]
        assert held == sorted(held)
        for side in (False, True):
            of_side = [row["id"] for row, h in zip(rows, held, strict=True) if h == side]
            assert of_side == sorted(of_side)
        entry = manifest.commons if folder == "commons" else manifest.shards[folder[7:]]
        assert (entry.records, entry.held_out) == (held.count(False), held.count(True))
    assert len(ids) == len(set(ids))
    assert all(len(folders) == 1 for folders in places.values())
    assert set(places) == {(row["image"], row["caption"]) for row in digits}
    assigned = read_assignments(run)
    assert [row.record for row in assigned] == sorted(ids)
    for shard in manifest.shards:
        here = {row["id"]: row["split"] for row in records(run, f"shards/{shard}")}
        assert here == {row.record: row.split for row in assigned if row.shard == shard}


def test_the_manifest_names_every_artefact_and_the_ledger_its_lineage(run: Storage) -> None:
    manifest = Manifest.load(run)
    for artefact in (
        manifest.encoder, manifest.commons, manifest.partition, *manifest.shards.values()
    ):  # fmt: skip
        check_artefact(run, artefact)
    assert manifest.picture.shape == (1, 8, 8)
    assert len(manifest.shards) == 3
    sizes = [shard.records + shard.held_out for shard in manifest.shards.values()]
    assert max(sizes) > 64, "one of several files, or the tests below say little"
    entries = {(entry.kind, entry.name): entry for entry in Ledger(run).entries()}
    assert {kind for kind, _ in entries} == {
        "encoder",
        "commons",
        "centroids",
        "shard",
        "partition",
    }
    for (kind, name), entry in entries.items():
        expected = {"shard": [name], "partition": sorted(manifest.shards)}.get(kind, [])
        assert entry.shards == expected
    text = b"".join(run.read_bytes(n) for n in run.list() if n.endswith((".json", ".html")))
    assert run.uri.encode() not in text, "a run says nowhere where it lies"


def test_packs_hold_the_same_rows_as_the_records(run: Storage) -> None:
    manifest = Manifest.load(run)
    encoder = load_encoder(run.local("encoder"))
    for shard in manifest.shards.values():
        pack = Pack(run.local(shard.path))
        rows = records(run, shard.path)
        assert len(pack) == len(rows)
        assert len(pack.card.packs) == -(-len(rows) // 64)
        assert pack.card.encoder == encoder.fingerprint()
        every = torch.arange(len(rows))
        pixels = torch.stack([training_pixels(decode(row["image"]), (8, 8), 1) for row in rows])
        assert torch.equal(pack.x_data(every), pixels.float() / 127.5 - 1)
        cond, wanted = pack.cond(every), encoder.condition([row["caption"] for row in rows])
        assert torch.allclose(cond.pooled, wanted.pooled, atol=1e-3)
        assert torch.allclose(cond.tokens, wanted.tokens, atol=1e-2)
        assert torch.equal(cond.mask, wanted.mask)
        assert bool(pack.null.is_null[0])


def test_any_storage_and_any_order_of_rows_give_the_same_files(
    run: Storage, digits: Rows, parquet: Write, config: Configure, digests: Digests, tmp_path: Path
) -> None:
    corpus = parquet(tmp_path / "backwards.parquet", digits[::-1])
    memory = Storage(f"memory://{uuid.uuid4().hex}")
    partition(corpus, memory, config(commons="0.2"))
    assert digests(memory) == digests(run)


def test_the_same_command_again_changes_nothing_and_another_is_refused(
    run: Storage, corpus: str, digits: Rows, parquet: Write, config: Configure, tmp_path: Path
) -> None:
    before = {name: run.sha256(name) for name in run.list()}
    assert partition(corpus, run, config(commons="0.2")) == Manifest.load(run)
    with pytest.raises(Refused, match=r'commons was "0.2", now "0.3".*seed was 0, now 1'):
        partition(corpus, run, config(commons="0.3", seed=1))
    with pytest.raises(Refused, match="the corpus's files"):
        partition(parquet(tmp_path / "o.parquet", digits[:300]), run, config(commons="0.2"))
    assert {name: run.sha256(name) for name in run.list()} == before


def test_an_interrupted_partition_starts_anew_over_its_remains(
    run: Storage, corpus: str, config: Configure, digests: Digests, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torn = Storage(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            partition(corpus, torn, config(shards=4, commons="0.2", seed=5))
    (tmp_path / "run" / "shards" / ".torn").mkdir()
    (tmp_path / "run" / "partition" / ".torn").touch()
    assert not torn.exists("manifest.json")
    partition(corpus, torn, config(commons="0.2"))
    assert digests(torn) == digests(run)


def test_somebody_elses_folder_is_left_alone(
    corpus: str, config: Configure, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.txt").write_text("precious")
    with pytest.raises(Refused, match="holds shards, which no partition wrote"):
        partition(corpus, Storage(tmp_path), config())
    assert [p.name for p in tmp_path.rglob("*")] == ["shards", "mine.txt"]


def test_the_commons_labels_are_its_nearest_centroids(run: Storage) -> None:
    rows = records(run, "commons")
    pictures = [decode(row["image"]) for row in rows]
    vectors = load_encoder(run.local("encoder")).embed_images(pictures).numpy()
    centroids = load_file(run.local("partition/centroids.safetensors"))["centroids"]
    labels = load_file(run.local(f"commons/{LABELS_NAME}"))["label"]
    assert np.array_equal(labels, (vectors @ centroids.T).argmax(axis=1))
    assert set(labels.tolist()) == {0, 1, 2}


def test_owners_are_shards(corpus: str, config: Configure, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    manifest = partition(corpus, run, config(by="owner", commons="Museum"))
    assert list(manifest.shards) == ["ada", "bo", "cleo"]
    assert {row["owner"] for row in records(run, "shards/cleo")} == {"Cléo"}
    assert manifest.partition.by == "owner"
    assert not run.exists("partition/centroids.safetensors")
    assert all(row.distance is None for row in read_assignments(run))


def test_owners_commons_is_labelled_by_contents_of_its_own(
    corpus: str, digits: Rows, parquet: Write, config: Configure, tmp_path: Path, digests: Digests
) -> None:
    """As alike as its encoder sees them, from the commons alone: no shard has a say in them."""
    run = Storage(tmp_path / "run")
    partition(corpus, run, config(by="owner", commons="Museum"))
    rows = records(run, "commons")
    labels = load_file(run.local(f"commons/{LABELS_NAME}"))["label"]
    assert len(labels) == len(rows)
    used = sorted(set(labels.tolist()))
    assert used[-1] + 1 == min(16, sum(row["split"] == "train" for row in rows) // 8)
    encoder = load_encoder(run.local("encoder"))
    vectors = encoder.embed_images([decode(row["image"]) for row in rows]).numpy()
    means = np.stack([vectors[labels == number].mean(axis=0) for number in used])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    own = (vectors @ means.T).argmax(axis=1)
    assert (own == np.searchsorted(used, labels)).mean() > 0.9
    other = Storage(tmp_path / "other")
    fewer = parquet(tmp_path / "fewer.parquet", [r for r in digits if r["owner"] != "Ada"])
    partition(fewer, other, config(by="owner", commons="Museum"))
    assert digests(other)[f"commons/{LABELS_NAME}"] == digests(run)[f"commons/{LABELS_NAME}"]


def test_shards_that_everything_was_fitted_on_are_named(
    corpus: str, config: Configure, tmp_path: Path
) -> None:
    run = Storage(tmp_path / "run")
    manifest = partition(corpus, run, config(fit_on="all"))
    assert manifest.encoder.fitted_on == manifest.partition.fitted_on == list(manifest.shards)
    assert all(entry.shards == list(manifest.shards) for entry in Ledger(run).entries())


def test_a_vector_depends_on_its_picture_alone(
    run: Storage, corpus: str, config: Configure
) -> None:
    with Spool() as spool:
        every = gather(corpus, spool, config()).private[: BATCH + 9]
        embed = Embedder(load_encoder(run.local("encoder")), spool, every)
        together = embed(every)
        assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        for part in (slice(0, 1), slice(5, 8), slice(None, None, -1)):
            assert np.array_equal(embed(every[part]), together[part])


def test_the_training_size_follows_the_commons(
    png: Callable[[Any], bytes], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"image": png(rng.integers(0, 255, (40, 50, 3))), "caption": f"noise {n}"}
        for n in range(60)
    ]
    corpus = parquet(tmp_path / "c.parquet", rows)
    manifest = partition(corpus, Storage("memory://size"), config(commons="0.4"))
    assert manifest.picture.shape == (3, 32, 32)
    other = config(commons="0.4", size=12, channels=1)
    assert partition(corpus, Storage("memory://other"), other).picture.shape == (1, 12, 12)


def test_private_colour_does_not_change_a_grey_commons(
    digits: Rows, png: Callable[[Any], bytes], parquet: Write, config: Configure, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    red = np.zeros((9, 9, 3))
    red[..., 0] = 255
    rows = [*digits[:100], {"image": png(red), "caption": "red", "label": None, "owner": "Zoe"}]
    corpus = parquet(tmp_path / "c.parquet", rows)
    settings = config(by="owner", commons="Ada", holdout=0)
    manifest = partition(corpus, Storage("memory://grey"), settings)
    assert manifest.picture.shape == (1, 8, 8)
    assert "made grey" in caplog.text


def test_a_shard_without_training_records_is_refused(
    digits: Rows, parquet: Write, config: Configure, tmp_path: Path
) -> None:
    lone = next(
        row
        for row in ({**row, "owner": "Lone"} for row in digits[60:])
        if seeds.fraction(
            record_id(Row("", row["image"], row["caption"], row["label"], "Lone")), salt="held-out"
        )
        < 0.05
    )
    corpus = parquet(tmp_path / "c.parquet", [*digits[:60], lone])
    with pytest.raises(DataError, match="'lone' has 1 records, all of them held out"):
        partition(corpus, Storage(tmp_path / "run"), config(by="owner", commons="Ada,Bo"))
    assert not (tmp_path / "run").exists(), "nothing was touched"
    manifest = partition(
        corpus, Storage(tmp_path / "run"), config(by="owner", commons="Ada,Bo", holdout=0)
    )
    assert manifest.shards["lone"].records == 1


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"shards": None}, UsageError, "--shards is needed"),
        ({"commons": "1.5"}, UsageError, "not a fraction"),
        ({"commons": "0"}, UsageError, "not a fraction"),
        ({"commons": " "}, UsageError, "empty"),
        ({"commons": "Ada,Bo"}, UsageError, "by clusters"),
        ({"by": "owner"}, UsageError, "slice of everybody's records"),
        ({"by": "owner", "shards": 3, "commons": "Ada"}, UsageError, "one shard per owner"),
        ({"by": "ownr", "commons": "Ada"}, UsageError, "Did you mean 'owner'"),
        ({"by": "owner", "commons": "Eve"}, UsageError, "names 'Eve'"),
        ({"columns": Columns(image="imag")}, UsageError, "Did you mean 'image'"),
        ({"encoder": "Vit-B-32/openai"}, ConfigError, "Did you mean 'ViT-B-32'"),
        ({"commons": "/nowhere/c.parquet"}, DataError, "There is no corpus"),
        ({"shards": 380}, DataError, "--shards 380 is more than the"),
    ],
)
def test_bad_options_are_clear_and_touch_nothing(
    corpus: str, config: Configure, tmp_path: Path, changes: dict[str, Any],
    kind: type[AtollError], what: str,
) -> None:  # fmt: skip
    run = Storage(tmp_path / "run")
    with pytest.raises(kind, match=what):
        partition(corpus, run, config(**changes))
    assert not (tmp_path / "run").exists()


def test_numbers_are_a_commons_too() -> None:
    check_options(PartitionConfig.model_validate({"shards": 2, "commons": 0.25}))


def test_owner_names_are_plain_and_never_shared() -> None:
    assert owner_slug("Ünal & Søn, Ltd.") == "unal-sn-ltd"
    assert owner_slug("北京").startswith("owner-")
    assert owner_slug("北京") != owner_slug("東京")
    assert len(owner_slug("x" * 500)) == 48
    assert owner_names(["b", "a"]) == {"a": "a", "b": "b"}
    for owners in (["A b", "a-B"], ["Commons"]):
        with pytest.raises(DataError, match="would both be shard"):
            owner_names(owners)


def test_a_picture_is_decoded_from_the_bytes_that_were_given(run: Storage) -> None:
    first = records(run, "commons")[0]
    with Image.open(io.BytesIO(first["image"])) as image:
        assert image.size == (8, 8)
