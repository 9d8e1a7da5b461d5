"""DiT: begins as adaLN-zero says, and learns text from the first step on."""

from __future__ import annotations

import pytest
import torch

from atoll.core.dit import DiT
from tests.core.networks import fresh, inputs


def test_blocks_begin_as_the_identity_and_the_output_at_zero() -> None:
    network = fresh(DiT)
    x, steer = torch.full((1, 4, 16), 3.0), torch.ones(1, 16)
    assert torch.equal(network.blocks[0](x, steer), x)
    assert network(**inputs(DiT)).sample.abs().max() == 0


def test_text_is_learned_from_the_first_step_on() -> None:
    network, given = fresh(DiT), inputs(DiT)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (network(**given).sample - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = network(**given).sample
        given["pooled_projections"] = -given["pooled_projections"]
        assert not torch.equal(network(**given).sample, before)


def test_width_without_positions_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"width 6.*multiples of 4; change the heads"):
        fresh(DiT, num_attention_heads=1, attention_head_dim=6)
