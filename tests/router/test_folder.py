"""`assemble`: the ensemble folder's bytes, what is missing from it, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from atoll.cli.systems import load_model, sample
from atoll.core.denoiser import read_card, write_card
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import DataError, MissingError, Refused
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Manifest
from atoll.core.storage import Storage
from atoll.core.trunk import Trunk
from atoll.router.assemble import assemble
from atoll.router.chooser import sample_settings
from atoll.router.gate import Gate
from atoll.router.model import EnsembleModel
from atoll.router.routing import renormalise

SHARDS = ["shard-00", "shard-01", "shard-02"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Storage:
    shutil.copytree(trained, tmp_path / "run")
    return Storage(tmp_path / "run")


@pytest.fixture
def folder(run: Storage) -> Path:
    """An assembled ensemble."""
    assemble(run, Manifest.load(run))
    return Path(run.uri) / "ensemble"


@pytest.fixture
def handed_on(folder: Path, tmp_path: Path) -> Path:
    """A copy outside of any run, where no manifest vouches for it."""
    shutil.copytree(folder, tmp_path / "handed on")
    return tmp_path / "handed on"


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def without(manifest: Manifest, *shards: str) -> Manifest:
    """The manifest of a run in which these islands have not finished."""
    experts = {name: e for name, e in manifest.experts.items() if name not in shards}
    return manifest.model_copy(update={"experts": experts})


# -- what is written -------------------------------------------------------------------------------


def test_the_folder_is_the_islands_files(run: Storage, folder: Path) -> None:
    """ARCHITECTURE.md's layout, each part byte for byte what its island published."""
    root = Path(run.uri)
    for shard in SHARDS:
        expert, head = folder / "transformer/experts" / shard, folder / "transformer/gate" / shard
        assert digests(expert) == digests(root / "islands" / shard / "expert")
        assert digests(head) == digests(root / "islands" / shard / "gate_head")
    assert digests(folder / "text_encoder") == digests(root / "encoder")
    assert {place.name for place in folder.iterdir()} == {
        "atoll.json", "model_index.json", "scheduler", "text_encoder", "transformer",
    }  # fmt: skip
    assert json.loads((folder / "atoll.json").read_text()) == {
        "schema_version": 1, "kind": "ensemble", "shards": SHARDS, "missing": [],
    }  # fmt: skip
    config = json.loads((folder / "transformer/config.json").read_text())
    assert config["records"] == {"shard-00": 40, "shard-01": 9, "shard-02": 3}


def test_it_is_recorded(run: Storage, folder: Path) -> None:
    manifest = Manifest.load(run)
    assert manifest.ensemble is not None
    assert manifest.ensemble.sha256 == sha256_folder(folder)
    entry = Ledger(run).latest("ensemble", "ensemble")
    assert entry is not None
    assert entry.sha256 == manifest.ensemble.sha256
    assert entry.shards == SHARDS
    assert len(entry.parents) == 8, "three experts, three heads, their trunk, the encoder"


def test_assembling_again_changes_nothing(run: Storage, folder: Path) -> None:
    before = {name: run.sha256(name) for name in run.list()}
    assemble(run, Manifest.load(run))
    assert {name: run.sha256(name) for name in run.list()} == before


def test_the_bytes_follow_from_the_files_alone(
    run: Storage, folder: Path, trained: Path, tmp_path: Path
) -> None:
    """Not from where the run lies, nor from the order in which shards came."""
    other = Storage(tmp_path / "elsewhere" / "of another name")
    shutil.copytree(trained, other.uri)
    manifest = Manifest.load(other)
    backwards = {
        "shards": dict(reversed(manifest.shards.items())),
        "experts": dict(reversed(manifest.experts.items())),
    }
    assemble(other, manifest.model_copy(update=backwards))
    assert digests(Path(other.uri) / "ensemble") == digests(folder)


def test_memory_storage(trained: Path, folder: Path) -> None:
    run = Storage("memory://router-assemble/run")
    local = Storage(trained)
    for name in local.list():
        run.write_bytes(name, local.read_bytes(name))
    made = assemble(run, Manifest.load(run))
    assert made.sha256 == sha256_folder(folder)
    run.remove("")


# -- copies out of the run -------------------------------------------------------------------------


def test_a_copy_is_listed_under_exports(run: Storage, tmp_path: Path) -> None:
    out = tmp_path / "out" / "copy"
    assemble(run, Manifest.load(run), str(out))
    assert digests(out) == digests(Path(run.uri) / "ensemble")
    assert Manifest.load(run).exports == [str(out)]
    assemble(run, Manifest.load(run), f"{out}/")
    assert Manifest.load(run).exports == [str(out)], "a copy may be replaced by a newer one"


