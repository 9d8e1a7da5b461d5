"""Strangers' image bytes -> RGB pictures and training pixels, or a reason why not.

Bombs, truncated files and formats beyond the plain ones are refused; CMYK, palettes, alpha (on
white), 16 bits and animations (first frame) are converted. Reasons are fixed sentences: they are
written into the run, where nothing may depend on the machine.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from atoll.core.manifest import Size

# Formats that decode in this process; Pillow would hand others (EPS) to programs outside.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it warns; here it is an error


class UnreadableImage(ValueError):
    """Bytes that are not a usable picture; the message is the reason."""


def decode(data: bytes) -> Image.Image:
    """The picture as RGB, upright, transparent parts white; `UnreadableImage` says why not."""
    if not data:
        raise UnreadableImage("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are measured below; the rest is EXIF gossip
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"more than {MAX_PIXELS} pixels")
                return _as_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not a picture in one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders of arbitrary bytes raise anything from OSError upwards
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        reason = "truncated" if truncated else f"damaged ({type(error).__name__})"
        raise UnreadableImage(reason) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating-point samples")
    if image.mode.startswith("I"):
        # 16-bit samples; Pillow's own conversion clips them at 255, which is white nearly always.
        samples = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(samples.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def is_gray(image: Image.Image) -> bool:
    """Whether the three channels of an RGB picture are one."""
    values = np.asarray(image)
    return bool((values == values[:, :, :1]).all())


def training_pixels(image: Image.Image, size: Size, channels: int) -> Tensor:
    """uint8 `(channels, height, width)`: the centre, resampled unless it fits already.

    As much of the picture is kept as fills the size.
    """
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    values = np.array(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return torch.from_numpy(values.reshape(height, width, channels)).permute(2, 0, 1).contiguous()
