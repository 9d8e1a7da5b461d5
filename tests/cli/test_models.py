"""`atoll sample` and `atoll evaluate`, on whatever can be sampled."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from atoll.cli.systems import load_model
from atoll.core import seeds
from atoll.core.denoiser import Card, Denoiser
from atoll.core.pack import Pack
from atoll.core.recipes import build, recipe_of
from atoll.core.schedule import NoiseSchedule
from tests.cli.conftest import SHARD, SHARDS, atoll, done, tree

ROUTINGS = ("full", "top-k:2", "mass:0.9", "threshold:0.2", "sample:2", "once", f"oracle:{SHARD}")


def pictures(said: dict[str, object]) -> list[bytes]:
    files = said["pictures"]
    assert isinstance(files, list)
    return [Path(picture["file"]).read_bytes() for picture in files]


def test_every_kind_of_model(made: Path, tmp_path: Path) -> None:
    for name in ("", "ensemble", "base", f"islands/{SHARD}/expert", "soups/all"):
        said = done(
            "sample", made / name, "a handwritten 3", "a handwritten 5", "--steps=3", "--count=2",
            "--out", tmp_path / "out",
        )  # fmt: skip
        assert [picture["prompt"][-1] for picture in said["pictures"]] == list("3355")
        for picture in said["pictures"]:
            with Image.open(picture["file"]) as image:
                assert image.size == (8, 8)
        settings = json.loads((tmp_path / "out/sample.json").read_text())
        assert settings["steps"] == 3
        assert len(settings["prompts"]) == 4


def test_without_a_prompt(made: Path, tmp_path: Path) -> None:
    said = done("sample", made, "--steps=1", "--out", tmp_path)
    assert [picture["prompt"] for picture in said["pictures"]] == [""]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_and_its_seed(made: Path, tmp_path: Path, routing: str) -> None:
    def draw(seed: int, name: str, *more: object) -> dict[str, object]:
        return done(
            "sample", made, "a handwritten 3", "--routing", routing, "--steps=4", "--count=3",
            "--seed", seed, "--out", tmp_path / name, *more,
        )  # fmt: skip

    first, again, other = draw(7, "a", "--trace"), draw(7, "b"), draw(8, "c")
    assert pictures(first) == pictures(again)
    assert pictures(first) != pictures(other)
    assert pictures(draw(7, "d", "--guidance=3")) != pictures(first)
    runs = first["experts_per_step"]
    assert isinstance(runs, float)
    assert 1 <= runs <= len(SHARDS)
    if routing in ("once", f"oracle:{SHARD}"):
        assert runs == 1
    trace = json.loads((tmp_path / "a/trace.json").read_text())
    assert trace["shards"] == list(SHARDS)
    assert len(trace["steps"]) == 4
    for step in trace["steps"]:
        for weights in (step["gate_weights"], step["weights"]):
            assert all(abs(sum(row) - 1) < 1e-4 for row in weights)
        with Image.open(tmp_path / "a" / step["x_data"]) as preview:
            assert preview.width == 3 * preview.height
    with Image.open(tmp_path / "a/trace.png") as strip:
        assert strip.width > 400
    assert not (tmp_path / "b/trace.json").exists()


def test_paged_experts_make_the_same_pictures(made: Path, tmp_path: Path) -> None:
    def draw(name: str, *more: object) -> list[bytes]:
        out = ("--out", tmp_path / name)
        return pictures(done("sample", made, "a handwritten 3", "--steps=3", *out, *more))

    assert draw("paged", "--expert-gib", 0.05) == draw("resident")
    little = atoll("sample", made, "--expert-gib", 1e-5, "--json")
    assert little.code == 3
    assert "more memory" in json.loads(little.out)["error"]["cure"]


def test_more_pictures_than_are_sampled_at_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones, whatever they are sampled beside, and one trace of all."""

    def draw(name: str) -> tuple[dict[str, object], list[bytes], dict[str, Any]]:
        said = done(
            "sample", made, "a handwritten 3", "a handwritten 5", "--count=3", "--steps=3",
            "--routing=sample:1", "--guidance=2", "--trace", "--out", tmp_path / name,
        )  # fmt: skip
        return said, pictures(said), json.loads((tmp_path / name / "trace.json").read_text())

    one, at_once, trace = draw("one")
    monkeypatch.setattr("atoll.cli.systems._AT_ONCE", 4)
    other, in_two, traces = draw("two")
    assert in_two == at_once
    for name in ("experts_per_step", "null_experts_per_step"):
        assert other[name] == pytest.approx(one[name])
    for step, joined in zip(trace["steps"], traces["steps"], strict=True):
        assert joined["experts_run"] == step["experts_run"]
        assert joined["weights"] == step["weights"]


