"""Latents: scaled as diffusers' configuration says, told apart by what encodes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from atoll.core.errors import ConfigError, MissingError, Refused, UsageError
from atoll.core.latents import Autoencoder, autoencoder_beside, load_autoencoder
from atoll.core.manifest import PIXELS, Picture


def network(seed: int = 0, **changes: object) -> AutoencoderKL:
    """Random weights; two levels, so that a latent stands for 2x2 pixels."""
    config = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2, "scaling_factor": 0.7, "shift_factor": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**config | changes).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, 3, 8, 12), dtype=torch.uint8, generator=draw)


def test_encoding_is_diffusers_mean_shifted_and_scaled(pixels: Tensor) -> None:
    kl = network()
    x_data = Autoencoder(kl).encode(pixels)
    assert x_data.dtype == torch.float16
    assert Autoencoder(kl).latents_of(Picture(channels=3, height=8, width=12)).shape == (4, 4, 6)
    with torch.no_grad():
        mean = kl.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    assert torch.equal(x_data, ((mean - 0.2) * 0.7).half())
    plain = Autoencoder(network(shift_factor=None)).encode(pixels)
    assert torch.equal(plain, (mean * 0.7).half())


def test_decoding_undoes_the_scaling(pixels: Tensor) -> None:
    """Up to float16, what comes out is the autoencoder's own round trip."""
    kl = network()
    autoencoder = Autoencoder(kl)
    made = autoencoder.decode(autoencoder.encode(pixels))
    with torch.no_grad():
        theirs = kl.decode(kl.encode(pixels.float() / 127.5 - 1).latent_dist.mean).sample
    assert made.dtype == torch.float32
    assert torch.allclose(made, theirs, atol=5e-3)


def test_a_fitted_factor_gives_unit_variance(pixels: Tensor) -> None:
    raw = Autoencoder(network(scaling_factor=1.0, shift_factor=0.0)).encode(pixels).float()
    fitted = {"scaling_factor": 1 / float(raw.std()), "shift_factor": float(raw.mean())}
    x_data = Autoencoder(network(**fitted)).encode(pixels).float()
    assert float(x_data.mean()) == pytest.approx(0, abs=1e-3)
    assert float(x_data.std()) == pytest.approx(1, abs=1e-3)


def test_parts_of_a_large_batch_are_those_of_small_ones(pixels: Tensor, monkeypatch) -> None:
    autoencoder = Autoencoder(network())
    whole = autoencoder.encode(pixels)
    monkeypatch.setattr("atoll.core.latents._PIXELS_AT_ONCE", 2 * 8 * 12)
    assert torch.allclose(autoencoder.encode(pixels), whole, atol=2e-3)
    assert torch.allclose(autoencoder.decode(whole)[2:4], autoencoder.decode(whole[2:4]))


def test_a_saved_one_is_the_same_space_wherever_it_lies(tmp_path: Path, pixels: Tensor) -> None:
    first = Autoencoder(network())
    first.save(tmp_path / "a")
    again = load_autoencoder(tmp_path / "a", latent_space=first.latent_space)
    again.save(tmp_path / "pipeline" / "vae")
    inside = load_autoencoder(tmp_path / "pipeline")
    assert inside.latent_space == first.latent_space
    assert torch.equal(inside.encode(pixels), first.encode(pixels))
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        a, b = (tmp_path / "a" / name, tmp_path / "pipeline" / "vae" / name)
        assert a.read_bytes() == b.read_bytes()
    others = {Autoencoder(other).latent_space for other in (network(1), network(scaling_factor=1))}
    assert len({*others, first.latent_space}) == 3
    with pytest.raises(Refused, match="use the autoencoder of the model's own run"):
        load_autoencoder(tmp_path / "a", latent_space="autoencoder-kl:0")


def test_beside_a_model(tmp_path: Path) -> None:
    kl = Autoencoder(network())
    assert autoencoder_beside(tmp_path, PIXELS) is None
    with pytest.raises(MissingError, match="has no vae/"):
        autoencoder_beside(tmp_path, kl.latent_space)
    kl.save(tmp_path / "vae")
    assert autoencoder_beside(tmp_path, kl.latent_space) is not None


def test_pictures_that_do_not_fit_are_refused() -> None:
    kl = Autoencoder(network())
    with pytest.raises(ConfigError, match="--set channels=3"):
        kl.latents_of(Picture(channels=1, height=8, width=8))
    with pytest.raises(ConfigError, match="multiple of 2"):
        kl.latents_of(Picture(channels=3, height=9, width=8))


def test_what_is_no_autoencoder_of_ours_is_refused(tmp_path: Path, pixels: Tensor) -> None:
    with pytest.raises(UsageError, match="no autoencoder at"):
        load_autoencoder(tmp_path / "nothing")
    folder = tmp_path / "a"
    Autoencoder(network()).save(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, error in (
        ({"_class_name": "AutoencoderTiny"}, Refused),
        ({"latents_mean": [0.0] * 4}, Refused),
        ({"block_out_channels": "x"}, MissingError),
        ({"block_out_channels": [4, 8, 8]}, MissingError),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error):
            load_autoencoder(folder)
    with pytest.raises(Refused, match="not finite"):
        Autoencoder(network(scaling_factor=1e9)).encode(pixels)