@pytest.mark.parametrize("what", ["an expert", "a file", "the run itself"])
def test_a_copy_replaces_nothing_but_an_ensemble(run: Storage, tmp_path: Path, what: str) -> None:
    """And when it is refused, the run is as it was."""
    places = {
        "an expert": Path(run.uri) / "islands/shard-00/expert",
        "a file": tmp_path / "home",
        "the run itself": Path(run.uri),
    }
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assemble(run, without(Manifest.load(run), "shard-02"))
    before = {name: run.sha256(name) for name in run.list()}
    theirs = digests(places[what])
    with pytest.raises(Refused, match="holds no ensemble"):
        assemble(run, Manifest.load(run), str(places[what]))
    assert digests(places[what]) == theirs
    assert {name: run.sha256(name) for name in run.list()} == before


# -- missing islands -------------------------------------------------------------------------------


def test_a_missing_island_is_named_and_left_out(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "atoll"):
        assemble(run, without(Manifest.load(run), "shard-01"))
    assert "shard-01" in caplog.text
    folder = Path(run.uri) / "ensemble"
    card = json.loads((folder / "atoll.json").read_text())
    assert card["shards"] == ["shard-00", "shard-02"]
    assert card["missing"] == ["shard-01"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "atoll"):
        model = EnsembleModel.from_pretrained(folder / "transformer")
    assert "2 of 3 shards" in caplog.text
    assert "shard-01" in caplog.text
    assert model.shards == ["shard-00", "shard-02"]


def test_a_missing_island_gives_the_law_of_those_that_are_there(run: Storage, folder: Path) -> None:
    """Promise 6: the posterior renormalised over the others, and nothing else."""
    whole = EnsembleModel.from_pretrained(folder / "transformer")
    encoder = load_model(str(folder)).encoder
    assemble(run, without(Manifest.load(run), "shard-01"))
    rest = EnsembleModel.from_pretrained(folder / "transformer")
    cond, null = encoder.condition(["a bright dot"] * 4), encoder.condition([""])
    x_t, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4) / 2
    with torch.no_grad():
        p = renormalise(whole.gate(x_t, t, cond)[:, [0, 2]])
        experts = [whole.velocities[k](x_t, t, cond) for k in (0, 2)]
    got = rest.trajectory(cond, null, sample_settings(4, rest.shards))(x_t, t)
    expected = sum(p[:, k, None, None, None] * v for k, v in enumerate(experts))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_removal_and_return(
    run: Storage, add_expert: Callable[[Storage, Manifest, str], None]
) -> None:
    """A shard that comes adds its own files; every other part keeps its bytes, and back again."""
    root = Path(run.uri) / "ensemble"
    partial = without(Manifest.load(run), "shard-02")
    assemble(run, partial)
    before = digests(root)
    add_expert(run, partial, "shard-02")
    assemble(run, partial)
    after = digests(root)
    added = {name for name in after if name not in before}
    assert {name.split("/")[2] for name in added} == {"shard-02"}
    changed = {name for name in before if after[name] != before[name]}
    # What lists the shards says so; no expert, gate head or encoder knows of it.
    assert changed == {"atoll.json", "transformer/config.json"}
    assemble(run, without(partial, "shard-02"))
    assert digests(root) == before


def test_one_expert_is_enough_and_none_is_not(run: Storage) -> None:
    manifest = Manifest.load(run)
    assemble(run, without(manifest, "shard-00", "shard-02"))
    assert load_model(run.uri).shards == ["shard-01"]
    with pytest.raises(DataError, match="no expert"):
        assemble(run, without(manifest, *SHARDS))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "islands/shard-00/expert/diffusion_pytorch_model.safetensors",
        "islands/shard-01/gate_head/model.safetensors",
        "encoder/config.json",
    ],
)
def test_a_changed_byte_is_refused(run: Storage, folder: Path, name: str) -> None:
    before = digests(folder)
    file = Path(run.uri) / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match="sha256"):
        assemble(run, Manifest.load(run))
    assert digests(folder) == before


def test_different_latent_spaces_are_refused(
    run: Storage, add_expert: Callable[[Storage, Manifest, str], None]
) -> None:
    place = Path(run.uri) / "islands/shard-01/expert"
    write_card(place, read_card(place).model_copy(update={"latent_space": "sd-vae"}))
    manifest = Manifest.load(run)
    add_expert(run, manifest, "shard-01")
    with pytest.raises(Refused, match="different latent spaces"):
        assemble(run, manifest)
    assert not run.exists("ensemble")


