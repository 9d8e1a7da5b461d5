"""Buckets: the few shapes that pictures are fitted to, and which of them a picture is given.

Aspect-ratio bucketing as SDXL was trained (Podell et al. 2023, arXiv 2307.01952, section 2.3 and
appendix I): shapes of about one area, and every picture goes to that of the nearest ratio, is
resized to cover it and cropped in the middle. Which one depends on the record alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from atoll.core.errors import ConfigError
from atoll.core.manifest import Size, parse_size

_STEP = 8  # positions of a training tensor: what the deepest of the recipes divides by
_LARGEST_RATIO = 2


def ladder(count: int, side: int, *, factor: int = 1) -> list[Size]:
    """`count` shapes of about `side`^2 pixels from 1:2 to 2:1, the square first.

    Sides are multiples of 8 positions of the training tensor, each of `factor` pixels. Lying and
    standing shapes come in pairs. Raises `ConfigError` for other numbers than there are.
    """
    step = _STEP * factor
    if side % step:
        raise ConfigError(
            f"buckets={count} makes shapes in steps of {step} pixels, and size={side} is none",
            cure=f"--set size=N with a multiple of {step}, or list shapes: "
            "--set 'buckets=[\"HxW\", ...]'",
        )
    pairs = _oblongs(side, step)
    if count % 2 == 0 or count > 1 + 2 * len(pairs):
        raise ConfigError(
            f"buckets={count} is not a number of shapes that there are for size={side}",
            allowed=", ".join(str(1 + 2 * n) for n in range(len(pairs) + 1))
            + ": the square, and pairs of a lying and a standing shape",
            cure="choose one of them, or list shapes: --set 'buckets=[\"HxW\", ...]'",
        )
    wanted = count // 2
    sizes, left = [(side, side)], pairs
    for number in range(1, wanted + 1):
        # The ratios from 1:2 to 2:1 in `count` equal parts by their logarithm; this is a middle.
        middle, spare = 2 * number / count, wanted - number
        at = min(
            range(len(left) - spare), key=lambda i: abs(math.log2(left[i][1] / left[i][0]) - middle)
        )
        (height, width), left = left[at], left[at + 1 :]
        sizes += [(height, width), (width, height)]
    return sizes


def _oblongs(side: int, step: int) -> list[Size]:
    """Lying shapes of multiples of `step`, up to 2:1, of most nearly the square's area."""
    found = []
    for width in range(side + step, _LARGEST_RATIO * side, step):
        height = step * max(1, round(side * side / (width * step)))
        if height < width <= _LARGEST_RATIO * height:
            found.append((height, width))
    return found


def sizes_of(buckets: int | Sequence[str] | None, side: int, *, factor: int = 1) -> list[Size]:
    """The shapes that the setting `buckets` asks for; without one the square of `side`.

    Raises `ConfigError` where they are no shapes of an autoencoder that divides by `factor`.
    """
    if buckets is None:
        return [(side, side)]
    if isinstance(buckets, int):
        return ladder(buckets, side, factor=factor)
    if odd := [text for text in buckets if any(length % factor for length in parse_size(text))]:
        raise ConfigError(
            f"The autoencoder divides pictures by {factor}, buckets has {', '.join(odd)}",
            cure=f"list shapes whose sides are multiples of {factor}",
        )
    return [parse_size(text) for text in buckets]


def nearest(picture: Size, sizes: Sequence[Size]) -> int:
    """Which size has the nearest ratio by its logarithm; the first of several."""

    def apart(size: Size) -> Fraction:
        ratio = Fraction(picture[0] * size[1], picture[1] * size[0])
        return max(ratio, 1 / ratio)  # exp |log ratio|, exactly

    return min(range(len(sizes)), key=lambda index: apart(sizes[index]))
