"""Promise 5: after `atoll unlearn` the run is bitwise one that never had the shard."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from atoll.core.digest import sha256_folder
from tests.cli.conftest import (
    BASE,
    CLAIMS,
    CLOCKS,
    PARTITION,
    SHARD,
    SHARDS,
    TRAIN,
    atoll,
    complete,
    content,
    done,
    tree,
    write_corpus,
)

OTHERS = [shard for shard in SHARDS if shard != SHARD]


def export(run: Path, place: Path) -> None:
    """A soup and a copy of the ensemble outside the run."""
    experts = sorted((run / "islands").glob("*/expert"))
    done("soup", "create", place / "soup", *experts)
    done("assemble", run, place / "copy")


def exported(place: Path) -> dict[str, str]:
    return {name: sha for name, sha in tree(place).items() if not name.startswith("run/")}


def test_the_run_is_bitwise_one_that_never_had_the_shard(made, tmp_path) -> None:
    # Both lie at one place, one after the other: exports are listed by their absolute paths.
    place = tmp_path / "place"
    run = place / "run"
    shutil.copytree(made, run)
    export(run, place)
    done("unlearn", run, SHARD)
    removed, outside = content(run), exported(place)
    assert SHARD not in (run / "manifest.json").read_text()
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["rewritten_exports"] == [str(place / "copy"), str(place / "soup")]
    place.rename(tmp_path / "removed")

    table = pq.read_table(made / f"shards/{SHARD}/data-00000.parquet").to_pylist()
    without = {(row["image"], row["caption"]) for row in table}
    never = write_corpus(tmp_path / "never.parquet", 300, without=without)
    assert sorted(done("partition", never, run, *PARTITION)["shards"]) == OTHERS
    done("base", run, *BASE)
    assert done("train", run, *TRAIN)["trained"] == OTHERS
    complete(run)
    export(run, place)
    # Names first: a difference there reads better than hundreds of digests.
    assert sorted(removed) == sorted(content(run))
    assert removed == content(run)
    assert outside == exported(place)


def test_what_is_set_aside_holds_only_clocks_and_names_of_writers(made: Path) -> None:
    keys = {
        "generation", "images_seen", "of", "images_per_second", "unix_seconds", "schema_version",
        "event", "process", "submission_id", "name", "from_images_seen", "seconds",
        "flops_per_image", "matmul_flops_per_second",
    }  # fmt: skip
    for path in [path for path in made.rglob("*") if path.name in CLOCKS]:
        text = path.read_text()
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            assert set(json.loads(line)) <= keys
    claims = [path for path in made.rglob("*.json") if CLAIMS in str(path)]
    assert claims
    for path in claims:
        assert set(json.loads(path.read_text())) == {"schema_version", "generation", "writer"}


def test_an_island_that_was_for_this_shard_alone_goes_with_it(fresh: Path) -> None:
    saved = fresh / "islands/atoll.config.json"
    config = json.loads(saved.read_text())
    before = dict(config)
    pins = {"a": [], "b": [SHARD], "c": [SHARD, OTHERS[0]]}
    config["islands"] = [{"name": n, "local": True, "shards": s} for n, s in pins.items()]
    saved.write_text(json.dumps(config))
    done("unlearn", fresh, SHARD)
    after = json.loads(saved.read_text())
    assert {i["name"]: i["shards"] for i in after["islands"]} == {"a": [], "c": [OTHERS[0]]}
    assert SHARD not in saved.read_text()
    assert {**after, "islands": []} == before


def test_nothing_else_is_touched(fresh: Path) -> None:
    (fresh / "evaluation").mkdir()
    (fresh / "evaluation/metrics.json").write_text("{}")
    pair = [fresh / f"islands/{shard}/expert" for shard in OTHERS]
    done("soup", "create", fresh / "soups/pair", *pair)
    done("soup", "create", fresh / "soups/lone", fresh / f"islands/{SHARD}/expert")
    before = {name: (fresh / name).stat() for name in tree(fresh)}
    said = done("unlearn", fresh, SHARD)
    after = {name: (fresh / name).stat() for name in tree(fresh)}
    gone = set(before) - set(after)
    assert gone == {
        name
        for name in before
        if SHARD in name.split("/") or name.startswith(("evaluation/", "soups/lone/"))
    }
    assert f"islands/{SHARD}/expert" in said["changed"]
    assert "soups/lone" in said["changed"]
    # Made anew, since the shard was in them: nothing else may change, clocks and inodes included.
    anew = (
        "partition/assignments.parquet", "partition/unreadable.json", "partition/report.html",
        "ensemble/", "soups/all/", "manifest.json",
    )  # fmt: skip
    for name in before.keys() & after.keys():
        if not name.startswith(anew):
            was, now = before[name], after[name]
            assert (was.st_mtime_ns, was.st_ino) == (now.st_mtime_ns, now.st_ino), name
    assert sorted(name for name in set(after) - set(before) if not name.startswith("ledger/")) == [
        "certificate.json"
    ]
    manifest = json.loads((fresh / "manifest.json").read_text())
    assert sorted(manifest["soups"]) == ["soups/all", "soups/pair"]
    done("verify", fresh / "certificate.json")
    done("soup", "verify", fresh / "soups/pair")


def test_exports_within_reach_and_beyond(fresh: Path, tmp_path: Path) -> None:
    one, rest = fresh / f"islands/{SHARD}/expert", fresh / "islands/shard-00/expert"
    for name, experts in {"all": [one, rest], "lone": [one], "rest": [rest], "far": [one, rest],
                          "far-rest": [rest]}.items():  # fmt: skip
        done("soup", "create", tmp_path / name, *experts)
    done("assemble", fresh, tmp_path / "copy")
    for name in ("far", "far-rest"):  # handed out, and now somewhere else
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    rest_before = tree(tmp_path / "rest")
    said = atoll("unlearn", fresh, SHARD, "--json")
    assert said.code == 7
    assert str(tmp_path / "far,") in said.error["what"]
    assert "far-rest" not in said.error["what"]  # the shard was never in it
    certificate = json.loads((fresh / "certificate.json").read_text())
    reached = [str(tmp_path / name) for name in ("all", "copy", "lone")]
    assert certificate["rewritten_exports"] == reached
    assert any(str(tmp_path / "far,") in text for text in certificate["beyond_reach"])
    assert not (tmp_path / "lone").exists()
    assert tree(tmp_path / "rest") == rest_before
    assert [part["name"] for part in done("soup", "show", tmp_path / "all")["ingredients"]] == [
        "shard-00"
    ]
    assert tree(tmp_path / "copy") == tree(fresh / "ensemble")
    listed = json.loads((fresh / "manifest.json").read_text())["exports"]
    assert listed == [str(tmp_path / name) for name in ("all", "copy", "far", "far-rest", "rest")]
    # It is done all the same: the run works on, and the certificate holds.
    assert not (fresh / "unlearn.json").exists()
    done("verify", fresh / "certificate.json")
    done("assemble", fresh)


def test_what_strangers_put_at_an_exports_place_is_theirs(fresh: Path, tmp_path: Path) -> None:
    experts = [fresh / f"islands/{SHARD}/expert", fresh / "islands/shard-00/expert"]
    done("soup", "create", tmp_path / "soup", *experts)
    done("soup", "create", tmp_path / "torn", *experts)
    done("assemble", fresh, tmp_path / "copy")
    for card in [tmp_path / "soup/soup.json", *(tmp_path / "copy").rglob("*/atoll.json")]:
        values = json.loads(card.read_text())
        card.write_text(json.dumps({**values, "base_sha256": "0" * 64}))
    (tmp_path / "torn/soup.json").write_text("[]")
    before = {name: tree(tmp_path / name) for name in ("copy", "soup", "torn")}
    error = atoll("unlearn", fresh, SHARD, "--json").error
    assert all(str(tmp_path / name) in str(error["what"]) for name in before)
    assert {name: tree(tmp_path / name) for name in before} == before


def test_shards_one_after_the_other(fresh: Path) -> None:
    done("unlearn", fresh, SHARD)
    first = (fresh / "certificate.json").read_bytes()
    again = atoll("unlearn", fresh, SHARD, "--json")
    assert again.code == 2
    assert again.error["allowed"] == "shard-00, shard-02"
    done("unlearn", fresh, "shard-02")
    (fresh / "first.json").write_bytes(first)
    for name in ("first.json", "certificate.json"):
        checks = done("verify", fresh / name)["checks"]
        named = {check["what"] for check in checks}
        assert {f"nothing of {shard} is left" for shard in (SHARD, "shard-02")} <= named
    assert atoll("unlearn", fresh, "shard-00", "--json").code == 2
    assert atoll("sample", fresh, "x", "--steps=1", "--out", fresh.parent / "p").code == 0


@pytest.mark.parametrize("stage", ["partitioned", "based", "trained"])
def test_before_the_run_is_complete(stage, request, made, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(stage), run)
    done("unlearn", run, SHARD)
    done("verify", run / "certificate.json")
    manifest = json.loads((run / "manifest.json").read_text())
    assert sorted(manifest["shards"]) == OTHERS
    assert sorted(manifest["experts"]) == (OTHERS if stage == "trained" else [])
    if stage == "trained":
        done("assemble", run)
        whole = tmp_path / "whole"
        shutil.copytree(made, whole)
        done("unlearn", whole, SHARD)
        assert tree(run / "ensemble") == tree(whole / "ensemble")


def test_without_what_the_ensemble_is_made_of_nothing_is_begun(fresh: Path) -> None:
    manifest = json.loads((fresh / "manifest.json").read_text())
    (fresh / "manifest.json").write_text(json.dumps(manifest | {"trunk": None}))
    before = tree(fresh)
    assert "trunk" in str(atoll("unlearn", fresh, SHARD, "--json").error["what"])
    assert tree(fresh) == before
    (fresh / "manifest.json").write_text(json.dumps(manifest))
    # A head of another trunk, entered as if it were right.
    head = fresh / "islands/shard-02/gate_head/config.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | {"trunk_sha256": "0" * 64}))
    manifest["experts"]["shard-02"]["gate_head"]["sha256"] = sha256_folder(head.parent)
    (fresh / "manifest.json").write_text(json.dumps(manifest))
    before = tree(fresh)
    assert "continues from trunk" in str(atoll("unlearn", fresh, SHARD, "--json").error["what"])
    assert tree(fresh) == before


def test_with_only_the_removed_expert_trained(made, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    manifest = json.loads((run / "manifest.json").read_text())
    for shard in OTHERS:
        del manifest["experts"][shard]
        shutil.rmtree(run / f"islands/{shard}")
    manifest["soups"] = {}
    shutil.rmtree(run / "soups")
    (run / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    assembled = done("assemble", run, tmp_path / "copy")
    assert assembled["missing"] == OTHERS
    done("unlearn", run, SHARD)
    after = json.loads((run / "manifest.json").read_text())
    assert after["ensemble"] is None
    assert after["exports"] == []
    assert not (run / "ensemble").exists()
    assert not (tmp_path / "copy").exists()
    done("verify", run / "certificate.json")


# -- interrupted ---------------------------------------------------------------------------------

# Counts what changes the disk, and ends before the change of a given number.
CRASH = """
import os, signal, sys
here = {"count": 0, "at": None, "end": None}
def hook(event, _arguments):
    if here["at"] is not None and event in ("os.rename", "os.remove", "os.rmdir", "os.link"):
        here["count"] += 1
        if here["count"] == here["at"]:
            here["end"]()
