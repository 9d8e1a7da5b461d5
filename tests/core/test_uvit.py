"""U-ViT: padding is never read, skips connect what they should, folders load bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.uvit import UViT

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 6,
}


def awake(**changes: Any) -> UViT:
    """A network that no longer says 0, as after some steps of training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UViT(**CONFIG | changes)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            noise = seeds.normal(0, "noise", first=index, count=1, shape=tuple(parameter.shape))
            parameter.add_(0.1 * noise[0])
    return network.eval()


def inputs(n: int = 3, *, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    length = 5
    return {
        "hidden_states": seeds.normal(0, "x", first=0, count=n, shape=(3, height, width)),
        "timestep": torch.linspace(10, 990, n),
        "encoder_hidden_states": seeds.normal(0, "text", first=0, count=n, shape=(length, 6)),
        "encoder_attention_mask": torch.arange(length)[None] <= torch.arange(n)[:, None],
    }


@pytest.mark.parametrize("behind", [0.0, 9.0, 1e6])
def test_what_stands_behind_the_mask_changes_nothing(behind: float) -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        before = network(**given).sample
        keep = given["encoder_attention_mask"][:, :, None]
        given["encoder_hidden_states"] = given["encoder_hidden_states"].where(keep, behind)
        assert torch.equal(network(**given).sample, before)


def test_padding_may_be_left_out_altogether() -> None:
    network, given = awake(), inputs(1)
    with torch.no_grad():
        padded = network(**given).sample
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :1]
        given["encoder_attention_mask"] = given["encoder_attention_mask"][:, :1]
        torch.testing.assert_close(network(**given).sample, padded)
        given.pop("encoder_attention_mask")
        torch.testing.assert_close(network(**given).sample, padded)


def test_text_time_and_picture_all_reach_the_output() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        before = network(**given).sample
        for name in ("hidden_states", "timestep", "encoder_hidden_states"):
            changed = network(**given | {name: given[name].flip(0)}).sample
            assert not torch.allclose(changed, before, atol=1e-3), name


def test_text_is_learned_from_the_first_step_on() -> None:
    network = UViT(**CONFIG)
    given = inputs()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (network(**given).sample - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = network(**given).sample
        given["encoder_hidden_states"] = -given["encoder_hidden_states"]
        assert not torch.equal(network(**given).sample, before)


def test_position_matters() -> None:
    network, given = awake(final_conv=False), inputs()
    with torch.no_grad():
        # Patches moved as a whole: without positions the output would just move along.
        there = network(**given).sample
        moved = given["hidden_states"].roll(2, dims=3)
        back = network(**given | {"hidden_states": moved}).sample.roll(-2, dims=3)
    assert not torch.allclose(there, back, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 16), (16, 4), (2, 2)])
def test_pictures_of_any_shape(height: int, width: int) -> None:
    given = inputs(height=height, width=width)
    assert awake()(**given).sample.shape == given["hidden_states"].shape


def test_skips_connect_the_first_block_with_the_last() -> None:
    network, seen = awake(), []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, given, out: seen.append((given[2], out)))
    network(**inputs())
    assert [skip is None for skip, _ in seen] == [True, True, True, False, False]
    assert seen[3][0] is seen[1][1]
    assert seen[4][0] is seen[0][1]


def test_skips_are_silent_at_first_and_then_learned() -> None:
    network, given = UViT(**CONFIG), inputs()
    x, skip = torch.ones(1, 3, 16), torch.full((1, 3, 16), 7.0)
    assert torch.equal(network.blocks[4](x, None, skip), x)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (network(**given).sample - 1).square().mean().backward()
        optimizer.step()
    assert network.blocks[4].skip.weight[:, 16:].abs().max() > 0


def test_begins_at_zero_with_and_without_the_convolution() -> None:
    for final_conv in (True, False):
        output = UViT(**CONFIG, final_conv=final_conv)(**inputs()).sample
        assert output.abs().max() == 0


def test_a_number_or_one_time_will_do_for_all() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        wanted = network(**given | {"timestep": torch.full((3,), 500.0)}).sample
        for timestep in (torch.tensor(500.0), torch.tensor([500.0])):
            assert torch.equal(network(**given | {"timestep": timestep}).sample, wanted)
            (plain,) = network(**given | {"timestep": timestep}, return_dict=False)
            assert torch.equal(plain, wanted)


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_saved_and_loaded_by_diffusers_is_bitwise_the_same(size: Any, tmp_path: Path) -> None:
    network = awake(sample_size=size)
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UViT"
    loaded = UViT.from_pretrained(tmp_path, use_safetensors=True)
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).sample, network(**inputs()).sample)


def test_runs_in_bfloat16() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        wanted = network(**given).sample
        half = {k: v.bfloat16() if v.ndim > 2 else v for k, v in given.items()}
        output = network.bfloat16()(**half).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 4}, "4 layers.*odd number of layers.*change num_layers"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "width 6.*multiple of 4"),
    ],
)
def test_impossible_configuration_is_refused_with_the_cure(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        UViT(**CONFIG | changes)


def test_picture_that_does_not_divide_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"7x8.*choose another picture size"):
        awake()(**inputs(height=7, width=8))
