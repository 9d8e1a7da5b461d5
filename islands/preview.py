"""Preview grids: captions held out of a shard, sampled by its expert from seeded noise.

Captions and noise are the same at every milestone, so that grids show nothing but the training.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from atoll.core import sampler, seeds
from atoll.core.denoiser import Denoiser
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.islands.settings import TrainConfig

_SIDE = 64  # pixels that a picture fills in the grid at least
_USUAL = 4  # milestones
_SHARE = 0.02  # of an expert's computations that previews on the way may cost


def milestones(config: TrainConfig, plan: Plan) -> list[int]:
    """images_seen after which a grid is made, in whole batches; the last is the end."""
    count = config.preview_milestones
    if count is None:
        # In forward passes, of which a training takes three an image.
        grid = max(1, config.preview * config.preview_steps)
        count = min(_USUAL, 1 + int(_SHARE * 3 * plan.images_seen / grid))
    steps = plan.images_seen // plan.batch
    return sorted({max(1, round(steps * n / count)) * plan.batch for n in range(1, count + 1)})


def grid_files(images_seen: int, grid: bytes) -> dict[str, bytes]:
    """A grid under its own name, and as the newest."""
    return {f"preview-{images_seen:012d}.png": grid, "preview.png": grid}


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

    `decode` makes pictures of latents. Nothing is drawn from a generator that anybody else draws
    from.
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
