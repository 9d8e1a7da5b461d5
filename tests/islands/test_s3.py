"""A run on S3: what is refused, and what an outage costs; `test_supervise.py` trains on one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from atoll.core.errors import Refused
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands.signs import Process, ask_to_stop
from atoll.islands.supervise import train
from tests.islands.conftest import TRAIN, on_s3
from tests.s3 import Gate
from tests.waiting import PATIENCE_SECONDS, until

SHARD = "shard-00"


def test_a_store_that_lets_two_writers_create_one_file_is_refused(
    fresh, s3: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = fresh()
    run = on_s3(near, tmp_path.name)
    monkeypatch.setattr(s3, "ignores_conditions", True)
    with pytest.raises(Refused, match="lets two writers create one file"):
        train(run, Manifest.load(run), TRAIN, shards=[SHARD])
    assert not run.exists(f"islands/{SHARD}")


def test_signs_of_life_go_on_after_an_outage(
    s3: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.islands.signs.SIGN_SECONDS", 0.02)
    run, left = Storage(f"s3://runs/{tmp_path.name}"), threading.Event()
    with Process(run, SHARD, leave=left.set).watching():
        monkeypatch.setattr(s3, "away", True)
        until(lambda: s3.turned_away > 20)  # twice what a client tries before it gives up
        monkeypatch.setattr(s3, "away", False)
        ask_to_stop(run, SHARD)
        assert left.wait(PATIENCE_SECONDS)
