"""`atoll assemble --gate joint`: one classifier of all shards, which no removal outlives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from atoll.core.ledger import Ledger
from atoll.core.storage import Storage
from atoll.router.gate import JointGate
from atoll.router.model import EnsembleModel
from tests.cli.conftest import SHARD, SHARDS, atoll, content, done, tree


@pytest.fixture(scope="module")
def joint(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run with a joint gate, and a copy of its ensemble outside."""
    run = tmp_path_factory.mktemp("joint") / "run"
    shutil.copytree(made, run)
    done("assemble", run, run.parent / "copy", "--gate", "joint")
    return run


def test_it_is_trained_on_all_shards_and_loads(joint: Path, tmp_path: Path) -> None:
    entry = Ledger(Storage(joint)).latest("joint_gate", "joint_gate")
    assert entry is not None
    assert entry.shards == list(SHARDS)
    model = EnsembleModel.from_pretrained(joint / "ensemble/transformer")
    assert isinstance(model.gate, JointGate)
    records = json.loads((joint / "manifest.json").read_text())["shards"]
    assert model.gate.records == {shard: records[shard]["records"] for shard in SHARDS}
    model.save_pretrained(tmp_path / "saved")
    assert tree(tmp_path / "saved/joint") == tree(joint / "ensemble/transformer/joint")
    assert not (joint / "ensemble/transformer/gate").exists()
    done("sample", joint, "a handwritten 3", "--steps=2", "--out", tmp_path / "out")
    assert done("verify", joint)["holds"]


def test_it_is_trained_once_and_left_by_a_bare_assemble(joint: Path, made: Path) -> None:
    before = tree(joint / "ensemble"), tree(joint / "joint-gate")
    done("assemble", joint)
    assert tree(joint / "ensemble") == tree(made / "ensemble")
    done("assemble", joint, "--gate", "joint")
    assert (tree(joint / "ensemble"), tree(joint / "joint-gate")) == before


def test_a_removal_deletes_it_and_goes_back_to_heads(
    joint: Path, fresh: Path, tmp_path: Path
) -> None:
    shutil.copytree(joint.parent, tmp_path / "joint")
    run, copy = tmp_path / "joint/run", tmp_path / "joint/copy"
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"exports": [str(copy)]}))
    done("unlearn", run, SHARD)
    done("unlearn", fresh, SHARD)
    ours, theirs = content(run), content(fresh)
    ours.pop("manifest.json"), theirs.pop("manifest.json")  # one has an export
    assert ours == theirs
    assert tree(copy) == tree(run / "ensemble")
    certificate = json.loads((run / "certificate.json").read_text())
    assert "joint-gate" in certificate["before"]
    assert done("verify", run / "certificate.json")["holds"]


def test_shards_that_are_not_here_are_refused(fresh: Path) -> None:
    shutil.rmtree(fresh / "shards" / SHARD)
    said = atoll("assemble", fresh, "--gate", "joint", "--json")
    assert said.code == 7
    assert SHARD in str(said.error["what"])
    assert "own heads" in str(said.error["cure"])
    assert atoll("assemble", fresh, "--gate", "together", "--json").code == 2
