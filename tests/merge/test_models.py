"""What people have: pipelines, components without cards, single files; variants and shards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import AtollError, MissingError, Refused, UsageError
from atoll.merge import exact, soup
from atoll.merge.model import FILE_NAME
from atoll.merge.recipe import Block, Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS

PARTS = (f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256_file(f) for f in folder.rglob("*") if f.is_file()}


# -- pipelines -------------------------------------------------------------------------------------


def test_a_pipeline_is_averaged_part_by_part_loaded_by_diffusers_and_run(make_pipeline, tmp_path):
    paths = [make_pipeline(name) for name in "abc"]
    made = soup.create(tmp_path / "soup", dict(zip(paths, (1, 2, 3), strict=True)))
    for part in PARTS:
        mean, *values = (load_file(path / part) for path in (made.place, *paths))
        for name, value in mean.items():
            assert torch.equal(value, exact.mean([v[name] for v in values], [1, 2, 3]))
    # The tokenizer is no tokenizer.
    edit(made.place / "model_index.json", tokenizer=[None, None])
    loaded = DiTPipeline.from_pretrained(made.place)
    generator = torch.Generator().manual_seed(0)
    loaded.set_progress_bar_config(disable=True)
    images = loaded(
        [1], guidance_scale=1, generator=generator, num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (1, 4, 4, 3)
    assert torch.equal(
        loaded.vae.state_dict()["decoder.conv_out.bias"],
        load_file(made.place / PARTS[1])["decoder.conv_out.bias"],
    )


def test_a_pipelines_soup_holds_what_belongs_to_it_and_no_card(make_pipeline, tmp_path):
    made = soup.create(tmp_path / "soup", {make_pipeline(name): 1 for name in "ab"})
    assert set(files(made.place)) == {
        "model_index.json", "soup.json", "scheduler/scheduler_config.json", *PARTS,
        "transformer/config.json", "vae/config.json", "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    }  # fmt: skip
    assert made.card is None
    assert (made.recipe.base_sha256, made.recipe.shards) == (None, [])
    here, there = (p / "tokenizer/vocab.json" for p in (made.place, tmp_path / "models/a"))
    assert here.read_bytes() == there.read_bytes()
    index = json.loads((made.place / "model_index.json").read_text())
    assert index["requires"] is True
    assert index["safety_checker"] == [None, None]


def test_pipelines_are_added_removed_left_out_and_verified(make_pipeline, tmp_path):
    paths = [make_pipeline(name) for name in "abc"]
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths[:2], 1)).place
    before = files(out)
    soup.add(out, {paths[2]: 5})
    assert files(out)[PARTS[1]] != before[PARTS[1]]
    soup.remove(out, "c")
    assert files(out) == before
    assert verify(out).holds
    every = soup.leave_one_out(tmp_path / "loo", dict.fromkeys(paths, 1))
    never = soup.create(tmp_path / "loo" / "never", dict.fromkeys(paths[:2], 1))
    assert files(every["c"].place) == files(never.place)
    for part in (*PARTS, "scheduler/scheduler_config.json", "tokenizer/merges.txt"):
        kept = (out / part).read_bytes()
        (out / part).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        verdict = verify(out)
        assert [problem.split()[0] for problem in verdict.problems] == [part]
        (out / part).write_bytes(kept)
    (out / PARTS[1]).unlink()
    assert verify(out).problems == (f"{PARTS[1]} is missing",)


def test_shards_and_variants_of_weights_give_the_same_mean(make_pipeline, tmp_path):
    half = {"dtype": torch.float16}
    plain = {make_pipeline(name, **half): 1 for name in "ab"}
    expected = soup.create(tmp_path / "soup", plain).place
    for path in plain:
        shutil.rmtree(path)
        make_pipeline(path.name, **half, variant="fp16", max_shard_size="5KB")
        assert list((path / "transformer").glob("*.index.fp16.json"))
    with pytest.raises(MissingError, match="fp16"):
        soup.create(tmp_path / "new", plain)
    varied = soup.create(tmp_path / "varied", plain, Settings(variant="fp16"))
    assert varied.recipe.variant == "fp16"
    for part in PARTS:
        assert sha256_file(varied.place / part) == sha256_file(expected / part)
    # What is read again is of the variant too.
    before = files(varied.place)
    soup.add(varied.place, {make_pipeline("c", **half, variant="fp16"): 1})
    soup.remove(varied.place, "c")
    assert files(varied.place) == before
    assert verify(varied.place).holds


@pytest.mark.parametrize(
    ("variant", "kind", "words"),
    [
        ("fp61", MissingError, "are of the variant 'fp61'"),
        ("", UsageError, "is no variant"),
        ("../x", UsageError, "is no variant"),
    ],
)
def test_a_variant_that_there_is_not_is_refused(make_pipeline, tmp_path, variant, kind, words):
    for path in (make_pipeline("a"), make_pipeline("a") / "vae"):
        with pytest.raises(kind, match=words):
            soup.create(tmp_path / "soup", {path: 1}, Settings(variant=variant))


def test_files_that_are_left_out_are_named(make_pipeline, tmp_path, caplog):
    path = make_pipeline("a")
    (path / "tokenizer" / "code.py").write_text("")
    with caplog.at_level(logging.WARNING):
        soup.create(tmp_path / "soup", {path: 1})
    assert "code.py is not copied" in caplog.text


def test_a_part_that_has_no_variant_is_taken_as_it_is(make_pipeline, tmp_path):
    path = make_pipeline("a", variant="fp16")
    (path / "vae" / WEIGHTS.replace(".s", ".fp16.s")).rename(path / "vae" / WEIGHTS)
    soup.create(tmp_path / "soup", {path: 1}, Settings(variant="fp16"))
    assert (tmp_path / "soup" / "vae" / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: edit(p / "scheduler/scheduler_config.json", beta_end=0.5),
            ["scheduler/scheduler_config.json: beta_end: 0.02 and 0.5"],
        ),
        (lambda p: edit(p / "vae/config.json", act_fn="gelu"), ["vae/config.json: act_fn"]),
        (
            lambda p: (p / "tokenizer/merges.txt").write_text("b a\n"),
            ["the content of", "tokenizer/merges.txt"],
        ),
        (lambda p: (p / "tokenizer/merges.txt").unlink(), ["files", "tokenizer/merges.txt"]),
        (
            lambda p: edit(p / "model_index.json", vae=[None, None]),
            ["model_index.json: vae", "None"],
        ),
        (
            lambda p: save_file({"other": torch.zeros(1)}, p / PARTS[1]),
            ["tensor", "of vae"],
        ),
    ],
)
def test_pipelines_that_differ_are_refused_by_name(make_pipeline, tmp_path, change, words):
    a, b = make_pipeline("a"), make_pipeline("b")
    change(b)
    with pytest.raises(Refused) as caught:
        soup.create(tmp_path / "soup", {a: 1, b: 1})
    assert all(word in str(caught.value) for word in ["'a' and 'b'", *words]), caught.value
    assert not (tmp_path / "soup").exists()


def test_who_wrote_a_configuration_is_no_difference(make_pipeline, tmp_path):
    a, b = make_pipeline("a"), make_pipeline("b")
    edit(a / "vae/config.json", _diffusers_version="0.1", _name_or_path="here", dtype="float16")
    edit(b / "vae/config.json", _diffusers_version="0.2", _name_or_path="there", dtype="float32")
    out = soup.create(tmp_path / "soup", {a: 1, b: 1}).place
    config = json.loads((out / "vae/config.json").read_text())
    assert not {"_name_or_path", "dtype"} & set(config)
    assert verify(out).holds


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda p: (p / "model_index.json").write_text("{"), Refused, "not readable JSON"),
        (lambda p: (p / "model_index.json").write_text("[]"), Refused, "not an object"),
        (lambda p: edit(p / "model_index.json", _class_name="AtollPipeline"), Refused, "ensemble"),
        (
            lambda p: edit(p / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]}),
            Refused,
            "allowed: folders beside it",
        ),
        *(
            (
                lambda p, n=name: edit(p / "model_index.json", **{n: ["a", "b"]}),
                Refused,
                f"names '{name}'",
            )
            for name in ("..", "", ".", "soup.json", "atoll.json", "model_index.json", "a/b")
        ),
        (lambda p: (p / "vae/soup.json").write_text("{}"), Refused, "ingredients of a soup"),
        (lambda p: (p / "vae/config.json").unlink(), MissingError, "and no config.json"),
        (lambda p: (p / "vae/config.json").write_text("[" * 99_999), Refused, "not readable"),
        (
            lambda p: edit(p / "model_index.json", unet=["diffusers", "UNet2DModel"]),
            MissingError,
            "names unet, which is not there",
        ),
        (lambda p: (p / PARTS[1]).unlink(), MissingError, "no weights in"),
        (lambda p: (p / PARTS[1]).rename(p / "vae/a.bin"), MissingError, "only a.bin"),
        (
            lambda p: (
                [shutil.rmtree(p / name) for name in ("vae", "transformer")]
                and edit(p / "model_index.json", vae=[None, None], transformer=[None, None])
            ),
            MissingError,
            "No component",
        ),
        (lambda p: (p / "soup.json").write_text("{}"), Refused, "is a soup"),
        (lambda p: (p / "vae/atoll.json").write_text("{}"), Refused, "vae itself"),
    ],
)
def test_folders_that_are_no_pipelines_are_refused(make_pipeline, tmp_path, change, kind, words):
    path = make_pipeline("a")
    change(path)
    with pytest.raises(kind) as caught:
        soup.create(tmp_path / "soup", {path: 1})
    assert words.lower() in str(caught.value).lower()
    assert not (tmp_path / "soup").exists()


# -- components without a card ---------------------------------------------------------------------


@pytest.fixture
def make_stranger(make_expert) -> Callable[..., Path]:
    """An expert that says nothing of itself."""

    def make(name: str, **fields: Any) -> Path:
        path: Path = make_expert(name, **fields)
        (path / CARD_NAME).unlink()
        return path

    return make


def test_components_without_a_card_are_taken_and_it_is_said(make_stranger, tmp_path, caplog):
    a, b = make_stranger("a"), make_stranger("b")
    with caplog.at_level(logging.WARNING):
        made = soup.create(tmp_path / "soup", {a: 1, b: 2})
    assert "it is called b, and its base is unknown" in caplog.text
    assert [part.name for part in made.recipe.ingredients] == ["a", "b"]
    assert set(files(made.place)) == {"config.json", WEIGHTS, "soup.json"}
    UNet2DConditionModel.from_pretrained(made.place)
    caplog.clear()
    assert verify(made.place).holds
    assert CARD_NAME not in caplog.text  # it is known by now


def test_a_base_is_named_by_its_digest_and_mixes_strangers_with_experts(
    make_expert, make_stranger, tmp_path, caplog
):
    base = make_expert("base", kind="base", base_sha256=None)
    ours = make_expert("a", base_sha256=sha256_folder(base))
    stranger = make_stranger("b")
    with pytest.raises(Refused, match="base_sha256"):
        soup.create(tmp_path / "soup", {ours: 1, stranger: 1})
    with caplog.at_level(logging.WARNING):
        made = soup.create(tmp_path / "soup", {ours: 1, stranger: 1}, base=base)
    assert "its base is as you say" in caplog.text
    assert made.recipe.base_sha256 == sha256_folder(base)
    assert made.card is None
    before = files(made.place)
    soup.add(made.place, {make_stranger("c"): 1}, base=base)
    soup.remove(made.place, "c")
    assert files(made.place) == before
    with pytest.raises(Refused, match="base_sha256"):
        soup.add(made.place, {make_stranger("d"): 1})
    other = make_expert("other", base_sha256="c" * 64)
    with pytest.raises(Refused, match="trained from another base"):
        soup.create(tmp_path / "new", {other: 1}, base=base)


def test_a_base_without_a_card_is_its_weights(make_stranger, tmp_path):
    base = make_stranger("base")
    (base / "README.md").write_text("a folder from a hub has more in it")
    made = soup.create(tmp_path / "soup", {make_stranger("a"): 1}, base=base)
    assert made.recipe.base_sha256 == sha256_file(base / WEIGHTS)


def test_a_base_that_descends_from_shards_is_none(make_expert, make_stranger, tmp_path):
    expert, stranger = make_expert("a"), make_stranger("b")
    made = soup.create(tmp_path / "soup", {expert: 1})
    for base in (expert, made.place, expert / WEIGHTS):
        with pytest.raises(Refused, match=r"descends from shards|another base"):
            soup.create(tmp_path / "new", {stranger: 1}, base=base)


def test_a_soups_weights_are_known_wherever_they_lie(make_pipeline, make_expert, tmp_path):
    made = soup.create(tmp_path / "soup", {make_expert("a"): 1})
    pipe = soup.create(tmp_path / "pipe", {make_pipeline("p"): 1})
    shutil.copy(made.place / WEIGHTS, tmp_path / "copy.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (WEIGHTS, "config.json"):
        shutil.copy(made.place / name, bare)
    for place in (made.place / WEIGHTS, tmp_path / "copy.safetensors", bare, pipe.place / "vae"):
        with pytest.raises(Refused, match="is a soup"):
            soup.create(tmp_path / "new", {place: 1})


def test_a_component_of_a_pipeline_is_called_by_the_pipelines_name(make_pipeline, tmp_path):
    paths = [make_pipeline(name) / "vae" for name in "ab"]
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1))
    assert [part.name for part in made.recipe.ingredients] == ["a", "b"]
    AutoencoderKL.from_pretrained(made.place)


def test_strangers_that_moved_are_found_by_name_and_digest(make_stranger, tmp_path):
    a, b = make_stranger("a"), make_stranger("b")
    out = soup.create(tmp_path / "soup", {a: 1, b: 1}).place
    before = files(out)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(b, elsewhere / "1" / "a")  # of that name, and not it
    shutil.move(a, elsewhere / "2" / "a")
    (elsewhere / "0" / "a").mkdir(parents=True)
    (elsewhere / "0" / "a" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="--ingredients"):
        verify(out)
    assert verify(out, search=[elsewhere]).holds
    soup.add(out, {make_stranger("c"): 1}, search=[elsewhere])
    soup.remove(out, "c", search=[elsewhere])
    assert files(out) == before
    shutil.rmtree(elsewhere / "1")
    shutil.rmtree(elsewhere / "2")
    with pytest.raises(UsageError, match="--ingredients"):
        verify(out, search=[elsewhere])
    shutil.copytree(b, a)
    (a / "config.json").write_text("{")
    with pytest.raises(UsageError, match="--ingredients"):
        verify(out, search=[elsewhere])
    assert "not readable JSON" in verify(out).problems[0]


# -- single files ----------------------------------------------------------------------------------


def test_single_files_become_a_folder_with_one(tmp_path):
    parts = [{"x": torch.randn(9), "n": torch.arange(3)} for _ in range(3)]
    for name, part in zip("abc", parts, strict=True):
        save_file(part, tmp_path / f"{name}.safetensors")
    paths = {
        tmp_path / f"{name}.safetensors": weight
        for name, weight in zip("abc", (1, 2, 3), strict=True)
    }
    made = soup.create(tmp_path / "soup", paths)
    assert set(files(made.place)) == {FILE_NAME, "soup.json"}
    mean = load_file(made.place / FILE_NAME)
    assert torch.equal(mean["x"], exact.mean([part["x"] for part in parts], [1, 2, 3]))
    assert [part.name for part in made.recipe.ingredients] == ["a", "b", "c"]
    before = files(made.place)
    soup.remove(made.place, "b")
    soup.add(made.place, {tmp_path / "b.safetensors": 2})
    assert files(made.place) == before
    assert verify(made.place).holds


def test_a_file_that_is_linked_to_keeps_its_name(tmp_path):
    """As in a hub's cache, where names are links to digests."""
    save_file({"x": torch.ones(2)}, tmp_path / "0123")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.safetensors").symlink_to("../0123")
    made = soup.create(tmp_path / "soup", {tmp_path / "cache" / "a.safetensors": 1})
    assert made.recipe.ingredients[0].name == "a"
    assert verify(made.place).holds


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a.ckpt", Refused, "pickles are not read"),
        ("nothing", UsageError, "There is nothing at"),
        ("empty", MissingError, "neither model_index.json nor config.json"),
    ],
)
def test_what_is_no_model(tmp_path, name, kind, words):
    (tmp_path / "a.ckpt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AtollError, match=words) as caught:
        soup.create(tmp_path / "soup", {tmp_path / name: 1})
    assert isinstance(caught.value, kind)


def test_two_of_one_name_are_given_others(make_stranger, make_expert, tmp_path):
    paths = [make_stranger(f"run-{i}") for i in range(2)]
    for path in paths:
        (tmp_path / f"in-{path.name}").mkdir()
        path.rename(tmp_path / f"in-{path.name}" / "unet")
    a, b = (tmp_path / f"in-run-{i}" / "unet" for i in range(2))
    out = tmp_path / "soup"
    with pytest.raises(Refused, match="--name NAME=EXPERT"):
        soup.create(out, {a: 1, b: 1})
    block = Block(tensors="conv_in.*", weights={"theirs": 3})
    told = Settings(blocks=[block])
    made = soup.create(out, {a: 1, b: 1}, told, names={a: "ours", b: "theirs"})
    assert [part.name for part in made.recipe.ingredients] == ["ours", "theirs"]
    assert verify(out).holds
    before = sha256_folder(out)
    c = make_stranger("unet")
    soup.add(out, {c: 2})
    soup.add(out, {make_stranger("other"): 2}, names={})
    soup.remove(out, "other")
    soup.remove(out, "unet")
    assert sha256_folder(out) == before
    # Found again by digest where it has moved, under the name of its path or its own.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("unet", "theirs"):
        b = b.rename(elsewhere / name)
        assert verify(out, search=[elsewhere]).holds
    soup.remove(out, "theirs", search=[tmp_path])
    with pytest.raises(UsageError, match="is called e by its"):
        soup.create(tmp_path / "e", {make_expert("e"): 1}, names={tmp_path / "experts/e": "x"})
    for name in ("", "a/b", "a\n"):
        with pytest.raises(UsageError, match="is no name"):
            soup.create(tmp_path / "x", {a: 1}, names={a: name})
    with pytest.raises(UsageError, match="is no expert here"):
        soup.create(tmp_path / "x", {a: 1}, names={b: "b"})
