"""DiT: a transformer over patches whose norms are steered by one vector, of time and text.

Peebles & Xie 2022, arXiv 2212.09748, with adaLN-zero (section 3.2), and the pooled text vector in
the place of the class. A diffusers model in every respect.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from atoll.core.transformer import (
    Attention,
    TimeEmbedding,
    embed_patches,
    feed_forward,
    unpatchify,
    zero,
)

# Why not diffusers' DiTTransformer2DModel: every one of its blocks has a table of class labels of
# its own, looked up inside the block, with a label dropout that draws from the global generator.
# A text vector has no way in but by replacing that table in all blocks, and it takes squares only.


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A block that begins as the identity: adaLN-zero's gates are 0 at first."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = feed_forward(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        zero(self.modulation[1])

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(steer).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(_modulated(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2[:, None] * self.ff(_modulated(self.norm2(x), shift2, scale2))
        return out


class DiT(ModelMixin, PeftAdapterMixin, ConfigMixin):  # type: ignore[misc]
    """The network; it begins with an output of 0.

    `sample_size` is what pipelines ask for the usual picture size, the weights do not depend on it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)
    _skip_layerwise_casting_patterns = ("norm",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        pooled_projection_dim: int = 768,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if width % 4:
            raise ValueError(
                f"A DiT of width {width}; allowed: multiples of 4; change the heads or their size"
            )
        self.patches = nn.Linear(in_channels * patch_size**2, width)
        self.time = TimeEmbedding(width)
        self.text = nn.Sequential(
            nn.Linear(pooled_projection_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_attention_heads, qk_norm=qk_norm) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)
        zero(self.modulation[1], self.proj_out)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Pictures `(batch, channel, height, width)` to an output of the same shape.

        `timestep` `(batch,)` from 0 to 1000, text `(batch, pooled_projection_dim)` with entries
        of about 1.
        """
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        x = embed_patches(self.patches, hidden_states, patch)
        time = self.time(timestep.reshape(-1).expand(batch), x.dtype)
        steer = time + self.text(pooled_projections)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, steer)
            else:
                x = block(x, steer)
        shift, scale = self.modulation(steer).chunk(2, dim=1)
        x = self.proj_out(_modulated(self.norm_out(x), shift, scale))
        sample = unpatchify(x, patch, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
