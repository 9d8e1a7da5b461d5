"""Small real corpora: scikit-learn's digits as PNG, with captions, labels and owners."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atoll.core.embedding import FitConfig
from atoll.core.storage import Storage
from atoll.partitioner.settings import PartitionConfig

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OWNERS = ("Ada", "Bo", "Cléo", "Museum")
Rows = list[dict[str, Any]]


def _png(values: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[[Any], bytes]:
    """Encode an array of samples."""
    return _png


@pytest.fixture(scope="session")
def digits() -> Rows:
    """400 digits, each with a caption, a label and one of four owners."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return [
        {
            "image": _png(picture * 255 / 16),
            "caption": f"a handwritten {WORDS[label]}",
            "label": str(label),
            "owner": OWNERS[number % 4],
        }
        for number, (picture, label) in enumerate(
            zip(data.images[:400], data.target[:400], strict=True)
        )
    ]


@pytest.fixture(scope="session")
def parquet() -> Callable[[Path, Iterable[dict[str, Any]]], str]:
    """Write rows as Parquet; the path as text."""

    def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=64)
        return str(path)

    return write


@pytest.fixture(scope="session")
def config() -> Callable[..., PartitionConfig]:
    """A configuration whose encoder is fitted in a moment."""

    def make(**changes: Any) -> PartitionConfig:
        fit = FitConfig(steps=3, batch=16, image_size=16, width=32, layers=1, context_length=8)
        by_owner = changes.get("by", "clusters") != "clusters"
        defaults = {"fit": fit, "shards": None if by_owner else 3, "records_per_file": 64}
        return PartitionConfig(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def digests() -> Callable[[Storage], dict[str, str]]:
    """sha256 of every file of a run, ledger aside."""

    def read(run: Storage) -> dict[str, str]:
        return {name: run.sha256(name) for name in run.list() if not name.startswith("ledger/")}

    return read