def test_different_latent_spaces_are_refused_on_loading(handed_on: Path) -> None:
    place = handed_on / "transformer/experts/shard-01"
    write_card(place, read_card(place).model_copy(update={"latent_space": "sd-vae"}))
    with pytest.raises(Refused, match="different latent spaces"):
        DiffusionPipeline.from_pretrained(handed_on)


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_a_part_that_is_gone_is_missing(handed_on: Path, part: str) -> None:
    shutil.rmtree(handed_on / "transformer" / part / "shard-01")
    for load in (DiffusionPipeline.from_pretrained, load_model):
        with pytest.raises(MissingError if part == "experts" else Refused, match="shard-01"):
            load(str(handed_on))


def test_no_ensemble_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no ensemble"):
        EnsembleModel.from_pretrained(tmp_path)


def edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {**values, **changes}


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": edited(schema_version=1),
    "no schema": lambda values: {k: v for k, v in values.items() if k != "schema_version"},
    "a list": lambda values: [values],
    "null": lambda _values: None,
    "an unknown key": edited(code="import os"),
    "no records": lambda values: {k: v for k, v in values.items() if k != "records"},
    "no shard": edited(records={}),
    "a count of 0": edited(records={"shard-00": 0}),
    "a negative count": edited(records={"shard-00": -4, "shard-01": 9}),
    "a count in words": edited(records={"shard-00": "many"}),
    "a fraction": edited(records={"shard-00": 0.5}),
    "a count beyond floats": edited(records={"shard-00": 10**400}),
    "a name that leads out": edited(records={"../../../islands/shard-00": 4}),
    "a name that is a path": edited(records={"/etc": 4}),
    "a name of dots": edited(records={"..": 4}),
    "an empty name": edited(records={"": 4}),
    "no picture": edited(picture=None),
    "an empty picture": edited(picture={"channels": 1, "height": 0, "width": 8}),
    "another picture": edited(picture={"channels": 3, "height": 8, "width": 8}),
    "a huge picture": edited(picture={"channels": 1, "height": 10**9, "width": 10**9}),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_configuration_is_refused(handed_on: Path, how: str) -> None:
    path = handed_on / "transformer/config.json"
    path.write_text(json.dumps(DAMAGED[how](json.loads(path.read_text()))))
    with pytest.raises(Refused):
        load_model(str(handed_on))
    with pytest.raises(Refused):
        DiffusionPipeline.from_pretrained(handed_on)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1,"])
def test_a_torn_configuration_is_refused(handed_on: Path, text: str) -> None:
    (handed_on / "transformer/config.json").write_text(text)
    with pytest.raises(Refused, match=r"config\.json"):
        load_model(str(handed_on))


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_torn_weights_are_a_clear_error(handed_on: Path, part: str) -> None:
    [file] = (handed_on / "transformer" / part / "shard-01").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises((MissingError, Refused), match="shard-01"):
        load_model(str(handed_on))


def test_a_head_of_another_shard_is_refused(handed_on: Path) -> None:
    gate = handed_on / "transformer/gate"
    shutil.rmtree(gate / "shard-00")
    shutil.copytree(gate / "shard-01", gate / "shard-00")
    with pytest.raises(Refused, match="shard-01"):
        load_model(str(handed_on))


def test_heads_of_another_trunk_are_refused(run: Storage, handed_on: Path) -> None:
    trunk = Trunk.load(handed_on / "transformer/trunk")
    with torch.no_grad():
        trunk.time.bias.add_(1)
    trunk.save(handed_on / "transformer/trunk")
    with pytest.raises(Refused, match="continues from trunk"):
        load_model(str(handed_on))
    manifest = Manifest.load(run)
    trunk.save(run.local("trunk"))
    with pytest.raises(Refused, match="trunk has sha256"):
        assemble(run, manifest)
    assert manifest.trunk is not None
    manifest.trunk = Artefact(path="trunk", sha256=run.sha256("trunk"))
    with pytest.raises(Refused, match="continues from trunk"):
        assemble(run, manifest)


def test_the_priors_of_the_folder_are_the_manifests_counts(run: Storage, folder: Path) -> None:
    gate = EnsembleModel.from_pretrained(folder / "transformer").gate
    assert isinstance(gate, Gate)
    assert gate.records == {n: s.records for n, s in Manifest.load(run).shards.items()}
    assert [head.config.shard for head in gate.by_shard().values()] == SHARDS


def test_a_run_is_sampled_by_its_path(run: Storage, folder: Path) -> None:
    a = sample(load_model(run.uri), ["a bright dot"], steps=2).x_data
    b = sample(load_model(str(folder)), ["a bright dot"], steps=2).x_data
    assert torch.equal(a, b)


def test_in_its_run_a_changed_ensemble_is_refused(run: Storage, folder: Path) -> None:
    """The manifest has its digest, and is asked before a weight is read."""
    config = folder / "transformer/config.json"
    config.write_text(config.read_text().replace('"shard-00": 40', '"shard-00": 41'))
    for path in (run.uri, str(folder)):
        with pytest.raises(Refused, match="sha256"):
            load_model(path)
