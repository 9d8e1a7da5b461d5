"""Soups as folders: ordinary experts, and the same bytes whatever the order and history."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from atoll.core.denoiser import Denoiser, read_card
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.schedule import NoiseSchedule
from atoll.merge import exact, soup, stream
from atoll.merge.ledger_entry import ledger_entry
from atoll.merge.recipe import Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS

DTYPES = [torch.float32, torch.bfloat16]


def files(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256_file(f) for f in folder.rglob("*") if f.is_file()}


def test_a_soup_is_an_ordinary_expert_on_disk(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b", images_seen=50)
    made = soup.create(tmp_path / "soup", {a: 1, b: 2})
    assert set(files(made.place)) == {"config.json", WEIGHTS, "atoll.json", "soup.json"}
    card = read_card(made.place)
    assert card == made.card
    assert (card.kind, card.shard, card.base_sha256) == ("soup", None, "b" * 64)
    assert card.images_seen == 150
    with safe_open(made.place / WEIGHTS, framework="pt") as opened:
        told = json.loads(opened.metadata()["atoll.soup"])
    assert told["ingredients"] == {"a": 1, "b": 2}
    assert told["base_sha256"] == "b" * 64
    ours = Denoiser.load(made.place).network.state_dict()
    theirs = UNet2DConditionModel.from_pretrained(made.place).state_dict()
    parts = [load_file(path / WEIGHTS) for path in (a, b)]
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])
        assert torch.equal(value, exact.mean([part[name] for part in parts], [1, 2]))
    one = parts[0]["conv_in.bias"][0], parts[1]["conv_in.bias"][0]
    mean = (Fraction(float(one[0])) + 2 * Fraction(float(one[1]))) / 3
    assert float(ours["conv_in.bias"][0]) == torch.tensor(float(mean)).item()


def test_a_soup_works_on_the_schedule_of_its_ingredients(make_expert, tmp_path):
    card = {"prediction": "epsilon", "schedule": NoiseSchedule(beta_end=0.012)}
    made = soup.create(tmp_path / "soup", {make_expert(name, **card): 1 for name in "ab"})
    assert (made.card.prediction, made.card.schedule) == ("epsilon", card["schedule"])
    assert verify(made.place).holds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_order_and_history_do_not_show_in_any_file(make_expert, tmp_path, dtype, size):
    weights = {make_expert(f"e{i}", dtype=dtype): 1 + i % 3 for i in range(size)}
    expected = files(soup.create(tmp_path / "soup", weights).place)
    shuffler = random.Random(size)
    for attempt in range(3):
        order = list(weights)
        shuffler.shuffle(order)
        out = tmp_path / f"other-{attempt}"  # beside the first: the same relative paths
        if attempt == 0:
            soup.create(out, {path: weights[path] for path in order})
        else:
            soup.create(out, {order[0]: weights[order[0]]})
            for path in order[1:]:
                soup.add(out, {path: weights[path]})
        assert files(out) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_remove_undoes_add_bitwise(make_expert, tmp_path, dtype):
    experts = [make_expert(name, dtype=dtype) for name in "abcd"]
    out = tmp_path / "soup"
    soup.create(out, dict.fromkeys(experts[:3], 1))
    before = files(out)
    soup.add(out, {experts[3]: 5})
    assert files(out)[WEIGHTS] != before[WEIGHTS]
    soup.remove(out, "d")
    assert files(out) == before
    soup.remove(out, "a")
    soup.create(tmp_path / "never", dict.fromkeys(experts[1:3], 1))
    assert sha256_folder(out) == sha256_folder(tmp_path / "never")
    soup.remove(out, "shard-b")  # a shard's only expert may be named by the shard
    assert [i.name for i in soup.show(out).recipe.ingredients] == ["c"]


def test_what_leaves_may_be_gone_already(make_expert, tmp_path):
    a, b, c = (make_expert(name) for name in "abc")
    soup.create(tmp_path / "soup", {a: 1, b: 1, c: 1})
    shutil.rmtree(b)
    soup.remove(tmp_path / "soup", "b")
    soup.create(tmp_path / "other", {a: 1, c: 1})
    assert files(tmp_path / "soup") == files(tmp_path / "other")
    assert b"shard-b" not in (tmp_path / "soup" / "soup.json").read_bytes()


def test_a_mean_of_one_is_itself_but_for_negative_zero(make_expert, tmp_path):
    a = make_expert("a", change=lambda state: state["conv_in.bias"].fill_(-0.0))
    out = soup.create(tmp_path / "soup", {a: 3}).place
    mean, itself = load_file(out / WEIGHTS), load_file(a / WEIGHTS)
    assert not torch.signbit(mean["conv_in.bias"]).any()
    assert all(torch.equal(mean[name], itself[name]) for name in itself)


def test_experts_of_several_dtypes_meet_in_the_widest_or_in_the_chosen_one(make_expert, tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    experts = [make_expert(name, dtype=dtype) for name, dtype in zip("abc", dtypes, strict=True)]
    parts = [load_file(path / WEIGHTS) for path in experts]
    for chosen, several, dtype in (
        ("same", 3, None),
        ("same", 2, None),
        ("bfloat16", 3, dtypes[1]),
    ):
        folder = tmp_path / f"{chosen}-{several}"
        soup.create(folder, dict.fromkeys(experts[:several], 1), Settings(dtype=chosen))
        assert verify(folder).holds
        for name, value in load_file(folder / WEIGHTS).items():
            values = [part[name] for part in parts[:several]]
            assert value.dtype == (dtype or torch.float32)
            assert torch.equal(value, exact.mean(values, [1] * several, dtype=dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_rounded_once_and_survives_changes(make_expert, tmp_path, dtype):
    experts = [make_expert(name) for name in "abc"]
    out = soup.create(tmp_path / "soup", dict.fromkeys(experts, 1), Settings(dtype=dtype)).place
    parts = [load_file(path / WEIGHTS) for path in experts]
    for name, value in load_file(out / WEIGHTS).items():
        expected = exact.mean([p[name] for p in parts], [1, 1, 1], dtype=getattr(torch, dtype))
        assert torch.equal(value, expected)
    before = files(out)
    soup.add(out, {make_expert("d"): 1})
    soup.remove(out, "d")
    assert files(out) == before


def test_integer_tensors_that_agree_are_copied_and_pieces_do_not_show(
    make_expert, tmp_path, monkeypatch
):
    def with_buffers(path, step):
        state = load_file(path / WEIGHTS)
        state["counts"], state["flags"] = torch.arange(99_999), torch.ones(3, dtype=torch.bool)
        state["empty"], state["scalar"] = torch.zeros(0, 3), torch.tensor(float(step))
        state["half"] = torch.full((5,), step, dtype=torch.float16)
        save_file(state, path / WEIGHTS)
        return path

    experts = [with_buffers(make_expert(name), step) for step, name in enumerate("abc")]
    out = soup.create(tmp_path / "soup", dict.fromkeys(experts, 1)).place
    state = load_file(out / WEIGHTS)
    assert torch.equal(state["counts"], torch.arange(99_999))
    assert state["flags"].dtype == torch.bool
    assert state["empty"].shape == (0, 3)
    assert float(state["scalar"]) == 1.0
    assert torch.equal(state["half"], torch.ones(5, dtype=torch.float16))
    monkeypatch.setattr(stream, "_PIECE_BYTES", 800)
    monkeypatch.setattr(exact, "CHUNK", 17)
    assert files(soup.create(tmp_path / "pieces", dict.fromkeys(experts, 1)).place) == files(out)


@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_every_soup_without_one_is_the_soup_of_the_others(make_expert, tmp_path, dtype):
    experts = {make_expert(f"e{i}"): 1 + i for i in range(4)}
    made = soup.leave_one_out(tmp_path / "loo", experts, Settings(dtype=dtype))
    assert list(made) == ["e0", "e1", "e2", "e3"]
    for left_out in list(experts):
        folder = tmp_path / "loo" / f"without-{left_out.name}"
        assert verify(folder).holds
        others = {path: weight for path, weight in experts.items() if path != left_out}
        before = files(folder)
        assert soup.show(folder) == made[left_out.name]
        # The same command takes it for what it makes, and changes nothing.
        assert files(soup.create(folder, others, Settings(dtype=dtype)).place) == before
    before = files(tmp_path / "loo")
    soup.leave_one_out(tmp_path / "loo", dict(reversed(experts.items())), Settings(dtype=dtype))
    assert files(tmp_path / "loo") == before
    assert sorted(os.listdir(tmp_path / "loo")) == [f"without-e{i}" for i in range(4)]


def test_verify_recomputes(make_expert, tmp_path):
    experts = [make_expert(name) for name in "abc"]
    out = soup.create(tmp_path / "soup", dict.fromkeys(experts, 1)).place
    verdict = verify(out)
    assert verdict.holds
    assert verdict.ingredients == ("a", "b", "c")
    assert verdict.expected_sha256 == verdict.found_sha256 == sha256_file(out / WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "atoll.json"])
def test_verify_names_the_file_that_was_changed(make_expert, tmp_path, name):
    out = soup.create(tmp_path / "soup", {make_expert("a"): 1, make_expert("b"): 1}).place
    data = bytearray((out / name).read_bytes())
    data[-3] ^= 1
    (out / name).write_bytes(data)
    verdict = verify(out)
    assert not verdict.holds
    assert len(verdict.problems) == 1
    assert name in verdict.problems[0]
    (out / name).unlink()
    assert f"{name} is missing" in verify(out).problems


def test_verify_finds_a_recipe_that_lies(make_expert, tmp_path):
    out = soup.create(tmp_path / "soup", {make_expert("a"): 1, make_expert("b"): 1}).place
    truth = json.loads((out / "soup.json").read_text())
    for key, value in (("sha256", "0" * 64), ("base_sha256", "c" * 64), ("dtype", "bfloat16")):
        (out / "soup.json").write_text(json.dumps(truth | {key: value}))
        assert not verify(out).holds, key
    heavier = [entry | {"weight": 1 + i} for i, entry in enumerate(truth["ingredients"])]
    hidden = [entry | {"shard": None} for entry in truth["ingredients"]]
    for ingredients in (heavier, hidden):
        (out / "soup.json").write_text(json.dumps(truth | {"ingredients": ingredients}))
        assert not verify(out).holds


def test_verify_finds_an_ingredient_that_was_changed(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    out = soup.create(tmp_path / "soup", {a: 1, b: 1}).place
    data = bytearray((b / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (b / WEIGHTS).write_bytes(data)
    verdict = verify(out)
    assert not verdict.holds
    assert "'b'" in verdict.problems[0]


def test_a_run_that_moved_still_verifies_and_changes(make_expert, tmp_path):
    a, b = (make_expert(n, folder=tmp_path / f"run/islands/{n}/expert") for n in "ab")
    soup.create(tmp_path / "run/soups/all", {a: 1, b: 1})
    before = files(tmp_path / "run/soups/all")
    (tmp_path / "run").rename(tmp_path / "moved")
    out = tmp_path / "moved/soups/all"
    assert verify(out).holds
    soup.add(out, {make_expert("c", folder=tmp_path / "moved/islands/c/expert"): 1})
    soup.remove(out, "c")
    assert files(out) == before


def test_a_soup_that_moved_alone_is_told_where_its_ingredients_are(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    soup.create(tmp_path / "soup", {a: 1, b: 1})
    before = files(tmp_path / "soup")
    elsewhere = tmp_path / "far" / "away" / "soup"
    elsewhere.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "soup", elsewhere)
    search = [tmp_path / "experts"]
    assert verify(elsewhere, search=search).holds
    soup.add(elsewhere, {make_expert("c"): 2}, search=search)
    soup.remove(elsewhere, "c", search=search)
    assert files(elsewhere) == before  # its travels do not show either


def test_an_expert_of_the_same_name_elsewhere_is_passed_over(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    out = soup.create(tmp_path / "soup", {a: 1, b: 1}).place
    a.rename(tmp_path / "kept")
    make_expert("a", change=lambda state: state["conv_in.bias"].add_(1))
    assert not verify(out).holds
    assert verify(out, search=[tmp_path]).holds


def test_paths_through_links_are_those_of_the_files(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "er")
    soup.create(link / "soup", {a: 1, b: 1})
    assert verify(tmp_path / "deep" / "er" / "soup").holds
    assert verify(link / "soup").holds


def test_relative_paths_work(make_expert, tmp_path, monkeypatch):
    a, b = make_expert("a"), make_expert("b")
    soup.create(tmp_path / "soup", {a: 1, b: 1})
    monkeypatch.chdir(tmp_path)
    soup.create(Path("again"), {Path("experts/a"): 1, Path("experts/b"): 1})
    assert files(tmp_path / "again") == files(tmp_path / "soup")


def test_sharded_experts_give_the_same_mean(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    expected = soup.create(tmp_path / "soup", {a: 1, b: 1}).place
    network = UNet2DConditionModel.from_pretrained(b)
    (b / WEIGHTS).unlink()
    network.save_pretrained(b, max_shard_size="3KB")
    assert len(list(b.glob("*.safetensors"))) > 1
    sharded = soup.create(tmp_path / "sharded", {a: 1, b: 1}).place
    assert files(sharded)[WEIGHTS] == files(expected)[WEIGHTS]
    assert verify(sharded).holds


def test_the_same_command_again_makes_the_same_soup(make_expert, tmp_path):
    experts = {make_expert("a"): 1, make_expert("b"): 1}
    before = files(soup.create(tmp_path / "soup", experts).place)
    (tmp_path / "soup" / WEIGHTS).write_bytes(b"damaged")
    assert files(soup.create(tmp_path / "soup", experts).place) == before
    (tmp_path / "empty").mkdir()
    assert files(soup.create(tmp_path / "empty", experts).place) == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "experts", "soup"]


def test_names_tell_what_is_in_a_soup(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    contents = [{a: 1}, {b: 1}, {a: 1, b: 1}, {a: 2, b: 1}, {a: 1, b: 2}]
    names = [soup.create(tmp_path / f"s{i}", c).card.name for i, c in enumerate(contents)]
    assert len(set(names)) == len(names)
    assert soup.create(tmp_path / "other", contents[2]).card.name == names[2]


def test_the_ledger_entry_names_shards_and_parents(make_expert, tmp_path):
    experts = {make_expert("a"): 1, make_expert("b"): 2, make_expert("c", shard=None): 1}
    out = soup.create(tmp_path / "soup", experts).place
    entry = ledger_entry(soup.show(out), "soups/all")
    assert (entry.kind, entry.name, entry.sha256) == ("soup", "soups/all", sha256_folder(out))
    assert entry.parents == ("a", "b", "c")
    assert entry.shards == ("shard-a", "shard-b")
    assert entry.note["weights"] == {"a": 1, "b": 2, "c": 1}


def test_every_subset_by_every_road(make_expert, tmp_path):
    """All roads between the subsets of three experts end in the same bytes."""
    experts = {name: make_expert(name) for name in "abc"}
    seen: dict[str, dict[str, str]] = {}
    out = tmp_path / "soup"
    soup.create(out, {experts["a"]: 1})
    for step in itertools.chain("bcabacbbcacabc"):
        members = [i.name for i in soup.show(out).recipe.ingredients]
        if step in members:
            if len(members) > 1:
                soup.remove(out, step)
        else:
            soup.add(out, {experts[step]: 1})
        key = "".join(i.name for i in soup.show(out).recipe.ingredients)
        assert seen.setdefault(key, files(out)) == files(out)
    assert len(seen) >= 5
