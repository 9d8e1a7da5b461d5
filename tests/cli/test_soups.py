"""`atoll soup` on a run's experts: what it makes is remembered, and leaves with a shard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
