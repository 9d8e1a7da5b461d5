"""`atoll assemble --with-base`: the base as one expert more, and all that is left at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from atoll.cli.systems import load_model, sample
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.router.model import EnsembleModel
from tests.cli.conftest import SHARD, SHARDS, atoll, done, tree

PROMPTS = ["a handwritten 3", ""]


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run assembled with its base, and a copy of the ensemble outside."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(made, run)
    done("assemble", run, run.parent / "copy", "--with-base")
    return run


def copied(whole: Path, tmp_path: Path, *exports: Path) -> Path:
    """A copy of the run, and of nothing else that its manifest lists."""
    shutil.copytree(whole, tmp_path / "run")
    manifest = json.loads((whole / "manifest.json").read_text())
    told = manifest | {"exports": [str(export) for export in exports]}
    (tmp_path / "run/manifest.json").write_text(json.dumps(told))
    return tmp_path / "run"


def test_the_base_stands_among_the_experts_under_the_commons_count(whole: Path) -> None:
    manifest = Manifest.load(Storage(whole))
    model = EnsembleModel.from_pretrained(whole / "ensemble/transformer")
    assert model.shards == ["base", *SHARDS]
    assert model.ensemble_config.records["base"] == manifest.commons.records
    folder = whole / "ensemble/transformer"
    assert tree(folder / "experts/base") == tree(whole / "base")
    assert not (folder / "gate/base").exists()
    entry = Ledger(Storage(whole)).latest("ensemble", "ensemble")
    base = Ledger(Storage(whole)).latest("base", "base")
    assert entry is not None
    assert base is not None
    assert base.id in entry.parents
    assert done("verify", whole)["holds"]


def test_its_f_is_0_and_the_others_odds_are_as_without_it(whole: Path, made: Path) -> None:
    ours, shards = load_model(str(whole)), load_model(str(made))
    cond = ours.encoder.condition(PROMPTS)
    x_t = torch.randn(2, *ours.picture.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.6, 1.0):
        p, q = (each.gate(x_t, torch.full((2,), t), cond) for each in (ours, shards))
        torch.testing.assert_close(p[:, 1:] / p[:, 1:].sum(dim=1, keepdim=True), q)
    # At t = 1 nothing is told without a caption: record counts alone.
    records = EnsembleModel.from_pretrained(whole / "ensemble/transformer").ensemble_config.records
    counts = torch.tensor([float(count) for count in records.values()])
    torch.testing.assert_close(p[1], counts / counts.sum())


def test_its_oracle_is_the_base(whole: Path) -> None:
    settings = {"steps": 3, "seed": 5}
    ours = sample(load_model(str(whole)), PROMPTS, routing="oracle:base", **settings)
    alone = sample(load_model(str(whole / "base")), PROMPTS, **settings)
    assert torch.equal(ours.x_data, alone.x_data)


def test_it_is_saved_and_loaded_and_evaluated_as_any(whole: Path, tmp_path: Path) -> None:
    EnsembleModel.from_pretrained(whole / "ensemble/transformer").save_pretrained(tmp_path / "own")
    saved, assembled = tree(tmp_path / "own"), tree(whole / "ensemble/transformer")
    assert saved == assembled
    place = tmp_path / "evaluation"
    options = ("--reference", whole, "--count=20", "--steps=2", "--out", place)
    metrics = done("evaluate", whole / "ensemble", "--routing=once", *options)["metrics"]
    gate = metrics["gates"]["ensemble"]
    assert gate["shards"] == ["base", *SHARDS]
    assert set(gate["heads"]) == set(SHARDS)
    held_out = [Manifest.load(Storage(whole)).commons.held_out]
    held_out += [shard.held_out for shard in Manifest.load(Storage(whole)).shards.values()]
    assert gate["n"] == sum(held_out)


def test_a_removal_keeps_it_and_with_the_last_expert_it_is_what_is_left(
    whole: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole.parent / "copy", copy)
    run = copied(whole, tmp_path, copy)
    stays = ["base", *(shard for shard in SHARDS if shard != SHARD)]
    done("unlearn", run, SHARD)
    assert load_model(str(run)).shards == stays
    assert tree(copy) == tree(run / "ensemble")
    assert done("verify", run / "certificate.json")["holds"]
    # A run of which all other islands have not come yet.
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"experts": {}, "soups": {}}))
    shutil.rmtree(run / "soups")
    left = done("assemble", run, copy, "--with-base")
    assert left["missing"] == stays[1:]
    model = load_model(str(run))
    assert model.shards == ["base"]
    pictures = sample(model, PROMPTS, steps=2).x_data
    assert torch.equal(pictures, sample(load_model(str(run / "base")), PROMPTS, steps=2).x_data)
    assert done("verify", run)["holds"]
    done("unlearn", run, stays[-1])
    assert load_model(str(run)).shards == load_model(str(copy)).shards == ["base"]
    assert done("verify", run / "certificate.json")["holds"]


def test_copies_with_the_base_and_without_stay_what_they_are(whole: Path, tmp_path: Path) -> None:
    run, plain, based = copied(whole, tmp_path), tmp_path / "plain", tmp_path / "based"
    done("assemble", run, based, "--with-base")
    done("assemble", run, plain)
    assert load_model(str(run)).shards == list(SHARDS), "a bare one drops the base"
    done("unlearn", run, SHARD)
    stays = [shard for shard in SHARDS if shard != SHARD]
    assert load_model(str(plain)).shards == load_model(str(run)).shards == stays
    assert tree(plain) == tree(run / "ensemble")
    assert load_model(str(based)).shards == ["base", *stays]
    assert done("verify", run / "certificate.json")["holds"]


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_base_that_is_not_what_it_was_stops_all_before_it_begins(
    whole: Path, tmp_path: Path, how: str
) -> None:
    run = copied(whole, tmp_path)
    weights = run / "base/diffusion_pytorch_model.safetensors"
    if how == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = tree(run)
    for command in (("assemble", run, "--with-base"), ("unlearn", run, SHARD)):
        assert "base" in str(atoll(*command, "--json").error["what"])
        assert tree(run) == before
    done("assemble", run)  # which it is no part of
    done("unlearn", run, SHARD)


def test_what_it_cannot_stand_beside_is_refused(fresh: Path) -> None:
    before = tree(fresh)
    said = atoll("assemble", fresh, "--with-base", "--gate=joint", "--json")
    assert said.code == 2
    assert "no word for the base" in str(said.error["what"])
    assert tree(fresh) == before, "and no joint gate was trained first"
    manifest = (fresh / "manifest.json").read_text()
    (fresh / "manifest.json").write_text(manifest.replace(f'"{SHARD}"', '"base"'))
    said = atoll("assemble", fresh, "--with-base", "--json")
    assert said.code == 2
    assert "is called 'base'" in str(said.error["what"])
    without = {key: value for key, value in json.loads(manifest).items() if key != "base"}
    (fresh / "manifest.json").write_text(json.dumps(without | {"base": None}))
    said = atoll("assemble", fresh, "--with-base", "--json")
    assert "atoll base" in str(said.error["cure"])


def test_another_expert_in_its_place_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "ensemble", tmp_path / "ensemble")
    experts = tmp_path / "ensemble/transformer/experts"
    shutil.rmtree(experts / "base")
    shutil.copytree(experts / SHARD, experts / "base")
    said = atoll("sample", tmp_path / "ensemble", "--json")
    assert f"In the place of base is the expert of {SHARD}" in str(said.error["what"])
    shutil.rmtree(experts / SHARD)
    shutil.copytree(whole / "base", experts / SHARD)
    shutil.rmtree(experts / "base")
    shutil.copytree(whole / "base", experts / "base")
    said = atoll("sample", tmp_path / "ensemble", "--json")
    assert f"In the place of {SHARD} is the base" in str(said.error["what"])
