"""Named sizes: a flat table from a recipe's name to a configuration and its training defaults.

Parameters are counted for pictures of 4x32x32 (latents of 256x256) and the text of CLIP ViT-L/14,
those of `nano`, `tiny` and `digits` for what they say. Model dropout is 0 everywhere: condition
dropout is ours (promise 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A family at one size, and its training defaults."""

    family: str
    about: str
    config: Mapping[str, Any]
    batch: int
    base_learning_rate: float
    learning_rate: float  # of experts: lower keeps them where a soup of them is good
    base_passes: float  # images_seen of the base as a multiple of the commons' records
    passes: float  # likewise of an expert, of its shard's


# `attention_head_dim` is the number of heads here, whatever its name (diffusers issue 2011).
_UNET: dict[str, Any] = {
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "dropout": 0.0,
}
# Stable Diffusion 1's UNet, at its width or narrower.
_UNET_SD: dict[str, Any] = {
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "dropout": 0.0,
}
# SDXL's UNet (Podell et al. 2023, arXiv 2307.01952, table 1) without its second vector of sizes.
_UNET_SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
    "dropout": 0.0,
}


def _blocks(layers: int, heads: int, head: int, patch: int) -> dict[str, Any]:
    """What every transformer is configured by; its width is `heads * head`."""
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "patch_size": patch,
    }


def _pixart(layers: int, heads: int, head: int, patch: int = 2) -> dict[str, Any]:
    return {
        **_blocks(layers, heads, head, patch),
        "cross_attention_dim": heads * head,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
        "dropout": 0.0,
    }


def _uvit(layers: int, heads: int, head: int = 64, patch: int = 2) -> dict[str, Any]:
    return {**_blocks(layers, heads, head, patch), "qk_norm": True, "final_conv": True}


def _dit(layers: int, heads: int, head: int = 64, patch: int = 2) -> dict[str, Any]:
    return {**_blocks(layers, heads, head, patch), "qk_norm": True}


def _sd3(depth: int, head: int = 64, patch: int = 2) -> dict[str, Any]:
    """As deep as it has heads (Esser et al. 2024, arXiv 2403.03206, section 4)."""
    return {
        **_blocks(depth, depth, head, patch),
        "caption_projection_dim": depth * head,
        "qk_norm": "rms_norm",
    }


def _tiny(family: str, config: Mapping[str, Any]) -> Recipe:
    about = "the smallest that trains, for tests"
    return Recipe(family, about, config, 8, 2e-3, 1e-3, base_passes=2, passes=2)


def _nano(family: str, about: str, config: Mapping[str, Any]) -> Recipe:
    """For pictures of 32x32 on a CPU; only the rates of unet-nano and pixart-nano are measured."""
    return Recipe(family, about, config, 32, 1e-3, 5e-4, base_passes=40, passes=20)


def _large(
    family: str, about: str, config: Mapping[str, Any], *, batch: int, rate: float
) -> Recipe:
    """For corpora of millions. Batch and base rate are those of the paper that the row names.

    Nothing here was measured by us: half the base's rate for experts is what suited the small
    sizes, and one pass is what corpora of this size are given.
    """
    return Recipe(family, about, config, batch, rate, rate / 2, base_passes=1, passes=1)


