"""TIES and DARE against their papers' formulas in fractions, and as removable as a mean."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import canonical_json, sha256_folder
from atoll.core.errors import Refused, UsageError
from atoll.merge import exact, moves, soup, stream
from atoll.merge.model import Model
from atoll.merge.recipe import RECIPE_NAME, Block, Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS
from benchmarks.rounding import rounded

TIES, DARE = Settings(method="ties"), Settings(method="dare")
NAMES = "abc"


def of_conv_in(**weights: int) -> Block:
    return Block(tensors="conv_in.*", weights=weights)


@pytest.fixture
def base(make_expert) -> Path:
    return make_expert("base", kind="base", base_sha256=None, shard=None)


@pytest.fixture
def paths(make_expert, base) -> list[Path]:
    return [make_expert(name, base_sha256=sha256_folder(base)) for name in NAMES]


def states(paths: list[Path]) -> list[dict[str, Tensor]]:
    return [load_file(path / WEIGHTS) for path in paths]


def single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def limit_of(start: dict[str, Tensor], end: dict[str, Tensor], density: Fraction) -> float:
    """The magnitude of the last of a network's moves that is kept."""
    sizes = sorted(
        (
            abs(single(e - s))
            for name in start
            for e, s in zip(end[name].double().flatten().tolist(),
                            start[name].double().flatten().tolist(), strict=True)
        ),
        reverse=True,
    )  # fmt: skip
    return sizes[math.ceil(density * len(sizes)) - 1]


def ties(base: float, ends: list[float], weights: list[int], limits: list[float], scale: Fraction):
    """One element, as the paper says it."""
    kept = [
        (weight, Fraction(end) - Fraction(base))
        for end, weight, limit in zip(ends, weights, limits, strict=True)
        if abs(single(end - base)) >= limit
    ]
    elected = sum(weight * move for weight, move in kept)
    agreed = [(weight, move) for weight, move in kept if move * elected > 0]
    if not agreed:
        return Fraction(base)
    mean = sum(w * m for w, m in agreed) / sum(w for w, _ in agreed)
    return Fraction(base) + scale * mean


@pytest.mark.parametrize("dtype", exact.DTYPES)
@pytest.mark.parametrize(("density", "scale"), [(None, None), (0.5, 1.3), (1.0, 0.4)])
def test_ties_is_what_the_paper_says(make_expert, tmp_path, dtype, density, scale):
    base = make_expert("base", kind="base", base_sha256=None, shard=None, dtype=dtype)
    told = {"base_sha256": sha256_folder(base), "dtype": dtype}
    experts = {
        make_expert(name, **told): weight for name, weight in zip(NAMES, (1, 2, 1), strict=True)
    }
    asked = Settings(method="ties", density=density, scale=scale)
    made = soup.create(tmp_path / "soup", experts, asked, base=base)
    start, *ends = states([base, *experts])
    part, factor = Fraction(str(density or 0.2)), Fraction(str(scale or 1.0))
    limits = [limit_of(start, end, part) for end in ends]
    moved = 0
    for name, value in load_file(made.place / WEIGHTS).items():
        columns = zip(*(end[name].double().flatten().tolist() for end in ends), strict=True)
        origin = start[name].double().flatten().tolist()
        wanted = [
            rounded(ties(b, list(column), [1, 2, 1], limits, factor), dtype) + 0.0
            for b, column in zip(origin, columns, strict=True)
        ]
        assert value.double().flatten().tolist() == wanted
        moved += sum(w != b for w, b in zip(wanted, origin, strict=True))
    every = sum(value.numel() for value in start.values())
    assert moved / every == pytest.approx(1.0 if density == 1.0 else 1 - (1 - part) ** 3, abs=0.1)
    assert verify(made.place).holds
    assert (made.recipe.density, made.recipe.scale, made.recipe.seed) == (
        density or 0.2, scale or 1.0, None,
    )  # fmt: skip


