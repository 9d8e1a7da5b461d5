"""Building blocks of our transformers, and what the networks made of them have in common.

Blocks are held against inverses, closed forms and the reference of PyTorch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atoll.core import seeds
from atoll.core.dit import DiT
from atoll.core.transformer import (
    Attention,
    TimeEmbedding,
    patchify,
    positions,
    unpatchify,
    zero,
)
from atoll.core.uvit import UViT
from tests.core.networks import awake, inputs

of_both = pytest.mark.parametrize("kind", [DiT, UViT])


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(8, 8, 2), (8, 12, 4), (6, 3, 3), (4, 6, 1)]
)
def test_unpatchify_is_the_inverse_of_patchify(height: int, width: int, patch: int) -> None:
    x = seeds.normal(0, "x", first=0, count=2, shape=(3, height, width))
    tokens = patchify(x, patch)
    assert tokens.shape == (2, height // patch * width // patch, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, height, width), x)


def test_tokens_are_patches_in_reading_order() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    tokens = patchify(x, 2)
    assert torch.equal(tokens[0, 4], x[0, :, 2:4, 2:4].flatten())  # second row, second column


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7)])
def test_sides_that_do_not_divide_are_refused_with_the_cure(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"{height}x{width}.*multiples of 2; choose another"):
        patchify(torch.zeros(1, 1, height, width), 2)


def test_positions_are_the_sines_of_row_and_column() -> None:
    place = positions(3, 5, 16, torch.device("cpu")).reshape(3, 5, 16)
    for row in range(3):
        for column in range(5):
            for index, angle in ((0, 1.0), (2, 0.01)):
                assert place[row, column, index].item() == pytest.approx(math.sin(row * angle))
                across = place[row, column, 8 + 4 + index].item()
                assert across == pytest.approx(math.cos(column * angle))
    assert len(place.reshape(15, 16).unique(dim=0)) == 15


def test_a_smaller_grid_has_the_positions_of_the_larger_one() -> None:
    device = torch.device("cpu")
    large = positions(4, 6, 8, device).reshape(4, 6, 8)
    assert torch.equal(positions(2, 3, 8, device).reshape(2, 3, 8), large[:2, :3])


def test_attention_is_that_of_pytorch() -> None:
    ours = Attention(16, 4, qk_norm=False)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        projections = (ours.to_q, ours.to_k, ours.to_v)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj.load_state_dict(ours.to_out[0].state_dict())
    x = seeds.normal(0, "x", first=0, count=3, shape=(5, 16))
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
    wanted, _ = theirs(x, x, x, key_padding_mask=~keep)
    torch.testing.assert_close(ours(x, keep[:, None, None]), wanted)


def test_normalised_queries_do_not_grow_with_their_projection() -> None:
    attention = Attention(16, 4, qk_norm=True)
    x = seeds.normal(0, "x", first=0, count=2, shape=(5, 16))
    before = attention(x)
    with torch.no_grad():
        for projection in (attention.to_q, attention.to_k):
            projection.weight.mul_(100)
            projection.bias.mul_(100)
    torch.testing.assert_close(attention(x), before, rtol=1e-3, atol=1e-4)


def test_times_are_embedded_in_float32_whatever_the_weights() -> None:
    embedding = TimeEmbedding(8).to(torch.bfloat16)
    # bfloat16 has one number for both.
    one, other = embedding(torch.tensor([999.0, 1000.0]), torch.bfloat16)
    assert not torch.equal(one, other)


def test_zero_silences_a_layer() -> None:
    layer = nn.Linear(3, 2)
    zero(layer)
    assert layer(torch.ones(3)).abs().max() == 0


# -- networks ------------------------------------------------------------------------------------


@of_both
def test_text_time_and_picture_all_reach_the_output(kind: type[DiT | UViT]) -> None:
    network, given = awake(kind), inputs(kind)
    with torch.no_grad():
        before = network(**given).sample
        for name in given.keys() - {"encoder_attention_mask"}:
            changed = network(**given | {name: given[name].flip(0)}).sample
            assert not torch.allclose(changed, before, atol=1e-3), name


@pytest.mark.parametrize(("kind", "changes"), [(DiT, {}), (UViT, {"final_conv": False})])
def test_position_matters(kind: type[DiT | UViT], changes: dict[str, Any]) -> None:
    network, given = awake(kind, **changes), inputs(kind)
    with torch.no_grad():
        # Patches moved as a whole: without positions the output would just move along.
        there = network(**given).sample
        moved = given["hidden_states"].roll(2, dims=3)
        back = network(**given | {"hidden_states": moved}).sample.roll(-2, dims=3)
    assert not torch.allclose(there, back, atol=1e-3)


@of_both
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 16), (16, 4), (2, 2)])
def test_pictures_of_any_shape(kind: type[DiT | UViT], height: int, width: int) -> None:
    given = inputs(kind, height=height, width=width)
    assert awake(kind)(**given).sample.shape == given["hidden_states"].shape


@of_both
def test_a_number_or_one_time_will_do_for_all(kind: type[DiT | UViT]) -> None:
    network, given = awake(kind), inputs(kind)
    with torch.no_grad():
        wanted = network(**given | {"timestep": torch.full((3,), 500.0)}).sample
        for timestep in (torch.tensor(500.0), torch.tensor([500.0])):
            assert torch.equal(network(**given | {"timestep": timestep}).sample, wanted)
            (plain,) = network(**given | {"timestep": timestep}, return_dict=False)
            assert torch.equal(plain, wanted)


@of_both
@pytest.mark.parametrize("size", [8, (8, 12)])
def test_saved_and_loaded_by_diffusers_is_bitwise_the_same(
    kind: type[DiT | UViT], size: Any, tmp_path: Path
) -> None:
    network, given = awake(kind, sample_size=size), inputs(kind)
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == kind.__name__
    loaded = kind.from_pretrained(tmp_path, use_safetensors=True)
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(**given).sample, network(**given).sample)


@of_both
def test_runs_in_bfloat16(kind: type[DiT | UViT]) -> None:
    network, given = awake(kind), inputs(kind)
    with torch.no_grad():
        wanted = network(**given).sample
        low = {
            name: value.bfloat16() if value.is_floating_point() and name != "timestep" else value
            for name, value in given.items()
        }
        output = network.bfloat16()(**low).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - wanted).norm() < 0.05 * wanted.norm()


@of_both
def test_picture_that_does_not_divide_is_refused_with_the_cure(kind: type[DiT | UViT]) -> None:
    with pytest.raises(ValueError, match=r"7x8.*choose another picture size"):
        awake(kind)(**inputs(kind, height=7, width=8))
