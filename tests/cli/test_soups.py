"""`atoll soup` on a run's experts: what it makes is remembered, and leaves with a shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from atoll.core.digest import canonical_json
from atoll.core.errors import Failed
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from tests.cli.conftest import SHARD, SHARDS, atoll, done, tree


def test_leave_one_out_is_remembered_verified_and_unlearned(fresh: Path, tmp_path: Path) -> None:
    experts = sorted((fresh / "islands").glob("*/expert"))
    inside, outside = fresh / "soups/loo", tmp_path / "loo"
    for out in (inside, outside):
        made = done("soup", "loo", out, *experts)["soups"]
        assert len(made) == len(SHARDS)
        for name, told in made.items():
            assert told["soup"] == f"{out}/without-{name}"
            assert name not in [part["name"] for part in told["ingredients"]]
            assert told == done("soup", "show", told["soup"])
            done("soup", "verify", told["soup"])
    manifest = json.loads((fresh / "manifest.json").read_text())
    assert {name for name in manifest["soups"] if "loo" in name} == {
        f"soups/loo/without-{name}" for name in made
    }
    assert {f"{outside}/without-{name}" for name in made} <= set(manifest["exports"])
    done("verify", fresh)
    said = atoll("soup", "loo", inside, *experts)
    assert [line.split(":")[0] for line in said.out.splitlines()] == [f"without {n}" for n in made]

    # Those that had the shard are without it, the one that had not is as it was.
    without = next(told for told in made.values() if SHARD not in str(told["ingredients"]))
    kept = f"soups/loo/{Path(without['soup']).name}"
    before = tree(fresh / kept)
    atoll("unlearn", fresh, SHARD)
    assert tree(fresh / kept) == before
    manifest = json.loads((fresh / "manifest.json").read_text())
    for name in manifest["soups"]:
        assert SHARD not in (fresh / name / "soup.json").read_text()
    assert SHARD not in "".join(p.read_text() for p in outside.glob("*/soup.json"))


def test_a_stranger_beside_an_experts_does_not_hide_it_from_a_removal(
    fresh: Path, tmp_path: Path
) -> None:
    """Such a soup has no card; that it is of this run's base is in its recipe."""
    ours = fresh / "islands" / SHARD / "expert"
    stranger = tmp_path / "mine"
    shutil.copytree(ours, stranger)
    (stranger / "atoll.json").unlink()
    said = atoll("soup", "create", tmp_path / "soup", ours, stranger)
    assert said.code == 7
    assert "base_sha256" in said.err
    done("soup", "create", tmp_path / "soup", ours, stranger, "--base", fresh / "base")
    left = done("unlearn", fresh, SHARD)
    assert str(tmp_path / "soup") not in str(left["beyond_reach"])
    recipe = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [part["name"] for part in recipe["ingredients"]] == ["mine"]


def test_blocks_and_negative_weights_are_options(fresh: Path, tmp_path: Path) -> None:
    first, second, *_ = sorted((fresh / "islands").glob("*/expert"))
    names = [json.loads((path / "atoll.json").read_text())["name"] for path in (first, second)]
    asked = ["soup", "create", tmp_path / "soup", f"{first}=3", f"{second}=-1"]
    told = ["--block", f"conv_in.*:{names[1]}=0", "--block", f"conv_in.*:{names[0]}=1"]
    assert "--negative" in atoll(*asked).err
    made = done(*asked, "--negative", *told)
    assert made["blocks"] == {"conv_in.*": {names[0]: 1, names[1]: 0}}
    assert [part["weight"] for part in made["ingredients"]] == [3, -1]
    assert f"in conv_in.*: 1 x {names[0]}, 0 x {names[1]}" in atoll(*asked, "--negative", *told).out
    done("soup", "verify", tmp_path / "soup")
    said = atoll(*asked, "--negative", "--name", f"x={first}")
    assert (said.code, "leave out --name" in said.err) == (2, True)
    said = atoll(*asked, "--negative", "--name", "x")
    assert (said.code, "NAME=EXPERT" in said.err) == (2, True)
    for text in ("conv_in.*", "conv_in.*:a", "conv_in.*:a=x"):
        said = atoll(*asked, "--block", text)
        assert (said.code, "TENSORS:NAME=WEIGHT" in said.err) == (2, True)
    base = done("soup", "create", tmp_path / "less", f"{first}=2", f"{fresh}/base=-1", "--negative")
    assert [part["weight"] for part in base["ingredients"]] in ([2, -1], [-1, 2])


