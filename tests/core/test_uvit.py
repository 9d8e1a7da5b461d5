"""U-ViT: padding is never read, and skips connect what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atoll.core.uvit import UViT
from tests.core.networks import awake, fresh, inputs


@pytest.mark.parametrize("behind", [0.0, 9.0, 1e6])
def test_what_stands_behind_the_mask_changes_nothing(behind: float) -> None:
    network, given = awake(UViT), inputs(UViT)
    with torch.no_grad():
        before = network(**given).sample
        keep = given["encoder_attention_mask"][:, :, None]
        given["encoder_hidden_states"] = given["encoder_hidden_states"].where(keep, behind)
        assert torch.equal(network(**given).sample, before)


def test_padding_may_be_left_out_altogether() -> None:
    network, given = awake(UViT), inputs(UViT, 1)
    with torch.no_grad():
        padded = network(**given).sample
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :1]
        given["encoder_attention_mask"] = given["encoder_attention_mask"][:, :1]
        torch.testing.assert_close(network(**given).sample, padded)
        given.pop("encoder_attention_mask")
        torch.testing.assert_close(network(**given).sample, padded)


def test_text_is_learned_from_the_first_step_on() -> None:
    network = fresh(UViT)
    given = inputs(UViT)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (network(**given).sample - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = network(**given).sample
        given["encoder_hidden_states"] = -given["encoder_hidden_states"]
        assert not torch.equal(network(**given).sample, before)


def test_skips_connect_the_first_block_with_the_last() -> None:
    network, seen = awake(UViT), []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, given, out: seen.append((given[2], out)))
    network(**inputs(UViT))
    assert [skip is None for skip, _ in seen] == [True, True, True, False, False]
    assert seen[3][0] is seen[1][1]
    assert seen[4][0] is seen[0][1]


def test_skips_are_silent_at_first_and_then_learned() -> None:
    network, given = fresh(UViT), inputs(UViT)
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
        output = fresh(UViT, final_conv=final_conv)(**inputs(UViT)).sample
        assert output.abs().max() == 0


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
        fresh(UViT, **changes)