sys.addaudithook(hook)
"""
KILLED = (
    CRASH
    + """
from atoll.cli.main import run
here["end"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
here["at"] = int(sys.argv[1])
run(["unlearn", *sys.argv[2:]])
"""
)


class Crash(BaseException):
    """Not an Exception: nothing may handle it."""


@pytest.fixture(scope="module")
def crash() -> Iterator[dict[str, object]]:
    names: dict[str, object] = {}
    exec(CRASH, names)  # noqa: S102
    here = names["here"]
    assert isinstance(here, dict)

    def end() -> None:
        raise Crash

    here["end"] = end
    yield here
    here["at"] = None


def place_of(made: Path, tmp_path: Path) -> Path:
    """A run with all kinds of soups, inside and out; exports are listed by absolute paths."""
    place = tmp_path / "place"
    run = place / "run"
    shutil.copytree(made, run)
    export(run, place)
    lone = run / f"islands/{SHARD}/expert"
    done("soup", "create", place / "lone", lone)
    done("soup", "create", run / "soups/lone", lone)
    return place


def finished(place: Path) -> dict[str, str]:
    run = place / "run"
    assert not (run / "unlearn.json").exists()
    done("verify", run / "certificate.json")
    assert not [path for path in place.rglob(".*") if path.name != ".lock"]
    return content(run) | {f"outside/{name}": sha for name, sha in exported(place).items()}


def test_interrupted_anywhere_the_same_command_finishes_it(made, tmp_path, crash) -> None:
    place = place_of(made, tmp_path)
    shutil.copytree(place, tmp_path / "start")
    crash["count"], crash["at"] = 0, 1 << 30
    done("unlearn", place / "run", SHARD)
    changes, crash["at"] = int(str(crash["count"])), None
    expected = finished(place)
    assert changes > 60
    moments = random.Random(7).sample(range(3, changes + 1), 20)
    refusals = 0
    for at in [1, 2, *moments, changes]:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "start", place)
        crash["count"], crash["at"] = 0, at
        with pytest.raises(Crash):
            atoll("unlearn", place / "run", SHARD)
        crash["at"] = None
        if refusals < 2 and (place / "run/unlearn.json").exists():
            refuses_everything_else(place / "run")
            refusals += 1
        done("unlearn", place / "run", SHARD)
        assert finished(place) == expected, at
    assert refusals == 2


def refuses_everything_else(run: Path) -> None:
    before = tree(run)
    for command in (
        ["train", run, *TRAIN], ["base", run], ["assemble", run], ["unlearn", run, "shard-02"],
        ["soup", "create", run / "soups/new", run / "islands/shard-00/expert"],
        ["sample", run, "x"], ["evaluate", run / "base", "--reference", run, "--count=20"],
        ["verify", run],
    ):  # fmt: skip
        said = atoll(*command, "--json")
        assert said.code == 7, (command, said)
        assert f"atoll unlearn {run} {SHARD}" in str(said.error), (command, said)
    assert tree(run) == before


def test_killed_the_same_command_finishes_it(made, tmp_path) -> None:
    place = place_of(made, tmp_path)
    shutil.copytree(place, tmp_path / "start")
    done("unlearn", place / "run", SHARD)
    expected = finished(place)
    moments = random.Random(11).sample(range(3, 100), 2)
    for at in moments:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "start", place)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(at), str(place / "run"), SHARD],
            capture_output=True, text=True,
        )  # fmt: skip
        assert killed.returncode == -9, killed.stderr
        done("unlearn", place / "run", SHARD)
        assert finished(place) == expected, at


def test_reports_outside_are_exports_and_go_with_the_shard(fresh: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    few = ("--count", 20, "--steps", 1, "--routing", "once")
    inside = atoll("evaluate", fresh, "--reference", fresh, *few, "--out", fresh / "mine", "--json")
    assert inside.code == 2
    assert "inside the run" in inside.error["what"]
    done("evaluate", fresh, "--reference", fresh, *few, "--out", report)
    assert json.loads((fresh / "manifest.json").read_text())["exports"][-1] == str(report)
    (report / "note.txt").write_text("mine")
    done("unlearn", fresh, SHARD)
    assert [path.name for path in report.iterdir()] == ["note.txt"]
    assert str(report) not in (fresh / "manifest.json").read_text()


def test_strays_in_a_run_fail_the_recheck_of_a_removal(fresh: Path) -> None:
    (fresh / "soups" / "kept.safetensors").write_bytes(b"who knows")
    (fresh / ".hidden").write_bytes(b"who knows")
    done("verify", fresh)
    done("unlearn", fresh, SHARD)
    said = atoll("verify", fresh, "--json")
    assert said.code == 7
    for name in ("soups/kept.safetensors", ".hidden"):
        assert name in said.error["what"]


def test_leftovers_of_killed_soups_go_with_the_shard(fresh: Path) -> None:
    for name in (f".new.{'0' * 32}", ".all.old"):
        (fresh / "soups" / name).mkdir()
        (fresh / "soups" / name / "weights").write_bytes(b"of the shard")
    done("unlearn", fresh, SHARD)
    done("verify", fresh)


def test_a_soup_outside_is_rewritten_though_the_run_has_moved(made: Path, tmp_path: Path) -> None:
    first, moved = tmp_path / "a" / "run", tmp_path / "b" / "c" / "run"
    shutil.copytree(made, first)
    soup = tmp_path / "soup"
    done("soup", "create", soup, *sorted((first / "islands").glob("*/expert")))
    moved.parent.mkdir(parents=True)
    first.rename(moved)
    done("unlearn", moved, SHARD)
    left = done("soup", "show", soup)["ingredients"]
    assert [part["shard"] for part in left] == OTHERS


def test_a_recheck_needs_not_the_version_that_wrote(made: Path, monkeypatch) -> None:
    import diffusers

    import atoll.router.component as component

    monkeypatch.setattr(diffusers, "__version__", "99.0")
    monkeypatch.setattr(component.write_ensemble_config, "__kwdefaults__", {"version": "99.0"})
    done("verify", made)