def test_a_running_state_is_an_option_and_forgets(fresh: Path) -> None:
    experts = sorted((fresh / "islands").glob("*/expert"))
    out = fresh / "soups" / "kept"
    made = done("soup", "create", out, *experts[:1], "--state")
    assert made["state_sha256"]
    assert not made["plan"]["from_state"]
    added = done("soup", "add", out, *experts[1:])
    assert added["plan"]["read_bytes"] == 3 * made["plan"]["read_bytes"]
    assert "with its running state" in atoll("soup", "show", out).out
    assert done("soup", "show", out)["plan"] is None
    done("verify", fresh)
    left = done("soup", "remove", out, SHARD)
    assert left["plan"]["from_state"] is False  # two that stay are as much as the state
    done("soup", "add", out, fresh / "islands" / SHARD / "expert")
    done("unlearn", fresh, SHARD)
    rest = [expert for expert in experts if expert.exists()]
    never = done("soup", "create", fresh / "soups" / "never", *rest, "--state")
    found = done("soup", "show", out)
    assert (found["sha256"], found["state_sha256"]) == (never["sha256"], never["state_sha256"])
    done("verify", fresh)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_that_keep_parts_of_moves(fresh: Path, tmp_path: Path, method: str) -> None:
    experts = sorted((fresh / "islands").glob("*/expert"))
    out = fresh / "soups" / method
    asked = ["--base", fresh / "base", "--method", method, "--density", "0.5", "--scale", "1.5"]
    seed = {"seed": 3} if method == "dare" else {}
    asked += [f"--{name}={value}" for name, value in seed.items()]
    made = done("soup", "create", out, *experts, *asked)
    told = {"method": method, "density": 0.5, "scale": 1.5, **seed}
    assert {name: made[name] for name in told} == told
    assert (
        f"by {method}, with base as the base, density 0.5, scale 1.5"
        in atoll("soup", "show", out).out
    )
    assert "1 x base" not in atoll("soup", "show", out).out
    done("verify", fresh)
    done("unlearn", fresh, SHARD)  # which made nothing of its own stay
    rest = [expert for expert in experts if expert.exists()]
    assert len(rest) == len(experts) - 1
    never = done("soup", "create", fresh / "soups" / "never", *rest, *asked)
    assert done("soup", "show", out)["sha256"] == never["sha256"]
    said = atoll("soup", "create", tmp_path / "soup", *rest, "--density", "0.5")
    assert (said.code, "mean has no density" in said.err) == (2, True)
    said = atoll("soup", "create", tmp_path / "soup", *rest, "--method", "tie")
    assert (said.code, "ties" in said.err) == (2, True)


def test_experts_of_a_run_on_a_store_are_averaged_and_remembered_there(
    fresh: Path, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(fresh), "/soups/run", recursive=True)
    try:
        experts = sorted(fresh.glob("islands/*/expert"))
        uris = [f"memory://soups/run/{path.relative_to(fresh).as_posix()}" for path in experts]
        far = done("soup", "create", tmp_path / "far", *uris)
        near = done("soup", "create", tmp_path / "near", *experts)
        assert far["sha256"] == near["sha256"]
        done("soup", "verify", tmp_path / "far")
        manifest = json.loads(fs.cat_file("/soups/run/manifest.json"))
        assert str(tmp_path / "far") in manifest["exports"]
        fs.pipe_file(f"/soups/run/{experts[0].relative_to(fresh)}/atoll.json", b"{}")
        said = atoll("soup", "create", tmp_path / "new", *uris)
        assert said.code == 7
    finally:
        fs.rm("/soups", recursive=True)


def test_check_says_how_experts_go_together_and_makes_nothing(fresh: Path, tmp_path: Path) -> None:
    experts = sorted((fresh / "islands").glob("*/expert"))
    asked = ["soup", "create", tmp_path / "soup", *experts]
    before = tree(fresh)
    found = done(*asked, "--check", "--base", fresh / "base", "--barrier", fresh / "commons")
    assert {expert["shard"] for expert in found["experts"]} == set(SHARDS)
    assert all(0 < expert["move"] < 2 and expert["loss"] > 0 for expert in found["experts"])
    assert len(found["cosines"]) == len(found["barriers"]) == len(SHARDS)
    assert found["soup_loss"] > 0
    said = atoll(*asked, "--check").out.splitlines()
    assert said[0].split() == ["expert", "weight", "base", "family", "dtypes", "move", "loss"]
    assert "distances" in said[len(SHARDS) + 2]
    assert not (tmp_path / "soup").exists()
    assert tree(fresh) == before
    said = atoll(*asked, "--check", "--method", "model-stock", "--base", fresh / "base")
    assert (said.code, "leave out --method" in said.err) == (2, True)
    assert atoll(*asked, "--check", "--state").code == 2
    said = atoll(*asked, "--barrier", fresh / "commons")
    assert (said.code, "add --check" in said.err) == (2, True)