@pytest.mark.parametrize("gib", ["nan", "inf", "0", "-1"])
def test_memory_for_experts_is_a_number_and_of_an_ensemble(made: Path, gib: str) -> None:
    said = atoll("sample", made, f"--expert-gib={gib}", "--json")
    assert said.code == 2
    assert said.error["allowed"] == "a number above 0"
    for name in ("base", f"islands/{SHARD}/expert", "soups/all"):
        said = atoll("sample", made / name, "--expert-gib=1", "--json")
        assert said.code == 2
        assert "one network" in said.error["what"]


def test_a_scheduler_that_is_not_followed_is_said_aloud(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "ensemble", tmp_path / "copy"))
    draw = ("sample", folder, "--steps=1", "--out", tmp_path / "out")
    assert "scheduler of its own" not in atoll(*draw).err
    settings = folder / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "shift": 3.0}))
    assert "scheduler of its own (FlowMatchEuler)" in atoll(*draw).err


def test_one_routing_by_two_names_is_measured_once(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    said = done(
        "evaluate", run, "--reference", run, "--routing=mass:0.9", "--routing=mass:.9",
        "--count=20", "--steps=1",
    )  # fmt: skip
    rows = said["metrics"]["rows"]
    assert [row["name"] for row in rows] == ["real records", "mass:0.9"]


def test_an_expert_is_its_oracle(made: Path, tmp_path: Path) -> None:
    """The ensemble under `oracle` and the expert on its own draw the same pictures."""
    common = ("a handwritten 3", "--steps=4", "--count=2", "--seed=3")
    one = done("sample", made / f"islands/{SHARD}/expert", *common, "--out", tmp_path / "one")
    other = done(
        "sample", made / "ensemble", *common, "--routing", f"oracle:{SHARD}",
        "--out", tmp_path / "other",
    )  # fmt: skip
    assert pictures(one) == pictures(other)


def test_models_outside_of_a_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    expert = tmp_path / "run/islands/shard-00/expert"
    done("soup", "create", tmp_path / "soup", expert)
    done("assemble", tmp_path / "run", tmp_path / "copy")
    common = ("a handwritten 3", "--steps=2", "--out", tmp_path / "out")
    by_ingredients = pictures(done("sample", tmp_path / "soup", *common))
    pictures(done("sample", tmp_path / "copy", *common))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert atoll("sample", tmp_path / "soup", *common, "--json").code == 5
    encoder = ("--encoder", tmp_path / "moved/encoder")
    assert pictures(done("sample", tmp_path / "soup", *common, *encoder)) == by_ingredients


def packs(run: Path) -> list[Pack]:
    return [Pack(run / "shards" / shard) for shard in SHARDS]


def test_evaluate(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    models = [run / "ensemble", run / "soups/all", run / "base", run / "islands/shard-00/expert"]
    common = ("--reference", run, "--count=20", "--steps=2")
    elsewhere = done("evaluate", *models, *common, "--out", tmp_path / "out")
    assert not (run / "evaluation").exists()
    said = done("evaluate", *models, *common)
    assert said["metrics"] == elsewhere["metrics"]
    assert said["report"] == f"{run}/evaluation/report.html"
    names = [row["name"] for row in said["metrics"]["rows"]]
    for name in ("full", "once", "top-k:1", "all", "base", "expert"):
        assert name in names
    for folder in (run / "evaluation", tmp_path / "out"):
        assert sorted(tree(folder)) == ["metrics.json", "report.html"]
        assert json.loads((folder / "metrics.json").read_text()) == said["metrics"]
    [(name, gate)] = said["metrics"]["gates"].items()
    assert (name, gate["shards"]) == ("ensemble", list(SHARDS))
    assert [len(head["prompted"]) for head in gate["heads"].values()] == [2, 2, 2]
    for bands in (gate["prompted"], gate["unprompted"]):
        assert [band["t"] for band in bands] == [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert gate["n"] == sum(len(pack.held_out) for pack in packs(run))
    page = (run / "evaluation/report.html").read_text()
    assert 'src="http' not in page
    assert "held-out records" in page
    only = done("evaluate", run, *common, "--routing", "mass:0.5", "--out", tmp_path / "one")
    assert "mass:0.5" in {row["name"] for row in only["metrics"]["rows"]}
    assert atoll("evaluate", run, *common, "--routing", "ful", "--json").code == 2
    # It saw the shard, so it does not outlive it.
    done("unlearn", run, SHARD)
    assert not (run / "evaluation").exists()
    assert atoll("sample", run, "--routing", "auto", "--json").code == 2


def test_ensembles_are_compared_under_their_names(made: Path, tmp_path: Path) -> None:
    """A run's own beside a copy, and auto is of its own; by one posterior none is chosen."""
    run = tmp_path / "run"
    shutil.copytree(made, run)
    done("assemble", run, tmp_path / "based", "--with-base")
    done("assemble", run)
    models = (run / "ensemble", tmp_path / "based", run / "base")
    common = ("--reference", run, "--count=20", "--steps=2", "--guidance=2", "--routing=full")
    metrics = done("evaluate", *models, *common, "--routing=once")["metrics"]
    assert {row["name"] for row in metrics["rows"] if row["kind"] != "real"} == {
        "ensemble full", "ensemble once", "based full", "based once", "base",
    }  # fmt: skip
    assert set(metrics["gates"]) == {"ensemble", "based"}
    sha256 = json.loads((run / "manifest.json").read_text())["ensemble"]["sha256"]
    assert metrics["auto"]["routing"] in ("full", "once")
    assert metrics["auto"]["ensemble_sha256"] == sha256
    for row in metrics["rows"]:
        if row["kind"] == "ensemble":
            assert row["name"] == f"{row['ensemble']} {row['routing']}"
    kids = {row["name"]: row["spaces"] for row in metrics["rows"]}
    one = done("evaluate", run, *common, "--one-posterior", "--out", tmp_path / "o")["metrics"]
    [row] = [row for row in one["rows"] if row["kind"] == "ensemble"]
    assert (row["name"], row["routing"], one["auto"]) == ("full, one posterior", "full", None)
    assert row["spaces"] != kids["ensemble full"]


def test_auto_is_what_the_evaluation_of_this_ensemble_chose(made: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(made, run)
    auto = ("--routing", "auto", "--steps=2", "--out", out)

    def refused(model: Path) -> None:
        ended = atoll("sample", model, *auto, "--json")
        assert ended.code == 2
        assert "atoll evaluate" in json.loads(ended.out)["error"]["cure"]

    refused(run)
    asked = ("--routing", "once", "--routing", "mass:0.5", "--count=20", "--steps=2")
    chosen = done("evaluate", run, "--reference", run, *asked)["metrics"]["auto"]
    assert chosen["routing"] in ("once", "mass:0.5")
    for model in (run, run / "ensemble"):
        done("sample", model, *auto)
        assert json.loads((out / "sample.json").read_text())["routing"] == chosen["routing"]
    done("sample", run / "base", *auto)
    assert json.loads((out / "sample.json").read_text())["routing"] == "full"
    shutil.copytree(run / "ensemble", tmp_path / "copy")
    refused(tmp_path / "copy")
    # Others' evaluations choose nothing here, and an edited one is none.
    elsewhere = done("evaluate", run / "base", "--reference", run, "--count=20", "--steps=2")
    assert elsewhere["metrics"]["auto"] is None
    refused(run)
    done("evaluate", run, "--reference", run, *asked)
    done("sample", run, *auto)
    metrics = run / "evaluation/metrics.json"
    metrics.write_text(metrics.read_text() + " ")
    refused(run)


def test_the_example_needs_nothing_but_diffusers(made: Path, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "sample_with_diffusers.py"
    out = tmp_path / "sample.png"
    given = [sys.executable, str(example), str(made / "ensemble"), "a handwritten 7", str(out)]
    subprocess.run(given, check=True, capture_output=True)
    assert Image.open(out).size == (256, 256)


def test_the_example_puts_an_expert_of_another_kind_in_a_shards_place(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "mix_experts.py"))["main"]
    model = load_model(str(made))
    network = build(recipe_of("dit-tiny"), model.picture, model.encoder.text_width, seed=0)
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):
            weight.add_(0.05 * seeds.normal(number, "w", first=0, count=1, shape=weight.shape)[0])
    card = Card(
        name=SHARD, kind="expert", shard=SHARD, base_sha256=None, family="dit",
        prediction="epsilon", schedule=NoiseSchedule(), latent_space="pixels", images_seen=1,
    )  # fmt: skip
    Denoiser(network, card).save(tmp_path / "expert")
    example(str(made / "ensemble"), str(tmp_path / "expert"), str(tmp_path / "mixed"))
    ours, before = tree(tmp_path / "mixed"), tree(made / "ensemble")
    changed = {name for name in ours.keys() | before.keys() if ours.get(name) != before.get(name)}
    assert {name.split("/")[:3][-1] for name in changed} == {SHARD}
    options = ("a handwritten 3", "--steps=3", "--seed=7")
    for routing in (f"oracle:{SHARD}", "full"):
        done("sample", tmp_path / "mixed", *options, "--routing", routing, "--out", tmp_path / "o")
        mixed = (tmp_path / "o/0000.png").read_bytes()
        done("sample", made, *options, "--routing", routing, "--out", tmp_path / "o")
        assert mixed != (tmp_path / "o/0000.png").read_bytes()
    Denoiser(network, card.model_copy(update={"shard": "shard-09"})).save(tmp_path / "stranger")
    with pytest.raises(SystemExit, match="shard-09"):
        example(str(made / "ensemble"), str(tmp_path / "stranger"), str(tmp_path / "none"))


def test_every_routing_of_the_example_from_one_noise(made: Path, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "compare_routings.py"
    out = tmp_path / "routings.png"
    runpy.run_path(str(example))["main"](str(made / "ensemble"), "a handwritten 7", str(out))
    assert Image.open(out).height > 7 * 100