@pytest.mark.parametrize(("density", "scale", "seed"), [(None, None, None), (0.5, 1.3, 7)])
def test_dare_is_what_the_paper_says(base, paths, tmp_path, density, scale, seed):
    experts = dict(zip(paths, (1, 2, 1), strict=True))
    asked = Settings(method="dare", density=density, scale=scale, seed=seed)
    made = soup.create(tmp_path / "soup", experts, asked, base=base)
    start, *ends = states([base, *experts])
    part, factor = Fraction(str(density or 0.1)), Fraction(str(scale or 1.0))
    masks = []
    for name, value in load_file(made.place / WEIGHTS).items():
        count = value.numel()
        kept = [moves._mask(made.recipe, each, name, 0, count).tolist() for each in NAMES]
        masks += [torch.tensor(each) for each in kept]
        columns = [each[name].double().flatten().tolist() for each in (start, *ends)]
        for i, found in enumerate(value.double().flatten().tolist()):
            origin = Fraction(columns[0][i])
            drawn = sum(
                weight * int(mask[i]) * (Fraction(column[i]) - origin)
                for weight, mask, column in zip((1, 2, 1), kept, columns[1:], strict=True)
            )
            assert found == rounded(origin + factor / part * drawn / 4, torch.float32) + 0.0
    assert float(torch.cat(masks).mean()) == pytest.approx(float(part), abs=0.02)
    assert verify(made.place).holds
    assert made.recipe.seed == (seed or 0)


def test_what_dare_keeps_is_each_ones_own(base, paths, tmp_path):
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), DARE, base=base)
    whole = moves._mask(made.recipe, "a", "t", 0, 1000)
    for first, count in ((0, 1), (3, 5), (4, 4), (997, 3), (501, 200)):
        part = moves._mask(made.recipe, "a", "t", first, count)
        assert torch.equal(part, whole[first : first + count])
    other = made.recipe.model_copy(update={"seed": 1})
    for recipe, name, tensor in (
        (made.recipe, "b", "t"), (made.recipe, "a", "u"), (other, "a", "t"),
    ):  # fmt: skip
        assert not torch.equal(moves._mask(recipe, name, tensor, 0, 1000), whole)


def test_experts_that_all_agree_have_their_mean(base, paths, tmp_path):
    """Kept whole and of one sign, TIES leaves out nobody; DARE that keeps all is the mean."""
    for path in paths:
        state, start = load_file(path / WEIGHTS), load_file(base / WEIGHTS)
        state = {n: torch.maximum(v, start[n] + 1e-3) for n, v in state.items()}
        save_file(state, path / WEIGHTS, {"format": "pt"})
    mean = load_file(soup.create(tmp_path / "mean", dict.fromkeys(paths, 1)).place / WEIGHTS)
    for method in ("ties", "dare"):
        asked = Settings(method=method, density=1.0)
        made = soup.create(tmp_path / method, dict.fromkeys(paths, 1), asked, base=base)
        found = load_file(made.place / WEIGHTS)
        assert all(torch.equal(found[name], value) for name, value in mean.items())


@pytest.mark.parametrize("asked", [TIES, DARE, Settings(method="dare", density=0.3, seed=4)])
def test_what_leaves_was_never_there(base, paths, make_expert, tmp_path, monkeypatch, asked):
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base).place
    before = sha256_folder(out)
    # Neither order nor pieces nor threads show.
    monkeypatch.setattr(stream, "_PIECE_BYTES", 52)
    monkeypatch.setattr(exact, "CHUNK", 9)
    again = soup.create(tmp_path / "again", dict.fromkeys(paths[::-1], 1), asked, base=base).place
    assert sha256_folder(again) == before
    monkeypatch.undo()
    soup.add(out, {make_expert("d", base_sha256=sha256_folder(base)): 2})
    assert sha256_folder(out) != before
    assert verify(out).holds
    soup.remove(out, "d")
    assert sha256_folder(out) == before
    soup.remove(out, "a")
    never = soup.create(tmp_path / "never", dict.fromkeys(paths[1:], 1), asked, base=base).place
    assert sha256_folder(out) == sha256_folder(never)
    with pytest.raises(Refused, match="is the base"):
        soup.remove(out, "base")