@pytest.mark.parametrize("told", ["negative", "block"])
def test_a_soup_that_is_none_without_a_shard_goes_with_it(fresh: Path, told: str) -> None:
    """It could not have been made without; and whatever it is, the shard is forgotten."""
    ours = fresh / "islands" / SHARD / "expert"
    other = next(e for e in sorted((fresh / "islands").glob("*/expert")) if e != ours)
    out = fresh / "soups" / "odd"
    if told == "negative":
        done("soup", "create", out, f"{ours}=2", f"{other}=-1", "--negative")
    else:
        name = json.loads((other / "atoll.json").read_text())["name"]
        done("soup", "create", out, ours, other, "--block", f"conv_in.*:{name}=0")
    done("unlearn", fresh, SHARD)
    assert not out.exists()
    assert "soups/odd" not in json.loads((fresh / "manifest.json").read_text())["soups"]
    done("verify", fresh)


def test_a_shard_leaves_a_soup_at_once(fresh: Path, tmp_path: Path) -> None:
    """One by one, what is left on the way need not have a mean."""
    ours = fresh / "islands" / SHARD / "expert"
    other = next(e for e in sorted((fresh / "islands").glob("*/expert")) if e != ours)
    copied = tmp_path / "copy"
    shutil.copytree(ours, copied)
    card = json.loads((copied / "atoll.json").read_text())
    (copied / "atoll.json").write_text(json.dumps(card | {"name": "another"}))
    done("soup", "create", tmp_path / "soup", f"{copied}=3", f"{ours}=-2", other, "--negative")
    done("unlearn", fresh, SHARD)
    recipe = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [part["path"] for part in recipe["ingredients"]] == [
        f"../{Path(os.path.relpath(other, tmp_path)).as_posix()}"
    ]


def test_what_lies_in_a_run_and_is_no_expert_is_refused(fresh: Path, tmp_path: Path) -> None:
    for place in (f"islands/{SHARD}/gate_head", f"islands/{SHARD}/gate_head/model.safetensors"):
        said = atoll("soup", "create", tmp_path / "soup", fresh / place)
        assert (said.code, "none of its experts" in said.err) == (7, True)
    said = atoll("soup", "create", tmp_path / "soup", f"file://{fresh}/islands/{SHARD}/expert")
    assert said.code == 0
    manifest = json.loads((fresh / "manifest.json").read_text())
    assert str(tmp_path / "soup") in manifest["exports"]