RECIPES: dict[str, Recipe] = {
    "unet-digits": Recipe(
        "unet",
        "1.6M: pictures of 8x8, minutes on one core",
        {
            **_UNET,
            "block_out_channels": (48, 96),
            # Attention at 4x4 alone: the same accuracy at 1.5 times the speed.
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        },
        batch=64,
        base_learning_rate=2e-3,
        learning_rate=1e-3,
        base_passes=67,
        passes=40,
    ),
    "unet-nano": _nano(
        "unet",
        "4.8M: pictures of 32x32 on a CPU",
        {
            **_UNET,
            "block_out_channels": (32, 64, 96, 128),
            "down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        },
    ),
    "unet-tiny": _tiny(
        "unet",
        {
            **_UNET,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        },
    ),
    # Stable Diffusion 1 was trained at 1e-4 in batches of 2048 (its model card).
    "unet-300m": _large(
        "unet",
        "314M: Stable Diffusion 1's UNet, 3/5 as wide",
        {
            **_UNET_SD,
            "block_out_channels": (192, 384, 768, 768),
            "attention_head_dim": (3, 6, 12, 12),
        },
        batch=2048,
        rate=1e-4,
    ),
    "unet-600m": _large(
        "unet",
        "553M: Stable Diffusion 1's UNet, 4/5 as wide",
        {
            **_UNET_SD,
            "block_out_channels": (256, 512, 1024, 1024),
            "attention_head_dim": (4, 8, 16, 16),
        },
        batch=2048,
        rate=1e-4,
    ),
    "unet-sd1": _large(
        "unet",
        "860M: Stable Diffusion 1's UNet",
        {**_UNET_SD, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
        batch=2048,
        rate=1e-4,
    ),
    "unet-2.3b": _large(
        "unet", "2.35B: SDXL's UNet on one CLIP's text", _UNET_SDXL, batch=2048, rate=1e-4
    ),
    "pixart-nano": _nano(
        "pixart",
        "1.8M: pictures of 32x32 on a CPU, twice as fast as unet-nano",
        _pixart(6, 4, 32, patch=4),
    ),
    "pixart-tiny": _tiny("pixart", _pixart(2, 2, 8)),
    # PixArt-alpha, arXiv 2310.00426: 2e-5. Its batch of 64 GPUs is no default, this one is ours.
    "pixart-300m": _large("pixart", "312M", _pixart(18, 16, 64), batch=1024, rate=2e-5),
    "pixart-600m": _large(
        "pixart", "607M: PixArt-XL/2", _pixart(28, 16, 72), batch=1024, rate=2e-5
    ),
    "pixart-2.3b": _large("pixart", "2.32B", _pixart(34, 16, 128), batch=1024, rate=2e-5),
    "pixart-8b": _large("pixart", "8.19B", _pixart(30, 32, 128), batch=1024, rate=2e-5),
    "uvit-nano": _nano("uvit", "1.6M: pictures of 32x32 on a CPU", _uvit(7, 4, 32, patch=4)),
    "uvit-tiny": _tiny("uvit", _uvit(3, 2, 8)),
    # U-ViT, arXiv 2209.12152, and its published configurations: 2e-4 in batches of 1024 for L and
    # H; the larger ones are given the 1e-4 of larger transformers. The sizes above H are those of
    # arXiv 2412.12391, the shapes ours.
    "uvit-300m": _large("uvit", "288M: U-ViT-L/2", _uvit(21, 16), batch=1024, rate=2e-4),
    "uvit-h": _large("uvit", "502M: U-ViT-H/2", _uvit(29, 16, 72), batch=1024, rate=2e-4),
    "uvit-600m": _large("uvit", "620M", _uvit(29, 20), batch=1024, rate=1e-4),
    "uvit-2.3b": _large("uvit", "2.35B", _uvit(43, 16, 128), batch=1024, rate=1e-4),
    "uvit-8b": _large("uvit", "8.19B", _uvit(49, 28, 128), batch=1024, rate=1e-4),
    "dit-nano": _nano("dit", "1.9M: pictures of 32x32 on a CPU", _dit(6, 4, 32, patch=4)),
    "dit-tiny": _tiny("dit", _dit(2, 2, 8)),
    # DiT, arXiv 2212.09748, table 1 (B and XL) and section 4: 1e-4 in batches of 256.
    "dit-b": _large("dit", "131M: DiT-B/2", _dit(12, 12), batch=256, rate=1e-4),
    "dit-300m": _large("dit", "308M", _dit(16, 16), batch=256, rate=1e-4),
    "dit-600m": _large("dit", "604M", _dit(25, 16, 72), batch=256, rate=1e-4),
    "dit-xl": _large("dit", "676M: DiT-XL/2", _dit(28, 16, 72), batch=256, rate=1e-4),
    "dit-2.3b": _large("dit", "2.28B", _dit(30, 16, 128), batch=256, rate=1e-4),
    "dit-8b": _large("dit", "8.03B", _dit(30, 30, 128), batch=256, rate=1e-4),
    "sd3-nano": _nano("sd3", "2.3M: pictures of 32x32 on a CPU", _sd3(4, 32, patch=4)),
    "sd3-tiny": _tiny("sd3", _sd3(2, 8)),
    # SD3, arXiv 2403.03206: 1e-4. The batch is ours.
    "sd3-300m": _large("sd3", "320M", _sd3(13), batch=1024, rate=1e-4),
    "sd3-600m": _large("sd3", "597M", _sd3(16), batch=1024, rate=1e-4),
    "sd3-2b": _large("sd3", "2.02B: the depth of SD3 medium", _sd3(24), batch=1024, rate=1e-4),
    "sd3-2.3b": _large("sd3", "2.29B", _sd3(25), batch=1024, rate=1e-4),
    "sd3-8b": _large("sd3", "8.05B: the depth of SD3's largest", _sd3(38), batch=1024, rate=1e-4),
}
