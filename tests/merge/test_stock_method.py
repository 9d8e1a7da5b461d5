"""Model Stock: the ratio of the paper, and a soup as exact and as removable as a mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import canonical_json, sha256_folder
from atoll.core.errors import Refused, UsageError
from atoll.merge import exact, grams, soup
from atoll.merge.recipe import Block, Settings
from atoll.merge.stock import ratio
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS


@pytest.fixture
def base(make_expert) -> Path:
    return make_expert("base", kind="base", base_sha256=None, shard=None)


@pytest.fixture
def paths(make_expert, base) -> list[Path]:
    return [make_expert(name, base_sha256=sha256_folder(base)) for name in "abc"]


def at_angles(count: int, cosine: float) -> torch.Tensor:
    square = torch.full((count, count), cosine, dtype=torch.float64)
    return square.fill_diagonal_(1.0)


def test_the_ratio_is_that_of_the_paper():
    """Its worked case: two experts, where t = 2 cos / (1 + cos); and its ends."""
    for count, cosine in ((2, 0.5), (2, 0.1), (5, 0.3)):
        wanted = count * cosine / (1 + (count - 1) * cosine)
        scale = torch.tensor([2.0, 3.0, 1.0, 7.0, 0.1], dtype=torch.float64)[:count]
        assert ratio(at_angles(count, cosine) * scale * scale[:, None]) == pytest.approx(wanted)
    assert ratio(at_angles(3, 1.0)) == 1.0
    assert ratio(at_angles(3, 0.0)) == ratio(at_angles(2, -0.5)) == 0.0
    assert ratio(at_angles(1, 1.0)) == ratio(torch.zeros(3, 3).double()) == 1.0


def test_the_point_is_nearest_to_the_middle_of_the_sphere():
    """The geometry behind it: orthogonal noise about a common move, of which t keeps that part."""
    draw = np.random.default_rng(0)
    common, noise = draw.normal(size=100_000), draw.normal(size=(4, 100_000))
    moves = torch.from_numpy(common + noise)
    found = ratio(moves @ moves.T)
    mean = moves.mean(0).numpy()
    nearest = mean @ common / (mean @ mean)  # of all multiples of the mean
    assert found == pytest.approx(nearest, abs=0.02)


def test_every_tensor_is_the_exact_mean_with_its_own_weights(base, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(grams, "_CHUNK", 50)
    made = soup.create(
        tmp_path / "soup", dict.fromkeys(paths, 1), Settings(method="model-stock"), base=base
    )
    mean = load_file(made.place / WEIGHTS)
    start, *ends = (load_file(path / WEIGHTS) for path in (base, *paths))
    for name, value in mean.items():
        moves = torch.stack([(end[name] - start[name]).double().flatten() for end in ends])
        # float32's difference is not exact; t is rounded to a 4096th in any case.
        t = ratio(moves @ moves.T)
        part = round(t * 4096)
        weights = [part] * 3 + [(4096 - part) * 3]
        told = next(b for b in made.recipe.blocks if b.tensors == name).weights
        found = [told[n] for n in (*"abc", "base")]
        assert found[0] / sum(found) == pytest.approx(weights[0] / sum(weights), abs=1e-3)
        heard = [(v, w) for v, w in zip((*ends, start), found, strict=True) if w]
        wanted = exact.mean([v[name] for v, _ in heard], [w for _, w in heard])
        assert torch.equal(value, wanted)
    assert verify(made.place).holds
    assert made.card is not None
    assert made.card.images_seen == 300


def test_what_leaves_was_never_there(base, paths, make_expert, tmp_path):
    stock = Settings(method="model-stock")
    out = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), stock, base=base).place
    before = sha256_folder(out)
    again = soup.create(tmp_path / "again", dict.fromkeys(paths[::-1], 1), stock, base=base).place
    assert sha256_folder(again) == before
    soup.add(out, {make_expert("d", base_sha256=sha256_folder(base)): 1})
    assert sha256_folder(out) != before
    soup.remove(out, "d")
    assert sha256_folder(out) == before
    soup.remove(out, "a")
    never = soup.create(tmp_path / "never", dict.fromkeys(paths[1:], 1), stock, base=base).place
    assert sha256_folder(out) == sha256_folder(never)
    soup.remove(out, "b")  # one alone is itself
    assert all(
        torch.equal(value, load_file(paths[2] / WEIGHTS)[name])
        for name, value in load_file(out / WEIGHTS).items()
    )
    with pytest.raises(Refused, match="last ingredient"):
        soup.remove(out, "c")
    with pytest.raises(Refused, match="is the base"):
        soup.remove(out, "base")


def test_strangers_with_a_stranger_for_a_base(base, paths, tmp_path):
    for path in (base, *paths):
        (path / CARD_NAME).unlink()
    made = soup.create(
        tmp_path / "soup", dict.fromkeys(paths, 1), Settings(method="model-stock"), base=base
    )
    assert verify(made.place).holds
    assert made.recipe.base == "base"


def test_other_weights_than_the_method_finds_are_found_out(base, paths, tmp_path):
    stock = Settings(method="model-stock")
    made = soup.create(tmp_path / "soup", dict.fromkeys(paths, 1), stock, base=base)
    blocks = [made.recipe.blocks[0].model_copy(update={"weights": {"a": 7}})]
    other = made.recipe.model_copy(update={"blocks": (*blocks, *made.recipe.blocks[1:])})
    (made.place / "soup.json").write_bytes(canonical_json(other.model_dump(mode="json")))
    assert any("other weights than model-stock" in p for p in verify(made.place).problems)


def test_what_the_method_does_not_take(base, paths, tmp_path):

    def create(experts, blocks=(), base=base):
        asked = Settings(method="model-stock", blocks=blocks)
        return soup.create(tmp_path / "soup", experts, asked, base=base)

    block = Block(tensors="conv_in.*", weights={"a": 2})
    for call, words in (
        (lambda: create(dict.fromkeys(paths, 1), base=None), "needs the base"),
        (lambda: create({paths[0]: 2, paths[1]: 1}), "finds the weights itself"),
        (lambda: create(dict.fromkeys(paths, 1), [block]), "finds the weights itself"),
        (lambda: create({}), "at least one expert"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    adapter = {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.ones(2, 1)}
    for name in "xy":
        save_file(adapter, tmp_path / f"{name}.safetensors")
    with pytest.raises(Refused, match="not for adapters"):
        create({tmp_path / "x.safetensors": 1}, base=tmp_path / "y.safetensors")
