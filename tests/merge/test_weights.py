"""Weights of blocks, of components, and negative ones, held against exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import Refused, UsageError
from atoll.merge import soup
from atoll.merge.recipe import Block, Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS


def block(tensors: str, **weights: int) -> Block:
    return Block(tensors=tensors, weights=weights)


def expected(paths: list[Path], weights: list[int], name: str) -> Tensor:
    """By fractions, value by value; every float32 of these fits into a float64's quotient."""
    values = [load_file(path / WEIGHTS)[name].reshape(-1).tolist() for path in paths]
    means = [
        sum(Fraction(value) * weight for value, weight in zip(column, weights, strict=True))
        / sum(weights)
        for column in zip(*values, strict=True)
    ]
    return torch.tensor([float(mean) for mean in means], dtype=torch.float64).float()


def check(made: soup.Soup, paths: list[Path], of: dict[str, list[int]]) -> None:
    mean = load_file(made.place / WEIGHTS)
    for name, weights in of.items():
        assert torch.equal(mean[name].reshape(-1), expected(paths, weights, name)), name


def test_blocks_weigh_their_tensors_and_the_longest_pattern_counts(make_expert, tmp_path):
    paths = [make_expert(name) for name in "abc"]
    blocks = [
        block("up_blocks.*", a=5), block("up_blocks.0.*", b=0, c=7), block("conv_in.bias", a=0),
    ]  # fmt: skip
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), Settings(blocks=blocks))
    check(made, paths, {
        "conv_out.bias": [1, 1, 1],
        "conv_in.bias": [0, 1, 1],
        "up_blocks.1.resnets.0.conv1.bias": [5, 1, 1],
        "up_blocks.0.resnets.0.conv1.bias": [1, 0, 7],
    })  # fmt: skip
    assert verify(made.place).holds
    again = soup.create(tmp_path / "again", dict.fromkeys(paths, 1), Settings(blocks=blocks[::-1]))
    assert sha256_folder(again.place) == sha256_folder(made.place)
    plain = soup.create(tmp_path / "plain", dict.fromkeys(paths, 1))
    assert plain.recipe.name != made.recipe.name
    # What is not said is not in the file: soups of before there was anything to say still hold.
    unsaid = {"variant", "blocks", "method", "base"}
    assert not unsaid & set(json.loads((plain.place / "soup.json").read_text()))
    assert json.loads((made.place / "soup.json").read_text())["blocks"][0] == {
        "tensors": "conv_in.bias", "weights": {"a": 0},
    }  # fmt: skip


def test_blocks_come_and_go_with_their_ingredients(make_expert, tmp_path):
    a, b, c = (make_expert(name) for name in "abc")
    told = [block("up_blocks.*", a=2)]
    out = soup.create(tmp_path / "soup", {a: 1, b: 1}, Settings(blocks=told)).place
    before = sha256_folder(out)
    with pytest.raises(UsageError, match="'a', which is not added here"):
        soup.add(out, {c: 1}, blocks=[block("up_blocks.*", a=3)])
    soup.add(out, {c: 1}, blocks=[block("up_blocks.*", c=3)])
    check(soup.show(out), [a, b, c], {"up_blocks.1.resnets.0.conv1.bias": [2, 1, 3]})
    soup.remove(out, "c")
    assert sha256_folder(out) == before
    soup.remove(out, "a")
    never = soup.create(tmp_path / "never", {b: 1})
    assert sha256_folder(out) == sha256_folder(never.place)


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": 4}, {"b": -1, "a": 3}])
def test_leaving_out_with_blocks_is_creating_without(make_expert, tmp_path, weights):
    paths = {name: make_expert(name) for name in "abc"}
    told = [block("up_blocks.*", **weights)]
    every = dict.fromkeys(paths.values(), 2)
    made = soup.leave_one_out(tmp_path / "loo", every, Settings(blocks=told), negative=True)
    for left, one in made.items():
        rest = {path: 2 for name, path in paths.items() if name != left}
        kept = [block("up_blocks.*", **{n: w for n, w in weights.items() if n != left})]
        alone = soup.create(
            tmp_path / "loo" / f"created-{left}", rest, Settings(blocks=kept), negative=True
        )
        assert sha256_folder(alone.place) == sha256_folder(one.place)


def test_a_block_that_leaves_uncovers_the_one_below(make_expert, tmp_path):
    paths = [make_expert(name) for name in "abc"]
    told = [block("up_blocks.*", a=5), block("up_blocks.1.*", c=4)]
    made = soup.leave_one_out(tmp_path / "loo", dict.fromkeys(paths, 1), Settings(blocks=told))
    check(made["c"], paths[:2], {"up_blocks.1.resnets.0.conv1.bias": [5, 1]})
    check(made["a"], paths[1:], {"up_blocks.1.resnets.0.conv1.bias": [1, 4]})
    assert all(verify(one.place).holds for one in made.values())


