"""Pictures to features, in two spaces: the run's own encoder, and plain pixels without any weights.

A distance between sets of pictures is a statement about a feature space, and the two famous ones
disagree often enough that one alone is no evidence. Every picture first becomes uint8, as a file
would hold it, so that generated and real ones differ in nothing but what they show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from atoll.core.errors import Failed

ENCODER = "encoder"
PIXELS = "pixels"


class EmbedsImages(Protocol):
    """The part of `core.embedding.Encoder` that is needed here."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors `(n, dim)`."""


@dataclass(frozen=True)
class Space:
    """A feature space: its name, what it is in words, and the map from uint8 pictures."""

    name: str
    about: str
    features: Callable[[Tensor], Tensor]


def spaces(encoder: EmbedsImages) -> tuple[Space, ...]:
    """The spaces that every evaluation reports."""
    return (
        Space(
            ENCODER,
            "image embeddings of the run's own encoder, scaled to a mean square of 1",
            lambda pictures: embed(encoder, pictures),
        ),
        Space(PIXELS, "raw pixels at training size in [-1, 1], no weights", pixels),
    )


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures `(n, channel, height, width)` as uint8; floats are x_data in [-1, 1] and clamped.

    Raises `Failed` for pictures that are not finite: a sampler that diverged is not a bad score.
    """
    if pictures.dtype == torch.uint8:
        return pictures.cpu()
    if not bool(pictures.isfinite().all()):
        raise Failed(
            "A system produced pictures that are not finite",
            cure="train it longer or with a smaller learning rate; nothing was measured",
        )
    return (pictures.detach().cpu().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """One Pillow image for each of `(n, channel, height, width)`; 1 channel is L, 3 are RGB."""
    rows = to_uint8(pictures).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def embed(encoder: EmbedsImages, pictures: Tensor) -> Tensor:
    """Embeddings `(n, dim)`, float64, scaled to length sqrt(dim).

    The polynomial kernel of KID divides by dim because Inception's coordinates are of order one;
    unit vectors would leave it nearly linear and blind to everything but the mean.
    """
    unit = encoder.embed_images(to_images(pictures)).double()
    return unit * math.sqrt(unit.shape[1])


def pixels(pictures: Tensor) -> Tensor:
    """Pixels in [-1, 1], float64 `(n, channel * height * width)`."""
    return (to_uint8(pictures).double() / 127.5 - 1).flatten(1)
