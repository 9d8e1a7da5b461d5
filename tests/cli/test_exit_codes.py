"""Every exit code of the table, each reached by a real situation, and the run left as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.core.checkpoint import Checkpoints
from atoll.core.storage import Storage
from atoll.islands.job import main as island_main
from tests.cli.conftest import BASE, PARTITION, SHARD, TRAIN, atoll, done, tree, write_corpus

SMALL = ("--shards=2", "--commons=0.25", "--set", "fit.steps=1")


def refused(code: int, *arguments: object) -> dict[str, object]:
    said = atoll(*arguments, "--json")
    assert said.code == code, (said.out, said.err[-2000:])
    return said.error


# -- 1: failed -----------------------------------------------------------------------------------


def test_1_no_space_left(corpus, tmp_path, monkeypatch, fresh, untouched) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = refused(1, "partition", corpus, tmp_path / "new", *SMALL)
        assert "No space left" in str(error["what"])
        assert "free some space" in str(error["cure"])
        with untouched(fresh):
            refused(1, "assemble", fresh, tmp_path / "copy")
            refused(1, "unlearn", fresh, SHARD)
    done("partition", corpus, tmp_path / "new", *SMALL)
    assert not (tmp_path / "copy").exists()
    done("unlearn", fresh, SHARD)


def test_1_no_space_left_on_a_real_device(corpus, tmp_path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        assert "No space left" in str(refused(1, "partition", corpus, place / "r", *SMALL)["what"])
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_1_a_store_that_does_not_answer(away) -> None:
    """Whatever its client raises: the three kinds in turn."""
    away.rule = lambda _request, _path: "before"
    said = [str(refused(1, "status", "away://run")["what"]) for _ in range(3)]
    assert any("ClientError: the store is away" in what for what in said)


def test_1_an_island_that_fails(based, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    hot = ("--set", "training.optimizer.learning_rate=1e30", "--set", "retries=0")
    error = refused(1, "train", run, "--shard", SHARD, *TRAIN, *hot)
    assert "The loss" in str(error["what"])


# -- 2: usage ------------------------------------------------------------------------------------


def test_2_what_does_not_exist(made, tmp_path, untouched) -> None:
    nowhere = tmp_path / "nowhere"
    with untouched(made):
        for command in (
            ["base", nowhere], ["train", nowhere], ["assemble", nowhere], ["unlearn", nowhere, "x"],
            ["verify", nowhere], ["verify", nowhere / "certificate.json"], ["sample", nowhere, "x"],
            ["evaluate", made, "--reference", nowhere], ["soup", "show", nowhere],
            ["soup", "verify", nowhere], ["soup", "remove", nowhere, "x"],
            ["soup", "create", nowhere, nowhere], ["soup", "add", nowhere, nowhere],
        ):  # fmt: skip
            refused(2, *command)
        assert not nowhere.exists()
        for command in (
            ["train", made, "--shard", "shard-1"], ["unlearn", made, "shard-1"],
            ["train", made, "--shard", "shard-1", "--dry-run"],
            ["sample", made, "x", "--routing", "oracle:shard-1"],
        ):  # fmt: skip
            assert "Did you mean 'shard-01'?" in str(refused(2, *command)["what"])
        error = refused(2, "soup", "remove", made / "soups/all", "shard-1")
        assert "shard-01" in str(error["allowed"])
        for routing in ("ful", "top-k:0", "mass:2", "threshold:x", "sample:", "once:3"):
            assert refused(2, "sample", made, "x", "--routing", routing)["allowed"]
        for guidance in ("nan", "inf", "-1"):
            refused(2, "sample", made, "x", "--guidance", guidance)
        error = refused(2, "soup", "create", nowhere, made, "--dtype", "float31")
        assert "Did you mean" in str(error["what"])
        expert = made / f"islands/{SHARD}/expert"
        for weight in ("0", "-1", "half", "1.5"):
            refused(2, "soup", "create", nowhere, f"{expert}={weight}")


def test_2_options_that_contradict_each_other(corpus, tmp_path) -> None:
    for options in (
        [], ["--shards=2", "--commons=2"], ["--shards=2", "--commons="],
        ["--by=label", "--commons=0.1"], ["--by=label", "--commons=1", "--shards=2"],
        ["--shards=2", "--commons=someone"],
        ["--by=lable", "--commons=1"],
    ):  # fmt: skip
        refused(2, "partition", corpus, tmp_path / "new", *options)
        assert tree(tmp_path / "new") == {}


def test_2_the_last_shard_stays(corpus, tmp_path, untouched) -> None:
    done("partition", corpus, tmp_path / "run", "--shards=1", "--set", "fit.steps=1")
    with untouched(tmp_path / "run"):
        assert "only shard" in str(refused(2, "unlearn", tmp_path / "run", "shard-00")["what"])


# -- 3: configuration ----------------------------------------------------------------------------


def test_3_unknown_keys_recipes_and_encoders(corpus, based, tmp_path, untouched) -> None:
    new = tmp_path / "new"
    error = refused(3, "partition", corpus, new, *SMALL, "--set", "fit.step=1")
    assert "Did you mean 'fit.steps'?" in str(error["what"])
    error = refused(3, "partition", corpus, new, "--shards=2", "--encoder=ViT-B-3/openai")
    assert "Did you mean 'ViT-B-32'?" in str(error["what"])
    refused(3, "partition", corpus, new, "--shards=2", "--encoder=ViT-B-32/nobody")
    refused(3, "partition", corpus, new, "--set", "shards=none")
    refused(3, "partition", corpus, new, *SMALL, "--set", "seed")
    refused(3, "partition", corpus, new, *SMALL, "--holdout=2")
    refused(3, "partition", corpus, new, *SMALL, "--config", tmp_path / "none.json")
    with untouched(based):
        error = refused(3, "train", based, "--set", "training.pases=1")
        assert "Did you mean 'training.passes'?" in str(error["what"])
        assert "Did you mean 'unet-tiny'?" in str(refused(3, "base", based, "--recipe=unet-tin"))
        refused(3, "base", based, "--recipe=pixart-tiny")
        refused(3, "train", based, "--recipe=pixart-tiny")
        refused(3, "train", based, "--recipe=unet-tin")
        refused(3, "train", based, "--passes=0")
        refused(3, "train", based, "--set", "head.batch=1")


# -- 4: data -------------------------------------------------------------------------------------


def test_4_a_corpus_that_is_none(corpus, tmp_path) -> None:
    new = tmp_path / "new"
    missing = refused(4, "partition", tmp_path / "none.parquet", new, *SMALL)
    assert "There is no corpus" in str(missing["what"])
    (tmp_path / "empty").mkdir()
    assert "is empty" in str(refused(4, "partition", tmp_path / "empty", new, *SMALL)["what"])
    (tmp_path / "text.parquet").write_text("not Parquet")
    refused(4, "partition", tmp_path / "text.parquet", new, *SMALL)
    table = pq.read_table(corpus)
    pq.write_table(table.slice(0, 0), tmp_path / "rows.parquet")
    assert "is empty" in str(refused(4, "partition", tmp_path / "rows.parquet", new, *SMALL))
    pq.write_table(table.select(["image", "label"]), tmp_path / "bare.parquet")
    error = refused(4, "partition", tmp_path / "bare.parquet", new, *SMALL)
    assert "captions" in str(error["what"])
    refused(4, "partition", "no-such-protocol://x/y.parquet", new, *SMALL)
    assert tree(new) == {}


def test_4_unreadable_images_beyond_the_share(corpus, tmp_path) -> None:
    rows = pq.read_table(corpus).to_pylist()
    for row in rows[:30]:
        row["image"] = row["image"][:40]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "torn.parquet")
    error = refused(4, "partition", tmp_path / "torn.parquet", tmp_path / "new", *SMALL)
    assert "30 of 300" in str(error["what"])
    assert "torn.parquet row 0" in str(error["what"])
    assert "max_unreadable" in str(error["cure"])
    assert tree(tmp_path / "new") == {}
    done(
        "partition", tmp_path / "torn.parquet", tmp_path / "new", *SMALL,
        "--set", "max_unreadable=0.2",
    )  # fmt: skip


def test_4_more_shards_than_records(tmp_path) -> None:
    few = write_corpus(tmp_path / "few.parquet", 20)
    refused(4, "partition", few, tmp_path / "new", "--shards=40", "--commons=0.5")
    assert tree(tmp_path / "new") == {}


def test_4_no_base_and_no_expert_yet(partitioned, based, untouched) -> None:
    with untouched(partitioned):
        for more in ([], ["--dry-run"], ["--minutes=1"], ["--recipe=unet-tiny"]):
            error = refused(4, "train", partitioned, *more)
            assert "no base" in str(error["what"])
            assert "atoll base" in str(error["cure"])
    with untouched(based):
        assert "atoll train" in str(refused(4, "assemble", based)["cure"])


# -- 5: missing ----------------------------------------------------------------------------------


def test_5_weights_out_of_reach(corpus, tmp_path) -> None:
    script = "from atoll.cli.main import run; run()"
    ended = subprocess.run(
        [sys.executable, "-c", script, "partition", str(corpus), str(tmp_path / "new"),
         "--shards=2", "--encoder=hf-hub:atoll/none", "--json"],
        capture_output=True, text=True, env={"PATH": "", "HF_HUB_OFFLINE": "1",
                                             "HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert ended.returncode == 5, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["code"] == 5
    assert "--encoder fit" in error["cure"]
    assert "Traceback" not in ended.stderr


def test_5_no_digits_no_ensemble_no_encoder(trained, made, tmp_path, monkeypatch) -> None:
    assert "atoll assemble" in str(refused(5, "sample", trained, "x")["cure"])
    shutil.copytree(made / "base", tmp_path / "alone")
    error = refused(5, "sample", tmp_path / "alone", "x")
    assert "--encoder" in str(error["cure"])
    refused(5, "sample", tmp_path / "alone", "x", "--encoder", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = refused(5, "demo", "--smallest", "--out", tmp_path / "demo")
    assert "scikit-learn" in str(error["what"])
    assert "atoll[demo]" in str(error["cure"])


# -- 7: refused ----------------------------------------------------------------------------------


def commands_on(run: Path, out: Path) -> list[list[object]]:
    """Everything that works on a run or reads it."""
    expert = run / "islands/shard-00/expert"
    return [
        ["base", run], ["train", run, *TRAIN], ["train", run, "--dry-run"], ["assemble", run],
        ["assemble", run, out / "copy"], ["unlearn", run, SHARD],
        ["evaluate", run / "base", "--reference", run, "--count=20"],
        ["soup", "create", run / "soups/new", expert], ["soup", "create", out / "new", expert],
        ["soup", "remove", run / "soups/all", SHARD],
    ]  # fmt: skip


def test_7_another_schema_version(fresh, corpus, tmp_path, untouched) -> None:
    manifest = fresh / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with untouched(fresh):
        for command in [
            *commands_on(fresh, tmp_path), ["partition", corpus, fresh, *PARTITION],
            ["sample", fresh, "x"], ["verify", fresh],
        ]:  # fmt: skip
            error = refused(7, *command)
            assert "schema version 2" in str(error["what"])
            assert error["allowed"] == "1"
    assert not (tmp_path / "new").exists()


def test_7_a_second_command_while_one_is_at_work(fresh, corpus, tmp_path, untouched) -> None:
    script = (
        "import sys\n"
        "from atoll.core.lock import exclusive\n"
        "from atoll.core.storage import Storage\n"
        "with exclusive(Storage(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(fresh)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        with untouched(fresh):
            for command in [
                *commands_on(fresh, tmp_path), ["partition", corpus, fresh, *PARTITION],
            ]:  # fmt: skip
                error = refused(7, *command)
                assert "Another command is at work" in str(error["what"])
            done("verify", fresh)  # reading is free
            done("soup", "verify", fresh / "soups/all")
    finally:
        holder.communicate()
    assert not (tmp_path / "new").exists()
    done("soup", "create", tmp_path / "new", fresh / "islands/shard-00/expert")


def damaged(name: str, kept: bytes) -> bytes:
    if name.startswith("ledger/"):
        return kept.replace(b'sha256": "', b'sha256": "0', 1)
    return kept.replace(b"1", b"2") if name.endswith(".json") else kept[:-1] + b"!"


def test_7_a_digest_that_does_not_match(fresh, tmp_path, untouched) -> None:
    expert = fresh / "islands/shard-00/expert"
    cases = {
        "base/config.json": [["base", fresh], ["train", fresh, *TRAIN],
                             ["train", fresh, "--dry-run"], ["sample", fresh / "base", "x"]],
        "islands/shard-00/expert/config.json": [
            ["assemble", fresh], ["unlearn", fresh, SHARD], ["sample", expert, "x"],
            ["soup", "create", tmp_path / "new", expert]],
        "islands/shard-00/gate_head/config.json": [["assemble", fresh], ["unlearn", fresh, SHARD]],
        "encoder/config.json": [["assemble", fresh], ["sample", fresh / "base", "x"],
                                ["unlearn", fresh, SHARD]],
        "ensemble/transformer/config.json": [["sample", fresh, "x"]],
        "shards/shard-02/pack-00000.safetensors": [
            ["evaluate", fresh / "base", "--reference", fresh, "--count=20"],
            ["unlearn", fresh, SHARD]],
        "partition/assignments.parquet": [["unlearn", fresh, SHARD]],
        "soups/all/atoll.json": [["unlearn", fresh, SHARD], ["sample", fresh / "soups/all", "x"]],
        "ledger/000003.json": [["assemble", fresh], ["unlearn", fresh, SHARD]],
    }  # fmt: skip
    for name, commands in cases.items():
        path = fresh / name
        kept = path.read_bytes()
        path.write_bytes(damaged(name, kept))
        with untouched(fresh):
            for command in commands:
                error = refused(7, *command)
                assert "restore" in str(error["cure"]), (name, command, error)
        path.write_bytes(kept)
    done("verify", fresh)


def test_7_an_island_that_refuses_a_changed_shard(based, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(based, run)
    pack = run / f"shards/{SHARD}/pack-00000.safetensors"
    pack.write_bytes(pack.read_bytes()[:-1])
    error = refused(7, "train", run, "--shard", SHARD, *TRAIN)
    assert SHARD in str(error["what"])
    assert "the manifest says" in str(error["what"])


def test_7_foreign_soups(fresh, tmp_path, untouched) -> None:
    ours = fresh / "islands/shard-00/expert"
    stranger = tmp_path / "stranger"
    shutil.copytree(ours, stranger)
    card = json.loads((stranger / "atoll.json").read_text())
    (stranger / "atoll.json").write_text(json.dumps({**card, "name": "x", "base_sha256": "0" * 64}))
    twin = tmp_path / "twin"
    shutil.copytree(ours, twin)
    with untouched(tmp_path):
        error = refused(7, "soup", "create", tmp_path / "new", ours, stranger)
        assert "base_sha256" in str(error["what"])
        refused(7, "soup", "add", fresh / "soups/all", stranger)
        error = refused(7, "soup", "create", tmp_path / "new", ours, twin)
        assert "Two ingredients are named 'shard-00'" in str(error["what"])
        refused(7, "soup", "add", fresh / "soups/all", ours)
        refused(7, "soup", "create", tmp_path / "new", ours, ours)
        refused(7, "soup", "create", tmp_path / "new", fresh / "base")
        refused(7, "soup", "create", tmp_path / "new", fresh / "soups/all")
        refused(7, "soup", "create", fresh / "base", ours)
        refused(7, "soup", "create", fresh / "soups/all", ours)
    done("soup", "create", tmp_path / "one", ours)
    error = refused(7, "soup", "remove", tmp_path / "one", "shard-00")
    assert "last ingredient" in str(error["what"])


def test_7_sampling_a_soup_without_a_readable_recipe(fresh) -> None:
    (fresh / "soups/pair").mkdir()
    for file in (fresh / "soups/all").iterdir():
        shutil.copy(file, fresh / "soups/pair")
    for torn in ("[]", '{"ingredients": 3}', "{"):
        (fresh / "soups/pair/soup.json").write_text(torn)
        refused(7, "sample", fresh / "soups/pair", "x")


def test_7_places_that_are_taken(fresh, corpus, tmp_path, untouched) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with untouched(tmp_path):
        error = refused(7, "demo", "--smallest", "--out", taken)
        assert "holds no demo" in str(error["what"])
        refused(7, "assemble", fresh, taken)
        refused(7, "soup", "create", taken, fresh / "islands/shard-00/expert")
        refused(7, "partition", corpus, fresh, "--shards=2")
        refused(7, "train", fresh, "--passes=3")
    (taken / "shards").mkdir()
    (taken / "shards/mine").write_text("mine")
    with untouched(taken):
        refused(7, "partition", corpus, taken, *SMALL)


def test_0_the_same_command_again_changes_nothing(made, corpus, untouched) -> None:
    with untouched(made):
        done("partition", corpus, made, *PARTITION)
        done("base", made, *BASE)
        assert done("train", made, *TRAIN)["trained"] == []
        done("assemble", made)


# -- 8: fenced -----------------------------------------------------------------------------------


def test_8_another_writer_took_over(fresh, monkeypatch, capsys) -> None:
    run = fresh
    here = f"islands/{SHARD}"
    for name in ("expert", "exit.json", "commits", "checkpoints"):
        Storage(run).remove(f"{here}/{name}")
    claim = Checkpoints.claim

    def overtaken(self: Checkpoints) -> int:
        generation = claim(self)
        claim(Checkpoints(Storage(run), here))
        return generation

    monkeypatch.setattr(Checkpoints, "claim", overtaken)
    assert island_main([str(run), SHARD]) == 8
    assert "taken over" in capsys.readouterr().err
    assert not (run / here / "exit.json").exists()
    assert not (run / here / "expert").exists()
