"""The benchmarks of jobs at their smallest: a real kill; starts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.cli.main import run as console_script
from atoll.core.storage import Storage
from atoll.islands.settings import DenoiserTraining, HeadTraining, TrainConfig
from benchmarks import kills, start

SMALLEST = TrainConfig(
    training=DenoiserTraining(passes=0.5, checkpoints=2),
    head=HeadTraining(images=64, batch=16, bands=2, checkpoints=1),
    preview=1,
    preview_steps=1,
)


def test_a_kill_is_counted_and_the_bits_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "TRAIN", SMALLEST)
    stages = kills.kills(1, seed=0)
    assert sum(len(stage.lost) for stage in stages.values()) == 1
    assert all(all(stage.same) for stage in stages.values())
    assert all(intervals <= 2 for stage in stages.values() for _, intervals in stage.lost)


def test_a_start_is_timed_until_the_first_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command plans as it is given, and takes its first step as if it had started a head."""
    given: list[str] = []

    class Played:
        def __init__(self, command: list[str], **_: Any) -> None:
            given.extend(command[command.index("train") :])
            monkeypatch.setattr(sys, "argv", ["atoll", *given, "--dry-run"])
            with pytest.raises(SystemExit) as left:
                console_script()
            assert not left.value.code
            Storage(given[1]).write_json("islands/shard-00/heartbeat.json", {})

        def poll(self) -> None:
            return None

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(start, "subprocess", SimpleNamespace(Popen=Played, DEVNULL=None))
    assert start.seconds_to_first_step() > 0
    assert given[0] == "train"


def test_the_least_that_a_start_could_be_is_a_real_job_of_a_real_head() -> None:
    seconds = start.seconds_of_an_empty_job()
    assert seconds > 0
    with pytest.raises(SystemExit, match="did not come"):
        start._until(lambda: False, lambda: False, 0.0)
