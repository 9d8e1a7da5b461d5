"""DiT: begins as adaLN-zero says, is steered by time and text, loads bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.core import seeds
from atoll.core.dit import DiT

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "pooled_projection_dim": 6,
}


def awake(**changes: Any) -> DiT:
    """A network that no longer says 0, as after some steps of training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(**CONFIG | changes)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            noise = seeds.normal(0, "noise", first=index, count=1, shape=tuple(parameter.shape))
            parameter.add_(0.1 * noise[0])
    return network.eval()


def inputs(n: int = 3, *, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    return {
        "hidden_states": seeds.normal(0, "x", first=0, count=n, shape=(3, height, width)),
        "timestep": torch.linspace(10, 990, n),
        "pooled_projections": seeds.normal(0, "text", first=0, count=n, shape=(6,)),
    }


def test_blocks_begin_as_the_identity_and_the_output_at_zero() -> None:
    network = DiT(**CONFIG)
    x, steer = torch.full((1, 4, 16), 3.0), torch.ones(1, 16)
    assert torch.equal(network.blocks[0](x, steer), x)
    assert network(**inputs()).sample.abs().max() == 0


def test_text_time_and_picture_all_reach_the_output() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        before = network(**given).sample
        for name in given:
            changed = network(**given | {name: given[name].flip(0)}).sample
            assert not torch.allclose(changed, before, atol=1e-3), name


def test_text_is_learned_from_the_first_step_on() -> None:
    network, given = DiT(**CONFIG), inputs()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (network(**given).sample - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = network(**given).sample
        given["pooled_projections"] = -given["pooled_projections"]
        assert not torch.equal(network(**given).sample, before)


def test_position_matters() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        there = network(**given).sample
        moved = given["hidden_states"].roll(2, dims=3)
        back = network(**given | {"hidden_states": moved}).sample.roll(-2, dims=3)
    assert not torch.allclose(there, back, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 16), (16, 4), (2, 2)])
def test_pictures_of_any_shape(height: int, width: int) -> None:
    given = inputs(height=height, width=width)
    assert awake()(**given).sample.shape == given["hidden_states"].shape


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_saved_and_loaded_by_diffusers_is_bitwise_the_same(size: Any, tmp_path: Path) -> None:
    network = awake(sample_size=size)
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiT"
    loaded = DiT.from_pretrained(tmp_path, use_safetensors=True)
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).sample, network(**inputs()).sample)


def test_runs_in_bfloat16() -> None:
    network, given = awake(), inputs()
    with torch.no_grad():
        wanted = network(**given).sample
        half = {k: v.bfloat16() if v.ndim > 1 else v for k, v in given.items()}
        output = network.bfloat16()(**half, return_dict=False)[0]
    assert output.dtype == torch.bfloat16
    assert (output.float() - wanted).norm() < 0.05 * wanted.norm()


def test_what_does_not_divide_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"width 6.*multiples of 4; change the heads"):
        DiT(**CONFIG | {"num_attention_heads": 1, "attention_head_dim": 6})
    with pytest.raises(ValueError, match=r"7x8.*choose another picture size"):
        awake()(**inputs(height=7, width=8))
