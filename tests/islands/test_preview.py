"""Previews: where on the way, at what cost, and without a trace."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from atoll.core.denoiser import Denoiser
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.islands.preview import milestones, preview_grid
from atoll.islands.settings import TrainConfig


@pytest.mark.parametrize(
    ("settings", "images_seen", "expected"),
    [
        ({"preview_milestones": 1}, 6400, [6400]),
        ({"preview_milestones": 4}, 6400, [1600, 3200, 4800, 6400]),
        ({"preview_milestones": 3}, 6400, [2112, 4288, 6400]),  # whole batches of 64
        ({"preview_milestones": 9}, 128, [64, 128]),
        # 16 pictures in 20 steps are 320 forward passes, 2% of 5333 images' training.
        ({}, 5312, [5312]),
        ({}, 5376, [2688, 5376]),
        ({}, 64_000, [16_000, 32_000, 48_000, 64_000]),
        ({"preview": 4, "preview_steps": 2}, 640, [128, 320, 512, 640]),
    ],
)
def test_milestones_are_equal_shares_at_a_small_cost(
    settings: dict[str, int], images_seen: int, expected: list[int]
) -> None:
    plan = Plan(batch=64, images_seen=images_seen)
    assert milestones(TrainConfig(**settings), plan) == expected


def test_a_grid_draws_from_nobody_s_generator_and_is_the_same_again(made: Path) -> None:
    expert, pack = Denoiser.load(made / "base"), Pack(made / "shards" / "shard-00")
    config = TrainConfig(preview=5, preview_steps=2)
    before = torch.random.get_rng_state()
    grid = preview_grid(expert, pack, config, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert preview_grid(expert, pack, config, seed=0) == grid
    assert Image.open(io.BytesIO(grid)).size == (3 * 64, 2 * 64)
