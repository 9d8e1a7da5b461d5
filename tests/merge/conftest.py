"""Tiny real experts: copies of one diffusers UNet, each moved a little from the common base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
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
