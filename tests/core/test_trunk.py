"""The trunk: its labels' shares at the start, the same after saving, refusals on loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.core import seeds
from atoll.core.conditioning import Conditioning
from atoll.core.errors import Refused
from atoll.core.manifest import Picture
from atoll.core.trunk import Trunk, TrunkConfig, first_stride, new_trunk

MakeCond = Callable[..., Conditioning]
CONFIG = TrunkConfig(channels=3, pooled=8, width=8, labels={"x": 30, "y": 10})
X_T = seeds.normal(0, "x", first=0, count=4, shape=(3, 16, 16))
T = torch.tensor([0.1, 0.4, 0.7, 0.9])


@torch.no_grad()
def test_a_new_trunk_says_the_labels_shares(cond: MakeCond) -> None:
    made = new_trunk(CONFIG, seed=0)
    shares = torch.tensor([[0.75, 0.25]]).expand(4, 2)
    torch.testing.assert_close(made.logits(X_T, T, cond(4)).softmax(1), shares)
    torch.testing.assert_close(made.text_logits(cond(4)).softmax(1), shares)
    assert made.features(X_T, T, cond(4)).map.shape == (4, 16, 4, 4)


def test_a_new_trunk_is_a_function_of_its_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, other = (new_trunk(CONFIG, seed=seed).time.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


@torch.no_grad()
def test_saved_and_loaded_is_bitwise_the_same_and_frozen(tmp_path: Path, cond: MakeCond) -> None:
    made = new_trunk(CONFIG, seed=0).eval()
    for parameter in made.parameters():
        parameter.add_(0.1)
    made.save(tmp_path / "trunk")
    loaded = Trunk.load(tmp_path / "trunk")
    assert loaded.config == CONFIG
    assert torch.equal(loaded.logits(X_T, T, cond(4)), made.logits(X_T, T, cond(4)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_beside_a_picture_a_caption_says_what_it_says_alone(cond: MakeCond) -> None:
    """p(l | x_t, c) from p(l | c) and what the picture adds, by Bayes' rule."""
    made, c = new_trunk(CONFIG, seed=0), cond(4)
    made.text_only[-1].bias.copy_(torch.linspace(-1, 2, len(CONFIG.labels)))
    made.upper.out.bias.copy_(torch.linspace(0, 3, len(CONFIG.labels)))
    alone = made.text_logits(c).double().softmax(dim=1)
    shares = CONFIG.log_shares().exp()
    seen = made.upper(made.features(X_T, T, c)).double().softmax(dim=1)
    both = alone * seen / shares
    both /= both.sum(dim=1, keepdim=True)
    both = torch.where(c.is_null[:, None], seen, both)
    found = made.logits(X_T, T, c).double().softmax(dim=1)
    torch.testing.assert_close(found, both, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[1:], seen[1:], atol=0.01)


@torch.no_grad()
def test_the_empty_caption_says_nothing_below_1(cond: MakeCond) -> None:
    made, c = new_trunk(CONFIG, seed=0), cond(1)
    other = Conditioning(c.tokens, c.mask, c.pooled * -3, c.is_null)
    ours, theirs = (made.features(X_T[:1], T[:1], each) for each in (c, other))
    assert torch.equal(ours.map, theirs.map)


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (15, 1), (16, 2), (64, 2)])
def test_small_pictures_are_not_strided_over_at_once(side: int, stride: int) -> None:
    assert first_stride(Picture(channels=1, height=side, width=64)) == stride


def _config(**changes: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return apply


def _less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("time.bias")
    save_file(tensors, folder / "model.safetensors")


STRANGE: dict[str, Callable[[Path], Any]] = {
    "a tensor less": _less,
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "torn config": lambda f: (f / "config.json").write_text("{"),
    "other schema": _config(schema_version=7),
    "no labels": _config(labels={}),
    "a label without records": _config(labels={"x": 30, "y": 0}),
    "other channels": _config(channels=1),
    "width that does not divide": _config(width=12),
}


@pytest.mark.parametrize("how", STRANGE)
def test_a_stranger_is_refused_with_a_sentence(tmp_path: Path, how: str) -> None:
    new_trunk(CONFIG, seed=0).save(tmp_path / "x")
    STRANGE[how](tmp_path / "x")
    with pytest.raises(Refused):
        Trunk.load(tmp_path / "x")
