"""Tiny real experts: copies of one diffusers UNet, each moved a little from the common base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from atoll.core.denoiser import Card, Denoiser, new_network

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
    "norm_num_groups": 2,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
MakeExpert = Callable[..., Path]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def network() -> nn.Module:
    return new_network("unet", CONFIG, seed=0)


@pytest.fixture
def make_expert(tmp_path: Path, network: nn.Module) -> MakeExpert:
    """`make_expert("a", dtype=..., **card)` writes experts/a, its weights seeded by its name."""

    def make(
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        change: Callable[[dict[str, Tensor]], None] | None = None,
        **card: Any,
    ) -> Path:
        fields: dict[str, Any] = {
            "name": name,
            "kind": "expert",
            "shard": f"shard-{name}",
            "base_sha256": "b" * 64,
            "family": "unet",
            "prediction": "velocity",
            "latent_space": "pixels",
            "images_seen": 100,
        }
        moved = new_network("unet", CONFIG, seed=0).to(dtype)
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 2**31)
        state = {
            key: (value.double() + 0.02 * torch.randn(value.shape, generator=generator)).to(dtype)
            for key, value in network.state_dict().items()
        }
        if change is not None:
            change(state)
        moved.load_state_dict(state)
        path = folder or tmp_path / "experts" / name
        Denoiser(moved, Card(**(fields | card))).save(path)
        return path

    return make


def moved(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return network


def pipeline(seed: int) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        sample_size=4, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return DiTPipeline(moved(transformer, seed), moved(vae, seed), DDIMScheduler())


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Callable[..., Path]:
    """`make_pipeline("a", ...)` writes models/a: a transformer, an autoencoder, and a tokenizer."""

    def make(name: str, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
        path = tmp_path / "models" / name
        whole = pipeline(int.from_bytes(name.encode(), "big") % 2**31).to(dtype)
        whole.save_pretrained(path, **saving)
        # What a tokenizer is made of, without the library that reads it.
        words = path / "tokenizer"
        words.mkdir(exist_ok=True)
        (words / "vocab.json").write_text('{"b": 0, "a": 1, "dtype": 2}')
        (words / "merges.txt").write_text("a b\n")
        index = json.loads((path / "model_index.json").read_text())
        index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None]}
        (path / "model_index.json").write_text(json.dumps(index | {"requires": True}))
        return path

    return make
