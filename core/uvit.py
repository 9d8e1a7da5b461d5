"""U-ViT: time, text and patches are tokens of one sequence, with long skips across the depth.

Bao et al. 2022, "All are Worth Words", arXiv 2209.12152; as a text-to-image backbone it scaled
better than cross-attention in arXiv 2412.12391. A diffusers model in every respect; diffusers' own
`UVit2DModel` is another network (aMUSEd's, on discrete tokens).
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional

from atoll.core.transformer import (
    Attention,
    TimeEmbedding,
    embed_patches,
    feed_forward,
    unpatchify,
    zero,
)


class UViTBlock(nn.Module):
    """A pre-norm transformer block; in the second half of the depth it takes a long skip in."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, takes_skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if takes_skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width)
        self.ff = feed_forward(width)
        zero(self.attn.to_out[0], self.ff[2])
        if self.skip is not None:
            # The stream passes and the skip is silent: with random mixing the signal of the lower
            # half would fade by a factor at each of the upper blocks.
            zero(self.skip)
            with torch.no_grad():
                self.skip.weight[:, :width].fill_diagonal_(1.0)

    def forward(self, x: Tensor, mask: Tensor | None, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x), mask)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class UViT(ModelMixin, PeftAdapterMixin, ConfigMixin):  # type: ignore[misc]
    """The network; it begins with an output of 0.

    `num_layers` is odd: as many blocks below the middle one as above it. `sample_size` is what
    pipelines ask for the usual picture size, the weights do not depend on it. `final_conv` smooths
    the seams of patches, which small patches hardly have (paper, section 3.1).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("UViTBlock",)
    _skip_layerwise_casting_patterns = ("norm",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 21,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        joint_attention_dim: int = 768,
        qk_norm: bool = True,
        final_conv: bool = True,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if num_layers % 2 == 0 or width % 4:
            raise ValueError(
                f"A U-ViT of {num_layers} layers and width {width}; allowed: an odd number of "
                "layers, and a width that is a multiple of 4; change num_layers or the heads"
            )
        half = num_layers // 2
        self.patches = nn.Linear(in_channels * patch_size**2, width)
        self.time = TimeEmbedding(width)
        self.text = nn.Linear(joint_attention_dim, width)
        self.blocks = nn.ModuleList(
            UViTBlock(width, num_attention_heads, qk_norm=qk_norm, takes_skip=depth > half)
            for depth in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)
        self.conv_out = (
            nn.Conv2d(out_channels, out_channels, 3, padding=1) if final_conv else nn.Identity()
        )
        zero(self.proj_out)
        if isinstance(self.conv_out, nn.Conv2d):
            # It begins as the identity: at random, or at 0 behind a random projection, it is the
            # neck of a bottle (loss on digits after 500 steps 0.76 and 0.83, so 0.52).
            zero(self.conv_out)
            nn.init.dirac_(self.conv_out.weight)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Pictures `(batch, channel, height, width)` to an output of the same shape.

        `timestep` `(batch,)` from 0 to 1000, text `(batch, length, joint_attention_dim)` and its
        mask `(batch, length)`, True where a token counts; what stands in the others is never read.
        """
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        tokens = embed_patches(self.patches, hidden_states, patch)
        time = self.time(timestep.reshape(-1).expand(batch), tokens.dtype)
        # Text brings its positions along: they are in the encoder's token states.
        text = self.text(encoder_hidden_states)
        mask = _key_mask(encoder_attention_mask, text, tokens.shape[1])
        x = self._through(torch.cat([time[:, None], text, tokens], dim=1), mask)
        x = self.proj_out(self.norm_out(x[:, 1 + text.shape[1] :]))
        sample = self.conv_out(unpatchify(x, patch, height, width))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _through(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All blocks; what the k-th leaves is the skip into the k-th from the end."""
        skips: list[Tensor] = []
        for depth, block in enumerate(self.blocks):
            skip = skips.pop() if depth > len(self.blocks) // 2 else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, mask, skip)
            else:
                x = block(x, mask, skip)
            if depth < len(self.blocks) // 2:
                skips.append(x)
        return x


def _key_mask(text_mask: Tensor | None, text: Tensor, patches: int) -> Tensor | None:
    """Which tokens may be looked at, `(batch, 1, 1, tokens)`: all but the text's padding."""
    if text_mask is None:
        return None
    padded = functional.pad(text_mask.bool(), (1, 0), value=True)
    return functional.pad(padded, (0, patches), value=True)[:, None, None]