def test_a_manifest_of_something_else_is_no_run(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    stranger = tmp_path / "mine"
    shutil.copytree(fresh / "islands" / SHARD / "expert", stranger)
    (stranger / "atoll.json").unlink()
    assert atoll("soup", "create", tmp_path / "soup", stranger).code == 0
    said = atoll("soup", "create", tmp_path / "new", f"{stranger}=x")
    assert f"{stranger}=x=1" in said.err


@pytest.fixture
def on_a_store(fresh: Path) -> Iterator[str]:
    """The run where experts lie on a store, and the folder here is gone."""
    fs = fsspec.filesystem("memory")
    shutil.rmtree(fresh / "soups")
    manifest = json.loads((fresh / "manifest.json").read_text())
    (fresh / "manifest.json").write_bytes(canonical_json(manifest | {"soups": {}}))
    fs.put(str(fresh), "/soups/run", recursive=True)
    shutil.rmtree(fresh)
    yield "memory://soups/run"
    fs.rm("/soups", recursive=True)


def test_a_soup_in_a_run_on_a_store_is_recorded_verified_and_unlearned_there(
    on_a_store: str, tmp_path: Path
) -> None:
    run = Storage(on_a_store)
    experts = {name: f"{on_a_store}/islands/{name}/expert" for name in SHARDS}
    rest = [uri for name, uri in experts.items() if name != SHARD]
    out = f"{on_a_store}/soups/all"
    made = done("soup", "create", out, *experts.values(), "--state")
    done("soup", "create", f"{on_a_store}/soups/lone", experts[SHARD])
    done("soup", "create", tmp_path / "near", *experts.values())
    export = "memory://soups/given/away"
    done("soup", "create", export, *experts.values())
    assert sorted(Manifest.load(run).soups) == ["soups/all", "soups/lone"]
    assert Manifest.load(run).soups["soups/all"].sha256 == run.sha256("soups/all")
    assert sorted(Manifest.load(run).exports) == sorted([str(tmp_path / "near"), export])
    assert done("soup", "show", out)["sha256"] == made["sha256"]
    done("soup", "verify", out)
    done("verify", on_a_store)
    said = atoll("soup", "remove", out, "nobody")
    assert (said.code, SHARD in said.err) == (2, True)

    done("unlearn", on_a_store, SHARD)
    done("verify", on_a_store)
    done("verify", f"{on_a_store}/certificate.json")
    never = done("soup", "create", f"{on_a_store}/soups/never", *rest, "--state")
    assert Manifest.load(run).soups["soups/all"].sha256 == run.sha256("soups/never")
    for place in (out, tmp_path / "near", export):
        assert done("soup", "show", place)["sha256"] == never["sha256"]
        done("soup", "verify", place)
    assert not run.exists("soups/lone")
    assert sorted(Manifest.load(run).soups) == ["soups/all", "soups/never"]


def test_a_soup_that_left_a_run_here_for_a_store(fresh: Path) -> None:
    experts = [fresh / "islands" / name / "expert" for name in SHARDS]
    try:
        done("soup", "create", "memory://soups/all", *experts)
        loo = done("soup", "loo", "memory://soups/loo", *experts)
        assert sorted(loo["soups"]) == sorted(SHARDS)
        made = done("soup", "remove", "memory://soups/all", SHARD)
        assert made["sha256"] == loo["soups"][SHARD]["sha256"]
        done("soup", "add", "memory://soups/all", fresh / "islands" / SHARD / "expert")
        listed = json.loads((fresh / "manifest.json").read_text())["exports"]
        assert "memory://soups/all" in listed
        done("unlearn", fresh, SHARD)
        certificate = json.loads((fresh / "certificate.json").read_text())
        assert "memory://soups/all" in certificate["rewritten_exports"]
        assert done("soup", "show", "memory://soups/all")["sha256"] == made["sha256"]
        done("soup", "verify", "memory://soups/all")
        done("verify", fresh)
    finally:
        fsspec.filesystem("memory").rm("/soups", recursive=True)


@pytest.mark.parametrize("command", ["create", "loo"])
def test_a_soup_that_was_put_in_part_is_found_by_a_removal(
    on_a_store: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The put fails in the middle: what lies there is a shard's, and is no soup that is known."""
    experts = [f"{on_a_store}/islands/{name}/expert" for name in SHARDS]
    out = "memory://soups/given/away"
    put = Storage.put
    last = sorted(SHARDS)[-1]

    def fails(self: Storage, file: Path, name: str, **told: Any) -> None:
        if name == "config.json" and (command == "create" or last in self.uri):
            raise Failed("the store is gone")
        put(self, file, name, **told)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", fails)
        assert atoll("soup", command, out, *experts).code == 1
    listed = Manifest.load(Storage(on_a_store)).exports
    assert out in listed or {Path(place).parent.name for place in listed} == {"away"}
    done("unlearn", on_a_store, SHARD)
    for place in listed:
        done("soup", "verify", place)
        names = [part["name"] for part in done("soup", "show", place)["ingredients"]]
        assert SHARD not in names


def test_a_base_that_lies_in_a_run_is_one_of_its_own(fresh: Path, tmp_path: Path) -> None:
    experts = sorted((fresh / "islands").glob("*/expert"))
    head = next((fresh / "islands").glob("*/gate_head"))
    asked = ["--method", "ties", "--base"]
    said = atoll("soup", "create", tmp_path / "soup", *experts, *asked, head)
    assert (said.code, "none of its experts" in said.err) == (7, True)
    (fresh / "base" / "config.json").write_text("{}")
    said = atoll("soup", "create", tmp_path / "soup", *experts, *asked, fresh / "base")
    assert said.code == 7
    assert not (tmp_path / "soup").exists()