def test_a_component_of_a_pipeline_is_a_block(make_expert, tmp_path):
    paths = []
    for name in "ab":
        whole = tmp_path / name
        for part in ("unet", "other"):
            (make_expert(name + part, folder=whole / part) / CARD_NAME).unlink()
        index = {part: ["diffusers", "UNet2DConditionModel"] for part in ("unet", "other")}
        (whole / "model_index.json").write_text(json.dumps(index))
        paths.append(whole)
    made = soup.create(
        tmp_path / "soup", dict.fromkeys(paths, 1), Settings(blocks=[block("unet.*", b=0)])
    )
    first = load_file(paths[0] / "unet" / WEIGHTS)
    assert all(
        torch.equal(value, first[name])
        for name, value in load_file(made.place / "unet" / WEIGHTS).items()
    )
    assert sha256_file(made.place / "other" / WEIGHTS) != sha256_file(paths[0] / "other" / WEIGHTS)
    assert verify(made.place).holds


def test_what_nobody_is_heard_in_need_not_agree(make_expert, tmp_path):
    """An integer tensor, and one with NaN."""
    paths = [make_expert(name) for name in "ab"]
    for path, count in zip(paths, (1, 2), strict=True):
        state = load_file(path / WEIGHTS) | {"count": torch.tensor([count])}
        state["conv_in.bias"][:] = float("nan") if count == 2 else 1.0
        save_file(state, path / WEIGHTS)
    silent = [block("count", b=0), block("conv_in.bias", b=0)]
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), Settings(blocks=silent))
    assert load_file(made.place / WEIGHTS)["count"].tolist() == [1]
    with pytest.raises(Refused, match="'b' holds NaN or infinity in tensor 'conv_in"):
        soup.create(tmp_path / "new", dict.fromkeys(paths, 1), Settings(blocks=silent[:1]))


def test_task_arithmetic_with_the_base(make_expert, tmp_path):
    base = make_expert("base", kind="base", base_sha256=None, shard=None, images_seen=9)
    digest = sha256_folder(base)
    a, b = (make_expert(name, base_sha256=digest) for name in "ab")
    weights = {a: 1, b: 1, base: -1}
    with pytest.raises(UsageError, match="--negative"):
        soup.create(tmp_path / "soup", weights)
    made = soup.create(tmp_path / "soup", weights, negative=True)
    check(made, [a, b, base], {"conv_in.bias": [1, 1, -1], "conv_out.weight": [1, 1, -1]})
    assert made.recipe.base_sha256 == digest
    assert made.card is not None
    assert made.card.images_seen == 200
    assert verify(made.place).holds
    before = sha256_folder(made.place)
    with pytest.raises(UsageError, match="add up to 0"):
        soup.remove(made.place, "a")
    assert sha256_folder(made.place) == before
    soup.remove(made.place, "base")
    assert sha256_folder(made.place) == sha256_folder(
        soup.create(tmp_path / "never", {a: 1, b: 1}).place
    )
    two = soup.create(tmp_path / "two", {a: 1, base: 1}).place
    with pytest.raises(Refused, match="last ingredient"):
        soup.remove(two, "a")
    with pytest.raises(Refused, match="is a base"):
        soup.create(tmp_path / "alone", {base: 1})


@pytest.mark.parametrize(
    ("weights", "blocks", "words"),
    [
        ([1, 1], [block("up_block.*", a=2)], ["No tensor is in", "up_blocks.*"]),
        ([1, 1], [block("up_blocks.*", aa=2)], ["'aa'", "Did you mean 'a'?"]),
        ([1, 1], [block("up_blocks.*", a=0, b=0)], ["in up_blocks.*", "add up to 0"]),
        ([1, -1], [], ["add up to 0"]),
        ([1, 1], [block("up_blocks.*", a=-1)], ["in up_blocks.*", "add up to 0"]),
        ([1, -2], [], ["add up to -1"]),
        ([1 << 28, -1], [], ["signs aside"]),
        ([1, 1], [block("up_blocks.*", a=1 << 28)], ["signs aside", "in up_blocks.*"]),
    ],
)
def test_weights_that_make_no_mean(make_expert, tmp_path, weights, blocks, words):
    paths = [make_expert(name) for name in "ab"]
    with pytest.raises(UsageError) as caught:
        soup.create(
            tmp_path / "soup",
            dict(zip(paths, weights, strict=True)),
            Settings(blocks=blocks),
            negative=True,
        )
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "soup").exists()


def test_negative_weights_of_blocks_are_to_be_meant(make_expert, tmp_path):
    paths = {make_expert("a"): 9, make_expert("b"): 1}
    with pytest.raises(UsageError, match="--negative"):
        soup.create(tmp_path / "soup", paths, Settings(blocks=[block("up_blocks.*", b=-1)]))


def test_leaving_out_what_the_rest_needs_is_refused(make_expert, tmp_path):
    paths = [make_expert(name) for name in "abc"]
    with pytest.raises(UsageError, match="add up to 0"):
        soup.leave_one_out(
            tmp_path / "loo", dict(zip(paths, (2, 1, -1), strict=True)), negative=True
        )
    assert not list((tmp_path / "loo").glob("*"))
