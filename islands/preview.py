"""A preview grid: captions held out of a shard, sampled by its expert from seeded noise."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.denoiser import Denoiser
from atoll.core.pack import Pack
from atoll.islands.settings import TrainConfig

_SIDE = 64  # pixels that a picture fills in the grid at least


@torch.no_grad()
def preview_grid(
    expert: Denoiser,
    pack: Pack,
    config: TrainConfig,
    *,
    seed: int,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> bytes:
    """PNG bytes of a square grid of `config.preview` pictures, without guidance.

    `decode` makes pictures of latents.
    """
    rows = pack.held_out if len(pack.held_out) > 0 else pack.train
    count = config.preview
    picked = torch.tensor([rows[i % len(rows)] for i in range(count)])
    cond = pack.cond(picked)
    shape = pack.card.picture.shape
    x_noise = seeds.normal(seed, "preview", first=0, count=count, shape=shape)
    pictures = sampler.euler(
        lambda x_t, t: expert.velocity(x_t, t, cond), x_noise, sampler.times(config.preview_steps)
    )
    pictures = pictures if decode is None else decode(pictures)
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    columns = math.ceil(math.sqrt(count))
    channels, height, width = pixels.shape[1:]
    canvas = torch.full(
        (channels, math.ceil(count / columns) * height, columns * width), 255, dtype=torch.uint8
    )
    for i, picture in enumerate(pixels):
        y, x = divmod(i, columns)
        canvas[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = picture
    array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).numpy()
    scale = max(1, _SIDE // max(height, width))
    image = Image.fromarray(array)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
