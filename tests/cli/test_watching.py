"""status, logs, stop and resume beside a train that is at work, from another terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from atoll.core.storage import Storage
from tests.cli.conftest import SHARDS, TRAIN, atoll, content, count, done
from tests.waiting import PATIENCE_SECONDS, until

SHARD = "shard-02"
LONG = [f"--shard={SHARD}", *TRAIN, "--passes=36", "--set", "training.checkpoints=36"]
ROW = {
    "shard", "state", "stage", "island", "labels", "generation", "images_seen", "of",
    "images_per_second", "percent", "mfu", "loss", "eta_seconds", "committed_images_seen",
    "silent_seconds", "cost", "reason",
}  # fmt: skip


Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def command() -> Iterator[Command]:
    """A command in a terminal of its own, which is closed after the test."""
    script = "from atoll.cli.main import run; run()"
    begun: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", script, *map(str, arguments)]
        begun.append(subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def straight(based: Path, place: Path) -> dict[str, str]:
    """The same training without Ray and without a stop; its files by name -> sha256."""
    from atoll.core.config import apply_overrides
    from atoll.core.manifest import Manifest
    from atoll.islands.island import run_island
    from atoll.islands.settings import TrainConfig
    from atoll.islands.supervise import plan_islands, write_order

    shutil.copytree(based, place)
    run = Storage(place)
    overrides = [text for text in LONG if "=" in text and not text.startswith("--")]
    config = apply_overrides(TrainConfig(), [*overrides, "training.passes=36"])
    manifest = Manifest.load(run)
    plan_islands(run, manifest, config)
    write_order(run, manifest, config, SHARD)
    run_island(run.uri, SHARD)
    return results(place)


def results(run: Path) -> dict[str, str]:
    """What an island was told and what it made; commits are named by their generation."""
    here = f"islands/{SHARD}"
    names = ("island.json", "metrics.jsonl", "preview.png", "expert/", "gate_head/")
    made = tuple(f"{here}/{name}" for name in names)
    return {name: sha for name, sha in content(run).items() if name.startswith(made)}


def test_stop_and_resume_from_another_terminal(based, tmp_path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    here = run / "islands" / SHARD
    planned = done("status", run)
    assert [row["state"] for row in planned["shards"]] == ["planned"] * 3
    assert all(set(row) == ROW for row in planned["shards"])

    # A pipe that nobody reads is full after some 40 looks, and then no more are taken.
    looks = tmp_path / "looks"
    with looks.open("w") as looked:
        watch = command("status", run, "--watch", "--every=0.5", "--json", stdout=looked)
    expected = straight(based, tmp_path / "straight")
    until(lambda: looks.stat().st_size, by=watch)  # while nothing is trained
    train = command("train", run, *LONG, "--json")
    until(lambda: count(here / "commits") >= 2, by=train, every=0.05)
    running = done("status", run)["shards"][2]
    assert (running["state"], running["island"]) == ("running", "local")
    assert running["generation"] == 1
    assert 0 < running["images_seen"] <= running["of"]
    table = atoll("status", run)
    assert table.code == 0
    assert table.out.splitlines()[3].startswith(f"{SHARD}  running  local   1")
    assert atoll("train", run, "--json").code == 7  # the run is in use, and yet
    # What is at work was told otherwise.
    assert atoll("resume", run, "--allow-inexact-resume", "--json").code == 7

    assert done("stop", run, SHARD)["asked"] == [SHARD]
    out, _ = train.communicate(timeout=PATIENCE_SECONDS)
    assert train.returncode == 6
    error = json.loads(out)["error"]
    assert "Stopped as asked: shard-02" in error["what"]
    assert "atoll resume" in error["cure"]
    stopped = done("status", run)["shards"][2]
    assert stopped["state"] == "stopped"
    assert 0 < stopped["committed_images_seen"] < stopped["of"]
    assert not (here / "expert").exists()

    said = done("resume", run)  # what train was told: this shard, so configured
    assert said["trained"] == [SHARD]
    assert results(run) == expected
    assert count(here / "tensorboard") == 1
    last = done("status", run)["shards"][2]
    assert (last["state"], last["images_seen"], last["generation"]) == ("done", last["of"], 2)

    logs = done("logs", run, SHARD)["lines"]
    assert len({line["submission_id"] for line in logs}) == 2
    assert "Stopped expert-shard-02" in atoll("logs", run, SHARD).out
    assert done("logs", run, SHARD, "--lines=1")["lines"] == logs[-1:]

    # It goes on while anything may happen: the other two were never asked for.
    assert watch.poll() is None
    watch.terminate()
    watch.wait()
    seen = [json.loads(line) for line in looks.read_text().splitlines()]
    states = [look["shards"][2]["state"] for look in seen]
    assert states[0] == "planned"
    assert "running" in states


def test_what_is_refused(based, tmp_path, untouched) -> None:
    with untouched(based):
        for name in ("status", "logs", "stop", "resume"):
            more = [SHARD] if name == "logs" else []
            assert atoll(name, tmp_path / "nowhere", *more, "--json").code == 2
        for name in ("logs", "stop", "resume"):
            said = atoll(name, based, "shard-2", "--json")
            assert said.code == 2
        assert "Did you mean 'shard-02'" in atoll("stop", based, "shard-2").err
        assert "begin with `atoll train" in str(atoll("resume", based, "--json").error["cure"])
        assert atoll("logs", based, SHARD).out.strip() == "nothing yet"


def test_what_is_done_is_not_asked_to_stop(trained, untouched) -> None:
    with untouched(trained):
        assert done("stop", trained)["asked"] == []
        assert done("resume", trained)["trained"] == []
        watched = atoll("status", trained, "--watch", "--json")
        (look,) = [json.loads(line) for line in watched.out.splitlines()]
        assert look["ended"]
        assert [row["state"] for row in look["shards"]] == ["done"] * len(SHARDS)


def test_resume_passes_leave_on(based, tmp_path, monkeypatch) -> None:
    from atoll.core.config import save_config
    from atoll.islands import supervise
    from atoll.islands.settings import TrainConfig

    run, told = tmp_path / "run", []
    shutil.copytree(based, run)
    # As a command before that was allowed it: once is not for ever.
    save_config(TrainConfig(threads=2, bitwise_resume=False), Storage(run), "islands")

    def train(_run: Storage, _manifest: object, config: TrainConfig, **_: object) -> list[str]:
        told.append(config)
        return []

    monkeypatch.setattr(supervise, "train", train)
    done("resume", run, SHARD)
    done("resume", run, SHARD, "--allow-inexact-resume")
    assert [(config.threads, config.bitwise_resume) for config in told] == [(2, True), (2, False)]


def test_islands_that_are_refused(based, tmp_path, untouched) -> None:
    secret = "7f3a9c0d1e2b4a5968778695a4b3c2d1"
    file = tmp_path / "islands.yaml"
    with untouched(based):
        for text, code, named in (
            ("islands: [{name: a, adress: 'http://h:1'}]", 3, "Did you mean 'address'"),
            (f"islands: [{{name: a, address: 'http://h:1', token: {secret}}}]", 3, "a secret"),
            ("islands: [{name: a, local: true, shards: [shard-2]}]", 2, "Did you mean 'shard-02'"),
        ):
            file.write_text(text)
            said = atoll("train", based, "--islands", file, "--json")
            assert said.code == code
            assert named in str(said.error)
            assert secret not in said.out + said.err
        both = atoll("train", based, "--islands", file, "--address=http://h:1", "--json")
        assert both.code == 2
        assert atoll("train", based, "--address=h:1", "--json").code == 2
