"""`atoll base`, `train` and `assemble`: plans, parts, resumed runs and missing islands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.core.config import save_config
from atoll.core.errors import Failed
from atoll.core.storage import Storage
from atoll.islands.base import WORK
from atoll.islands.heads import HeadOrder, local_heads
from atoll.islands.settings import BaseConfig
from tests.cli.conftest import (
    BASE,
    SHARD,
    SHARDS,
    TRAIN,
    atoll,
    content,
    count,
    done,
    interrupted,
    tree,
)
from tests.islands.conftest import finding

RATE = "training.optimizer.learning_rate=0.003"


@pytest.fixture(scope="module", autouse=True)
def _on_one_head() -> Iterator[None]:
    """One head for all commands of this process; others start their own."""
    with local_heads([HeadOrder("local", 2)]) as heads, finding(heads):
        yield


def plans(run: Path) -> dict[str, dict[str, int] | None]:
    manifest = json.loads((run / "manifest.json").read_text())
    return {name: shard["plan"] for name, shard in manifest["shards"].items()}


def test_a_dry_run_writes_nothing(based, untouched) -> None:
    with untouched(based):
        whole = done("train", based, "--dry-run", *TRAIN)
        assert list(whole["plan"]) == list(SHARDS)
        one = done("train", based, "--dry-run", "--shard", SHARD, "--passes=2")
        assert list(one["plan"]) == [SHARD]
        assert one["plan"][SHARD]["images_seen"] > whole["plan"][SHARD]["images_seen"]
        done("train", based, "--dry-run", "--minutes=0.01")
    assert set(plans(based).values()) == {None}


def test_one_island_after_the_other_is_all_at_once(based, trained, made, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    assert done("train", run, "--shard", SHARD, *TRAIN)["trained"] == [SHARD]
    assert all(plans(run).values())  # of all shards, before any other island starts
    assert done("train", run, "--shard", SHARD, *TRAIN)["trained"] == []

    # What is there works already, and says what is missing.
    said = atoll("assemble", run, tmp_path / "part", "--json")
    missing = [shard for shard in SHARDS if shard != SHARD]
    assert said.json["missing"] == missing
    assert "Missing shards" in said.err
    assert json.loads((run / "manifest.json").read_text())["exports"] == [str(tmp_path / "part")]
    sampled = atoll("sample", tmp_path / "part", "x", "--steps=1", "--out", tmp_path / "p")
    assert sampled.code == 0
    assert "1 of 3 shards" in sampled.err
    assert atoll("soup", "create", run / "s", run / "islands/shard-00/expert").code == 2

    # The saved configuration is one to run again.
    saved = shutil.copy(run / "islands/atoll.config.json", tmp_path / "saved.json")
    rest = done("train", run, "--shard=shard-00", "--shard=shard-02", "--config", saved)
    assert rest["trained"] == missing
    done("assemble", run)
    assert tree(run / "ensemble") == tree(made / "ensemble")
    ours, theirs = content(run), content(trained)
    assert {name: sha for name, sha in ours.items() if name.startswith("islands/")} == {
        name: sha for name, sha in theirs.items() if name.startswith("islands/")
    }


def test_what_is_trained_stays_as_it_was_asked_for(based, trained, untouched, tmp_path) -> None:
    otherwise = f"--set={RATE}"
    with untouched(based):
        done("base", based)  # a bare command means what the first one said
        said = atoll("base", based, otherwise, "--json")
        assert said.code == 3
        assert "optimizer.learning_rate=0.003, was None" in str(said.error["what"])
    with untouched(trained):
        assert done("train", trained)["trained"] == []
        for other in (otherwise, "--set=head.broad=0.5"):
            said = atoll("train", trained, other, "--json")
            assert said.code == 3
            assert "trained already, and otherwise" in str(said.error["what"])

    # Where something is left to do, as after a loss that was not finite, it may be done otherwise.
    run = tmp_path / "run"
    shutil.copytree(based, run)
    done("train", run, "--shard", SHARD, *TRAIN)
    other = next(name for name in SHARDS if name != SHARD)
    said = atoll("train", run, "--shard", SHARD, "--shard", other, otherwise, "--json")
    assert said.json["trained"] == [other]
    assert f"{SHARD} were trained otherwise and stay" in said.err
    order = json.loads((run / f"islands/{other}/island.json").read_text())
    assert order["config"]["training"]["optimizer"]["learning_rate"] == 0.003
    assert order["config"]["head"]["batch"] == 16  # and all else as the first command said


def test_minutes_become_passes_once(partitioned, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(partitioned, run)
    done("base", run, "--recipe=unet-tiny", "--minutes=0.01")
    passes = json.loads((run / "base-training/atoll.config.json").read_text())["training"]["passes"]
    assert passes > 0

    def no_head(*_orders: object) -> None:
        raise Failed("Ray does not start")

    # The plan is written before any island starts, so it outlives what goes wrong then.
    monkeypatch.setattr("atoll.islands.sites.local_heads", no_head)
    assert atoll("train", run, "--minutes=0.01", "--json").error["what"] == "Ray does not start"
    planned = plans(run)
    assert all(planned.values())
    # No second probe: the plan that stands is what the same words mean.
    again = atoll("train", run, "--minutes=5", "--json")
    assert again.error["what"] == "Ray does not start"
    assert plans(run) == planned
    # Nor is anything to be repeated to go on as planned.
    assert atoll("train", run, "--json").error["what"] == "Ray does not start"
    assert plans(run) == planned
    assert atoll("train", run, "--passes=77", "--json").code == 7
    done("base", run, "--minutes=1")


@pytest.mark.parametrize("command", ["base", "train"])
def test_two_lengths_of_one_training_are_refused(based: Path, command: str) -> None:
    said = atoll(command, based, "--minutes=1", "--passes=2", "--json")
    assert said.code == 2
    assert "two ways to say how long" in said.error["what"]


def test_minutes_for_what_is_planned_without_them_are_refused(partitioned, tmp_path) -> None:
    """As a command leaves it that was told no length and then interrupted."""
    run = tmp_path / "run"
    shutil.copytree(partitioned, run)
    save_config(BaseConfig(recipe="unet-tiny"), Storage(run), WORK)
    said = atoll("base", run, "--recipe=unet-tiny", "--minutes=1", "--json")
    assert said.code == 3
    assert "planned already" in said.error["what"]


def test_minutes_that_more_islands_would_divide_are_said_to_last(based: Path) -> None:
    said = atoll("train", based, "--minutes=0.01", "--set=slots=12", "--dry-run")
    assert said.code == 0
    assert "with 3 shards it takes 4 times as long" in said.err


def test_minutes_of_the_base_are_probed_once_though_it_was_interrupted(
    partitioned, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(partitioned, run)
    saved = run / "base-training/atoll.config.json"

    def killed(*_given: object, **_options: object) -> None:
        raise Failed("killed")

    with monkeypatch.context() as patch:
        patch.setattr("atoll.islands.base.train_here", killed)
        assert atoll("base", run, "--recipe=unet-tiny", "--minutes=0.01", "--json").code == 1
    first = json.loads(saved.read_text())["training"]["passes"]
    monkeypatch.setattr("atoll.islands.probe.passes_in", killed)
    done("base", run, "--recipe=unet-tiny", "--minutes=0.01")
    assert json.loads(saved.read_text())["training"]["passes"] == first


def test_minutes_of_the_islands_do_not_ask_the_shards(based, tmp_path, monkeypatch) -> None:
    from atoll.cli.training import experts_within
    from atoll.core.manifest import Manifest
    from atoll.core.storage import Storage
    from atoll.islands.settings import TrainConfig

    run = tmp_path / "run"
    shutil.copytree(based, run)
    monkeypatch.setattr("atoll.islands.probe.images_per_second", lambda *a, **k: 100.0)
    manifest = Manifest.load(Storage(run))
    whole = experts_within(Storage(run), manifest, TrainConfig(slots=2), 1.0)
    manifest.shards.pop(next(iter(manifest.shards)))
    fewer = experts_within(Storage(run), manifest, TrainConfig(slots=2), 1.0)
    assert whole == fewer
    assert not whole.planned_by_all
    manifest.commons.declared = "museum"
    owners = experts_within(Storage(run), manifest, TrainConfig(slots=2), 1.0)
    assert owners.planned_by_all


def test_a_batch_that_cannot_be_parted_is_refused_before_it_is_probed(based, untouched) -> None:
    with untouched(based):
        said = atoll(
            "train", based, "--minutes=1", "--set=training.accumulation=3", "--dry-run", "--json"
        )
    assert said.code == 3
    assert "not to be had in 3 parts" in said.error["what"]


@pytest.mark.parametrize("length", ["--passes=3", "--minutes=0.01"])
def test_islands_that_cannot_be_leave_neither_plan_nor_options(
    based, tmp_path, untouched, length: str
) -> None:
    """So the same command, mended, plans as if it were the first."""
    file = tmp_path / "islands.yaml"
    file.write_text("islands: [{name: a, local: true, gpus: 64}]")
    with untouched(based):
        said = atoll("train", based, length, "--islands", file, "--json")
        assert said.code == 3
        assert "is to have 64 GPUs" in said.error["what"]


def test_a_base_that_is_refused_after_its_probe_is_not_remembered(partitioned, untouched) -> None:
    with untouched(partitioned):
        said = atoll(
            "base", partitioned, "--recipe=unet-tiny", "--minutes=0.01",
            "--set=training.lora.rank=2", "--json",
        )  # fmt: skip
        assert said.code == 3
        assert "adapters" in said.error["what"]


def test_averages_decay(based, untouched) -> None:
    with untouched(based):
        said = atoll("train", based, "--set=training.ema_decays=[0.9, 1.5]", "--json")
    assert said.code == 3
    assert "ema_decays" in said.error["what"]


def test_experts_predict_what_their_base_does(based, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    said = atoll("train", run, *TRAIN, "--set=training.prediction=epsilon", "--json")
    assert said.code == 3
    assert "The prediction of the base, as of its experts, is velocity" in said.error["what"]
    cosine = "--set=training.schedule.beta_schedule=squaredcos_cap_v2"
    said = atoll("train", run, *TRAIN, cosine, "--json")
    assert said.code == 3
    assert "The path of the base, as of its experts, is our linear one" in said.error["what"]
    assert "beta_schedule squaredcos_cap_v2" in said.error["what"]
    assert not (run / "islands" / SHARD).exists()
    assert set(plans(run).values()) == {None}


def test_commits_by_the_clock_are_to_be_had_by_command(partitioned, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(partitioned, run)
    clock = ("--set=training.checkpoints=1", "--set=training.checkpoint_seconds=1e-6")
    done("base", run, "--recipe=unet-tiny", "--passes=1", *clock)
    newest = sorted(path.stem for path in (run / "base-training/commits").iterdir())[-2:]
    before, end = (int(name.partition("-")[2]) for name in newest)
    assert 0 < before < end  # by checkpoints=1 alone there is one at the start and one at the end


def resumed_from(folder: Path) -> int:
    """Images that the generation which finished a training found done."""
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    trained = next(entry for entry in journal if entry["event"] == "trained")
    return int(trained["from_images_seen"])


def test_6_base_interrupted_and_resumed(partitioned, tmp_path) -> None:
    long = ["--recipe=unet-tiny", "--passes=12", "--set", "training.checkpoints=12"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    for place in (straight, run):
        shutil.copytree(partitioned, place)
    done("base", straight, *long)
    said = interrupted(["base", str(run), *long], lambda: count(run / "base-training/commits") > 1)
    assert said.code == 6, said
    assert "same command again" in said.error["cure"]
    assert not (run / "base").exists()
    asked = (run / "base-training/atoll.config.json").read_bytes()
    for other in ("threads=2", RATE):
        said = atoll("base", run, "--set", other, "--json")
        assert said.code == 7
        # The bare command is not told again what was refused.
        assert (run / "base-training/atoll.config.json").read_bytes() == asked
    done("base", run)
    assert resumed_from(run / "base-training") > 0
    assert tree(run / "base") == tree(straight / "base")
    assert done("base", run, *BASE[:1])["sha256"] == done("base", straight)["sha256"]


def test_6_base_interrupted_and_resumed_otherwise(partitioned, tmp_path) -> None:
    long = ["--recipe=unet-tiny", "--passes=12", "--set", "training.checkpoints=12"]
    run = tmp_path / "run"
    shutil.copytree(partitioned, run)
    said = interrupted(["base", str(run), *long], lambda: count(run / "base-training/commits") > 1)
    assert said.code == 6, said
    said = atoll("base", run, "--set=training.time.mean=1", "--json")
    assert said.code == 7
    assert "--allow-inexact-resume" in str(said.error["cure"])
    said = atoll("base", run, "--recipe=dit-tiny", "--allow-inexact-resume", "--json")
    assert said.code == 7
    assert "origin.recipe unet-tiny then and dit-tiny now" in said.error["what"]
    faster = "--set=training.optimizer.learning_rate=0.1"
    done("base", run, faster, "--allow-inexact-resume")
    journal = (run / "base-training/journal.jsonl").read_text().splitlines()
    (resumed,) = [line for text in journal if (line := json.loads(text))["event"] == "resumed"]
    assert resumed["bitwise"] is False
    assert resumed["was"]["learning_rate"] == 0.002
    assert resumed["is"]["learning_rate"] == 0.1


def test_6_train_interrupted_and_resumed(based, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    long = ["--shard=shard-02", *TRAIN, "--passes=24", "--set", "training.checkpoints=24"]
    here = run / "islands/shard-02"
    said = interrupted(["train", str(run), *long], lambda: count(here / "commits") > 1)
    assert said.code == 6, said
    assert "committed" in said.error["what"]
    assert json.loads((here / "exit.json").read_text())["code"] == 6
    assert not (here / "expert").exists()
    said = atoll("train", run, "--shard=shard-02", "--set", RATE, "--json")
    assert said.code == 7
    assert "0.003 now" in said.error["what"]
    # The bare command is not told again what was refused, and finishes what the first one began.
    assert done("train", run, "--shard=shard-02")["trained"] == ["shard-02"]
    assert resumed_from(here) > 0
    done("verify", run)
