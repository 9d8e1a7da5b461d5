"""What our own transformers are made of: patches, positions, times, attention and feed-forward.

Pictures need not be square: positions are computed for the grid that arrives, so that no size is
built into the weights.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

_FREQUENCIES = 256  # of the time embedding, as in DiT and SD3


def patchify(x: Tensor, patch: int) -> Tensor:
    """`(batch, channel, height, width)` as tokens `(batch, rows * columns, channel * patch**2)`.

    Raises `ValueError` for sides that are no multiple of the patch.
    """
    batch, channels, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(
            f"Pictures of {height}x{width} do not divide into patches of {patch}; "
            f"allowed: multiples of {patch}; choose another picture size or recipe"
        )
    grid = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify` for pictures of `height` and `width`."""
    batch, rows, columns = len(tokens), height // patch, width // patch
    grid = tokens.reshape(batch, rows, columns, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column `(rows * columns, width)`, row-major, float32.

    Half of the width tells the row, half the column (Vaswani et al. 2017, arXiv 1706.03762,
    section 3.5, on each axis); `width` is a multiple of 4.
    """
    quarter = width // 4
    step = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    frequency = torch.exp(-math.log(10_000.0) * step)

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    down = axis(rows)[:, None].expand(rows, columns, -1)
    across = axis(columns)[None].expand(rows, columns, -1)
    return torch.cat([down, across], dim=2).reshape(rows * columns, width)


def embed_patches(layer: nn.Linear, pictures: Tensor, patch: int) -> Tensor:
    """Pictures `(batch, channel, height, width)` as tokens `(batch, rows * columns, width)`.

    `layer` takes a patch to a token, to which its position is added. Raises as `patchify` does.
    """
    height, width = pictures.shape[2:]
    tokens: Tensor = layer(patchify(pictures, patch))
    place = positions(height // patch, width // patch, tokens.shape[2], tokens.device)
    return tokens + place.to(tokens)


class TimeEmbedding(nn.Module):
    """Timesteps `(batch,)` from 0 to 1000 as vectors `(batch, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = TimestepEmbedding(in_channels=_FREQUENCIES, time_embed_dim=width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        # In float32 until here: bfloat16 has not the digits for a thousand times.
        waves = get_timestep_embedding(
            timestep, _FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        embedded: Tensor = self.mlp(waves.to(dtype))
        return embedded


class Attention(nn.Module):
    """Self-attention of tokens `(batch, tokens, width)`.

    `mask` `(batch, 1, 1, tokens)` is True where a token may be looked at. `qk_norm` normalises
    queries and keys: attention logits of large networks grow otherwise (Dehghani et al. 2023,
    arXiv 2302.05442, section 2; SD3, arXiv 2403.03206, section 5.3.2).
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        # Named as in diffusers, so that one pattern finds the projections of every family.
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(projected: Tensor) -> Tensor:
            batch, tokens, _ = projected.shape
            return projected.reshape(batch, tokens, self.heads, -1).transpose(1, 2)

        query = self.norm_q(split(self.to_q(x)))
        key = self.norm_k(split(self.to_k(x)))
        mixed = functional.scaled_dot_product_attention(
            query, key, split(self.to_v(x)), attn_mask=mask
        )
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


def feed_forward(width: int) -> nn.Sequential:
    """The block's second half: four times as wide inside."""
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


def zero(*layers: nn.Module) -> None:
    """Let layers begin by saying nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
