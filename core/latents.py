"""Latents: pictures in the smaller space of an autoencoder, scaled as its configuration says.

x_data = (z - shift_factor) * scaling_factor, of about unit variance (Rombach et al. 2022, arXiv
2112.10752, section D.1; Esser et al. 2024, arXiv 2403.03206, shift it besides). z is the mean of
the encoder's posterior and not a draw from it: the posterior of such autoencoders is narrow beside
the float16 it is stored in, one stored draw would be noise that a network learns by heart, and a
mean needs no seed.

Reads a folder of diffusers' `AutoencoderKL`, a pipeline's folder that has one as `vae/`, or a
repository of the Hugging Face hub; saves a component folder that diffusers loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.core.digest import canonical_json
from atoll.core.errors import ConfigError, MissingError, Refused, UsageError
from atoll.core.fingerprint import fingerprint
from atoll.core.manifest import PIXELS, Picture
from atoll.core.starts import HUB, downloaded

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_CLASS = "AutoencoderKL"
_WANTED = [
    f"{prefix}{name}"
    for prefix in ("", "vae/")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
]
# What changes a latent or its picture, besides the weights and their shapes.
_SETTINGS = ("scaling_factor", "shift_factor", "act_fn", "norm_num_groups")
_PIXELS_AT_ONCE = 8 * 256 * 256


class Autoencoder:
    """An `AutoencoderKL` that turns uint8 pictures into x_data and x_data into pictures."""

    def __init__(self, network: AutoencoderKL) -> None:
        self.network = network.eval()
        self._config: Any = network.config

    @property
    def latent_space(self) -> str:
        """A name of the space: two autoencoders with one name are the same."""
        settings = {name: self._config[name] for name in _SETTINGS}
        return f"autoencoder-kl:{fingerprint(settings, self.network)}"

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side."""
        return int(2 ** (len(self._config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self._config.in_channels)

    def latents_of(self, picture: Picture) -> Picture:
        """The shape of a picture's latents; `ConfigError` for pictures that do not fit."""
        size = f"{picture.channels} channels, {picture.height}x{picture.width}"
        if picture.channels != self.channels:
            raise ConfigError(
                f"The autoencoder is for pictures of {self.channels} channels, these have {size}",
                cure=f"--set channels={self.channels}",
            )
        if picture.height % self.factor or picture.width % self.factor:
            raise ConfigError(
                f"The autoencoder divides pictures by {self.factor}, these have {size}",
                cure=f"--set size=N with a multiple of {self.factor}",
            )
        return Picture(
            channels=int(self._config.latent_channels),
            height=picture.height // self.factor,
            width=picture.width // self.factor,
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """x_data float16 `(n, channel, height, width)` of uint8 pictures, some at a time."""
        parts = []
        for part in torch.split(pixels, max(1, _PIXELS_AT_ONCE // pixels[0, 0].numel())):
            mean = self.network.encode(self._fed(part.float() / 127.5 - 1)).latent_dist.mean
            parts.append(((mean.float() - self._shift) * self._scale).half().cpu())
        x_data = torch.cat(parts)
        if not bool(x_data.isfinite().all()):
            raise Refused(
                "The autoencoder gives latents that are not finite, or too large for float16",
                cure="choose one that was saved in float32, such as a repaired one of SDXL",
            )
        return x_data

    @torch.no_grad()
    def decode(self, x_data: Tensor) -> Tensor:
        """Pictures in about [-1, 1], float32 `(n, channel, height, width)`, where x_data was."""
        pixels = x_data[0, 0].numel() * self.factor**2
        parts = []
        for part in torch.split(x_data, max(1, _PIXELS_AT_ONCE // pixels)):
            z = part.float() / self._scale + self._shift
            parts.append(self.network.decode(self._fed(z)).sample.to(part.device).float())
        return torch.cat(parts)

    @property
    def _scale(self) -> float:
        return float(self._config.scaling_factor)

    @property
    def _shift(self) -> float:
        return float(self._config.shift_factor or 0.0)

    def _fed(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.network.parameters()))

    def save(self, folder: Path) -> None:
        """Write a component folder that diffusers loads too; no path of this machine is in it."""
        self.network.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)
        (folder / "config.json").write_bytes(canonical_json(config))


def load_autoencoder(spec: str | Path, *, latent_space: str | None = None) -> Autoencoder:
    """The autoencoder at a folder or `hf-hub:ORG/NAME`, and of that latent space if one is named.

    Raises `UsageError` where nothing is, `MissingError` for weights out of reach, and `Refused` for
    another class, or another autoencoder than the named one.
    """
    root = downloaded(str(spec), _WANTED) if str(spec).startswith(HUB) else Path(spec)
    folder = root / "vae" if (root / "vae" / "config.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"There is no autoencoder at {spec}",
            allowed=f"the folder of an {_CLASS}, of a pipeline that has one, or {HUB}ORG/NAME",
        )
    from diffusers import AutoencoderKL  # takes seconds, and most runs have no autoencoder

    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("_class_name") != _CLASS:
            raise Refused(f"{folder} holds a {config.get('_class_name')}", allowed=_CLASS)
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise Refused(
                f"{folder} scales every channel of its own (latents_mean, latents_std)",
                allowed="scaling_factor and shift_factor",
            )
        network, found = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise MissingError(f"The autoencoder in {folder} cannot be loaded: {error}") from error
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise Refused(f"The weights in {folder} are not those of its config.json: {found}")
    loaded = Autoencoder(network)
    if latent_space is not None and loaded.latent_space != latent_space:
        raise Refused(
            f"The autoencoder in {folder} is {loaded.latent_space}, the model works in "
            f"{latent_space}",
            cure="use the autoencoder of the model's own run",
        )
    return loaded


def autoencoder_beside(folder: Path, latent_space: str) -> Autoencoder | None:
    """The autoencoder in `folder/vae` that a latent space needs; None where it is pixels."""
    if latent_space == PIXELS:
        return None
    if not (folder / "vae").is_dir():
        raise MissingError(
            f"This model works in {latent_space}, and {folder} has no vae/ to decode with",
            cure="restore the folder, or give --encoder RUN/encoder, beside which RUN has its vae/",
        )
    return load_autoencoder(folder / "vae", latent_space=latent_space)
