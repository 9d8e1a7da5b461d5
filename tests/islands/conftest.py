"""A small real run: digits, three shards, a tiny UNet; made once and copied by each test."""

from __future__ import annotations

import contextlib
import io
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from atoll.core.embedding import FitConfig
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands.base import train_base
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.settings import (
    BaseConfig,
    DenoiserTraining,
    HeadTraining,
    TrainConfig,
    TrunkTraining,
)
from atoll.islands.submit import ENDED, Cluster, Jobs, Unreachable
from atoll.partitioner.pipeline import partition
from atoll.partitioner.settings import PartitionConfig
from tests.s3 import BUCKET
from tests.sharing import shared
from tests.waiting import PATIENCE_SECONDS, until

SHARDS = 3
TRUNK = TrunkTraining(images=256, width=8)
CONTROLLER = "controller-journal.jsonl"
TRAIN = TrainConfig(
    slots=2,
    training=DenoiserTraining(passes=2, checkpoints=4),
    head=HeadTraining(images=128, batch=16, bands=2),
    preview=4,
    preview_steps=2,
)


def write_corpus(path: Path, count: int) -> Path:
    """The first digits of scikit-learn as a Parquet corpus."""
    digits = load_digits()
    rows: dict[str, list[object]] = {"image": [], "caption": [], "label": []}
    for picture, label in zip(digits.images[:count], digits.target[:count], strict=True):
        buffer = io.BytesIO()
        Image.fromarray((picture * 15.9375).astype("uint8")).save(buffer, format="PNG")
        rows["image"].append(buffer.getvalue())
        rows["caption"].append(f"a handwritten {label}")
        rows["label"].append(str(label))
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `partition` and `base` leave it."""

    def make(folder: Path) -> None:
        corpus = write_corpus(folder / "digits.parquet", 300)
        run = Storage(folder / "run")
        fit = FitConfig(steps=20)
        config = PartitionConfig(shards=SHARDS, commons="0.25", holdout=0.15, fit=fit)
        manifest = partition(str(corpus), run, config)
        training = DenoiserTraining(passes=1, checkpoints=1)
        train_base(run, manifest, BaseConfig(recipe="unet-tiny", training=training, trunk=TRUNK))

    return shared(tmp_path_factory, "islands", make) / "run"


def copied(made: Path, place: Path) -> tuple[Storage, Manifest]:
    """A copy of that run."""
    shutil.copytree(made, place)
    run = Storage(place)
    return run, Manifest.load(run)


@pytest.fixture
def fresh(made: Path, tmp_path: Path) -> Callable[[str], tuple[Storage, Manifest]]:
    """Copies of that run, by name."""

    def copy(name: str = "run") -> tuple[Storage, Manifest]:
        return copied(made, tmp_path / name)

    return copy


def on_s3(run: Storage, name: str) -> Storage:
    """A copy of a run in a bucket."""
    copy = Storage(f"s3://{BUCKET}/{name}")
    for file in run.list():
        copy.write_bytes(file, run.read_bytes(file))
    return copy


@contextlib.contextmanager
def local_head(cpus: int) -> Iterator[Cluster]:
    """One head, by the cluster that it is."""
    with local_heads([HeadOrder("local", cpus)]) as (head,):
        yield head.cluster


@contextlib.contextmanager
def finding(heads: Sequence[Head]) -> Iterator[None]:
    """`train` finds these heads instead of starting others."""

    @contextlib.contextmanager
    def given(orders: Sequence[HeadOrder]) -> Iterator[list[Head]]:
        yield [next(h for h in heads if h.cluster.name == order.name) for order in orders]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atoll.islands.sites.local_heads", given)
        yield


def journal(
    run: Storage, shard: str, event: str, name: str = "journal.jsonl"
) -> list[dict[str, Any]]:
    """The lines of one kind in an island's journal, or in that of its controller."""
    return [line for line in run.read_lines(f"islands/{shard}/{name}") if line["event"] == event]


def ended_job(cluster: Cluster, submitted: dict[str, Any]) -> dict[str, Any]:
    """What Ray says of a job once its process has ended, a moment after its `exit.json`."""
    jobs, told = Jobs(cluster, ask=False), {"status": ""}

    def ended() -> bool:
        with contextlib.suppress(Unreachable):  # a head that has just woken up
            told.update(jobs.details(submitted["submission_id"]))
        return told["status"] in ENDED

    until(ended, every=0.1)
    return told


def answer(cluster: Cluster, token: str | None) -> int:
    """The status of the Jobs API's answer to a token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as said:
            return int(said.status)
    except urllib.error.HTTPError as error:
        return error.code
