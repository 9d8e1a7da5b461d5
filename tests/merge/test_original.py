"""The names of the original layout, against diffusers' own conversion of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from atoll.merge.original import original_names

SIZES: dict[str, Any] = {
    "sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8
}  # fmt: skip
SDXL: dict[str, Any] = {
    **SIZES,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
SD = {**SIZES, "block_out_channels": (8, 16, 24, 24)}


@pytest.mark.parametrize("config", [SDXL, SD, {**SD, "layers_per_block": 1}], ids=str)
def test_every_layer_has_the_name_that_diffusers_reads_it_by(config: dict[str, Any]) -> None:
    network = UNet2DConditionModel(**config)
    modules = [name.removesuffix(".weight") for name in network.state_dict() if "weight" in name]
    names = original_names(modules)
    assert names.keys() == set(modules)
    assert len(set(names.values())) == len(modules)
    tagged = {
        f"model.diffusion_model.{names[module]}.{part}": torch.tensor(n)
        for n, module in enumerate(modules)
        for part in ("weight", "bias")
    }
    read = convert_ldm_unet_checkpoint(tagged, dict(network.config))
    for n, module in enumerate(modules):
        assert int(read[f"{module}.weight"]) == n, module


def test_other_networks_have_none() -> None:
    odd = ("up_blocks.0.upsamplers.0.conv", f"down_blocks.{'9' * 5000}.resnets.0.conv1", "a")
    assert original_names(odd) == {}
    shape: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    network = DiTTransformer2DModel(**shape, norm_num_groups=1, sample_size=4, in_channels=1)
    assert original_names(name for name, _ in network.named_modules()) == {}
