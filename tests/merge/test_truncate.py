"""Adapters cut off at a rank, held against the singular values of the products themselves."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.digest import canonical_json, sha256_file, sha256_folder
from atoll.core.errors import UsageError
from atoll.merge import soup, truncate
from atoll.merge.lora import FILE_NAME
from atoll.merge.recipe import RECIPE_NAME, Settings
from atoll.merge.verify import verify
from tests.merge.test_lora import LAYERS, adapter, file, product

RANKS = dict.fromkeys(LAYERS, 2)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        file(tmp_path / "in" / f"{n}.safetensors", adapter(i, RANKS)) for i, n in enumerate("abc")
    ]


def mean_of(paths: list[Path], layer: str) -> Tensor:
    return sum(product(load_file(path), layer) for path in paths) / len(paths)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_nothing_of_that_rank_is_nearer(paths, tmp_path, rank):
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), Settings(rank=rank))
    state, lost, whole = load_file(made.place / FILE_NAME), 0.0, 0.0
    for layer in LAYERS:
        mean = mean_of(paths, layer)
        values = torch.linalg.svdvals(mean)
        found = product(state, layer)
        assert len(state[f"{layer}.lora_A.weight"]) == rank
        assert float((found - mean).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-5)
        lost, whole = (
            lost + float(values[rank:].square().sum()),
            whole + float(values.square().sum()),
        )
    assert made.recipe.error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
    assert verify(made.place).holds
    assert made.recipe.rank == rank


def test_a_rank_that_cuts_nothing_off_is_the_mean(paths, tmp_path):
    plain = soup.create(tmp_path / "plain", dict.fromkeys(paths, 1))
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), Settings(rank=6))
    assert made.recipe.error == 0.0
    found, wanted = load_file(made.place / FILE_NAME), load_file(plain.place / FILE_NAME)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert verify(made.place).holds


@pytest.mark.parametrize("names", ["peft", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_leaves_was_never_there(tmp_path, names, dtype):
    paths = [
        file(tmp_path / "in" / f"{n}.safetensors", adapter(i, RANKS, names, dtype))
        for i, n in enumerate("abc")
    ]
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths[:2], 1), Settings(rank=2)).place
    before = sha256_folder(out)
    soup.add(out, {paths[2]: 1})
    again = soup.create(tmp_path / "again", dict.fromkeys(paths[::-1], 1), Settings(rank=2)).place
    assert sha256_folder(out) == sha256_folder(again)
    if names == "kohya":
        assert float(load_file(out / FILE_NAME)["unet.a.to_q.alpha"]) == 2.0
    soup.remove(out, "c")
    assert sha256_folder(out) == before
    assert verify(out).holds


def rewritten(out: Path, change) -> None:
    """The soup as another processor would have made it, or somebody who lies well."""
    state = load_file(out / FILE_NAME)
    change(state)
    told = soup.show(out).recipe
    save_file(state, out / FILE_NAME, {"format": "pt", **told.metadata})
    values = json.loads((out / RECIPE_NAME).read_text())
    values["sha256"] = sha256_file(out / FILE_NAME)
    (out / RECIPE_NAME).write_bytes(canonical_json(values))


def test_other_last_bits_are_verified_and_no_more(paths, tmp_path):
    every = dict.fromkeys(paths, 1)
    up = "unet.a.to_q.lora_B.weight"

    def last_bits(state: dict[str, Tensor]) -> None:
        state[up] = torch.nextafter(state[up], torch.tensor(9.0))

    def a_value(state: dict[str, Tensor]) -> None:
        state[up][0, 0] += 0.01

    def one_more(state: dict[str, Tensor]) -> None:
        state["unet.c.lora_A.weight"] = torch.ones(1, 1)

    for number, (change, holds) in enumerate(
        [(last_bits, True), (a_value, False), (one_more, False)]
    ):
        out = soup.create(tmp_path / str(number), every, Settings(rank=2)).place
        rewritten(out, change)
        assert verify(out).holds == holds, verify(out).problems
    # What says that more was lost, or less, is found out too, behind other last bits as well.
    for number, (change, error) in enumerate(
        itertools.product((last_bits, lambda state: None), (0.9, 1e-4))
    ):
        out = soup.create(tmp_path / f"error-{number}", every, Settings(rank=2)).place
        rewritten(out, change)
        values = json.loads((out / RECIPE_NAME).read_text())
        (out / RECIPE_NAME).write_bytes(canonical_json(values | {"error": error}))
        assert not verify(out).holds


def test_a_small_change_does_not_hide_behind_what_was_lost(tmp_path):
    """Of a mean that lost much, products a thousandth apart are nearly as far from the mean."""
    ranks = dict.fromkeys(LAYERS, 4)
    paths = [
        file(tmp_path / "in" / f"{n}.safetensors", adapter(i, ranks)) for i, n in enumerate("ab")
    ]
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), Settings(rank=1)).place
    assert soup.show(out).recipe.error > 0.3

    def turned(state: dict[str, Tensor]) -> None:
        up = state["unet.a.to_q.lora_B.weight"]
        draw = torch.randn(up.shape, generator=torch.Generator().manual_seed(0))
        draw -= up * (draw * up).sum() / up.square().sum()
        up += 3e-4 * draw * up.norm() / draw.norm()

    rewritten(out, turned)
    assert not verify(out).holds


def test_adapters_of_zeros(tmp_path):
    nothing = {name: value * 0 for name, value in adapter(0, RANKS).items()}
    path = file(tmp_path / "in" / "a.safetensors", nothing)
    made = soup.create(tmp_path / "soup", {path: 1}, Settings(rank=1))
    assert made.recipe.error == 0.0
    assert verify(made.place).holds


def test_what_has_no_rank(paths, make_expert, tmp_path):
    with pytest.raises(UsageError, match="The rank is 0"):
        soup.create(tmp_path / "soup", {paths[0]: 1}, Settings(rank=0))
    with pytest.raises(UsageError, match="A rank is for adapters"):
        soup.create(tmp_path / "soup", {make_expert("a"): 1}, Settings(rank=4))


def test_the_distance_of_products():
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw)
    other = torch.randn(3, 5, generator=draw), torch.randn(4, 3, generator=draw)
    wanted = (up.double() @ down.double() - other[1].double() @ other[0].double()).norm()
    found = truncate.distance({"x": (down, up)}, {"x": other})
    assert found == pytest.approx(float(wanted / (up.double() @ down.double()).norm()))
    with pytest.raises(KeyError):
        truncate.distance({"x": (down, up)}, {})