def test_blocks_weigh_experts(base, paths, tmp_path):
    silent = dict.fromkeys(NAMES, 0)
    blocks = [
        of_conv_in(**silent),
        Block(tensors="conv_out.*", weights={"a": 0}),
    ]
    starts = load_file(base / WEIGHTS)
    for method in ("ties", "dare"):
        asked = Settings(method=method, blocks=blocks)
        made = soup.create(tmp_path / method, dict.fromkeys(paths, 1), asked, base=base)
        without = soup.create(
            tmp_path / f"{method}-of-two",
            dict.fromkeys(paths[1:], 1),
            Settings(method=method),
            base=base,
        )
        found, others = load_file(made.place / WEIGHTS), load_file(without.place / WEIGHTS)
        for name, value in found.items():
            if name.startswith("conv_in."):
                assert torch.equal(value, starts[name] + 0.0)
            if name.startswith("conv_out."):
                assert torch.equal(value, others[name])
        assert verify(made.place).holds
        soup.remove(made.place, "a")
        assert soup.show(made.place).recipe.blocks == (of_conv_in(b=0, c=0),)


def test_strangers_without_cards_and_integers(base, paths, tmp_path):
    for path in (base, *paths):
        (path / CARD_NAME).unlink()
        state = load_file(path / WEIGHTS) | {"steps": torch.tensor([3, 4])}
        save_file(state, path / WEIGHTS, {"format": "pt"})
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), TIES, base=base)
    assert load_file(made.place / WEIGHTS)["steps"].tolist() == [3, 4]
    assert verify(made.place).holds
    state["steps"] += 1
    save_file(state, paths[0] / WEIGHTS, {"format": "pt"})
    with pytest.raises(Refused, match="tensor 'steps' differs between"):
        soup.create(tmp_path / "other", dict.fromkeys(paths, 1), TIES, base=base)


def test_what_is_not_finite_is_named(base, paths, tmp_path):
    state = load_file(paths[1] / WEIGHTS)
    state["conv_in.bias"][0] = math.nan
    save_file(state, paths[1] / WEIGHTS, {"format": "pt"})
    for asked in (TIES, DARE):
        with pytest.raises(Refused, match=r"'b' holds NaN or infinity in tensor 'conv_in\.bias'"):
            soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base)


def test_another_soup_is_another(base, paths, tmp_path):
    every = dict.fromkeys(paths, 1)
    made = [
        soup.create(tmp_path / str(number), every, asked, base=base)
        for number, asked in enumerate(
            [TIES, DARE, Settings(method="ties", density=0.3), Settings(method="ties", scale=0.5),
             Settings(method="dare", seed=1), Settings(method="model-stock")]
        )
    ]  # fmt: skip
    assert len({each.recipe.name for each in made}) == len(made)
    assert len({each.recipe.sha256 for each in made}) == len(made)
    with pytest.raises(Refused, match="another soup"):
        soup.create(tmp_path / "0", every, DARE, base=base)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Settings(method="ties", density=0.0), "density is 0.0"),
        (Settings(method="ties", density=1.01), "density is 1.01"),
        (Settings(method="dare", density=0.125), "density is 0.125"),
        (Settings(method="dare", density=math.nan), "density is nan"),
        (Settings(method="ties", scale=-1.0), "scale is -1.0"),
        (Settings(method="ties", seed=3), "ties has no seed"),
        (Settings(density=0.2), "mean has no density"),
        (Settings(method="model-stock", scale=1.0), "model-stock has no scale"),
        (Settings(method="ties", blocks=[of_conv_in(base=0)]), "is the base"),
        (Settings(method="ties", blocks=[of_conv_in(a=-1)]), "negative"),
    ],
)  # fmt: skip
def test_what_the_methods_do_not_take(base, paths, tmp_path, asked, words):
    with pytest.raises(UsageError, match=words):
        soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base, negative=True)
    assert not (tmp_path / "soup").exists()


def test_what_else_the_methods_do_not_take(base, paths, tmp_path):
    every, out = dict.fromkeys(paths, 1), tmp_path / "soup"
    with pytest.raises(UsageError, match="needs the base"):
        soup.create(out, every, TIES)
    with pytest.raises(UsageError, match="is negative"):
        soup.create(out, every | {paths[0]: -1}, TIES, base=base, negative=True)
    with pytest.raises(UsageError, match="too large for this density"):
        soup.create(
            out, every | {paths[0]: 2**20}, Settings(method="dare", density=0.99), base=base
        )
    with pytest.raises(UsageError, match="for plain means"):
        soup.leave_one_out(out, every, TIES, base=base)
    adapter = {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.ones(2, 1)}
    files = [tmp_path / f"{name}.safetensors" for name in "xy"]
    for file in files:
        save_file(adapter, file)
    with pytest.raises(Refused, match="not for adapters"):
        soup.create(out, {files[0]: 1}, DARE, base=files[1])


@pytest.mark.parametrize(
    "change", [{"density": 2.0}, {"density": 0.123}, {"scale": None}, {"seed": None}]
)
def test_a_recipe_that_is_damaged(base, paths, tmp_path, change):
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), DARE, base=base)
    values = json.loads((made.place / RECIPE_NAME).read_text()) | change
    (made.place / RECIPE_NAME).write_bytes(canonical_json(values))
    with pytest.raises(Refused, match="is damaged"):
        soup.show(made.place)


@pytest.mark.parametrize("method", ["ties", "dare", "model-stock"])
def test_a_recipe_with_a_strange_base(base, paths, tmp_path, method):
    made = soup.create(
        tmp_path / "soup", dict.fromkeys(paths, 1), Settings(method=method), base=base
    )
    values = json.loads((made.place / RECIPE_NAME).read_text())
    for other in (None, "nobody"):
        (made.place / RECIPE_NAME).write_bytes(canonical_json(values | {"base": other}))
        with pytest.raises(Refused, match="The base is said to be"):
            verify(made.place)


def test_a_mean_with_a_strange_base_is_found_out(base, paths, tmp_path):
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1))
    values = json.loads((made.place / RECIPE_NAME).read_text())
    (made.place / RECIPE_NAME).write_bytes(canonical_json(values | {"base": "a"}))
    assert any("has a for the base" in problem for problem in verify(made.place).problems)
    (made.place / RECIPE_NAME).write_bytes(canonical_json(values))
    assert verify(made.place).holds
    for path in (base, *paths):
        (path / CARD_NAME).unlink()
    strange = soup.create(tmp_path / "strange", dict.fromkeys(paths, 1), TIES, base=base)
    values = json.loads((strange.place / RECIPE_NAME).read_text()) | {"base_sha256": "e" * 64}
    (strange.place / RECIPE_NAME).write_bytes(canonical_json(values))
    assert any("another base" in problem for problem in verify(strange.place).problems)


@pytest.mark.parametrize("asked", [TIES, Settings(method="model-stock")])
def test_what_changes_between_two_readings_is_refused(base, paths, tmp_path, monkeypatch, asked):
    """A file that is read several times is hashed every time."""
    readings = []
    opened = Model.__enter__

    def changing(model: Model) -> Model:
        if model.path == paths[1]:
            readings.append(model)
            if len(readings) == 2:
                data = bytearray((paths[1] / WEIGHTS).read_bytes())
                data[-1] ^= 1
                (paths[1] / WEIGHTS).write_bytes(data)
        return opened(model)

    monkeypatch.setattr(Model, "__enter__", changing)
    with pytest.raises(Refused, match="changed while it was read"):
        soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), asked, base=base)
    assert len(readings) == 2
    assert not (tmp_path / "soup").exists()


def test_the_base_has_no_weight(base, paths, tmp_path):
    with pytest.raises(UsageError, match="is the base, which has no weight"):
        soup.create(tmp_path / "soup", {**dict.fromkeys(paths, 1), base: 7}, TIES, base=base)
