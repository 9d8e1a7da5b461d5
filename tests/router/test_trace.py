"""A trace as JSON and as a picture, whatever the prompts are."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from atoll.core import sampler, seeds
from atoll.router.ensemble import TraceStep
from atoll.router.trace import preview_png, strip_png, trace_json

HOSTILE = [
    "$math$", "$\\frac{", "<b>bold</b> &amp;", "", " ", "日本語 🦊", "\u202egnp.exe", "a\nb\r\tc",
    "\x00\x1b[31m", "\ud800", "long " * 2000, "%s {0} {", "\\",
]  # fmt: skip


def steps(pictures: int, shards: int, count: int = 3) -> list[TraceStep]:
    def weights(step: int) -> torch.Tensor:
        drawn = seeds.uniform(step, "w", first=0, count=pictures, each=shards).float()
        return drawn / drawn.sum(dim=1, keepdim=True)

    x_data = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8).repeat(pictures, 1, 1, 1)
    return [TraceStep(1 - s / count, *[weights(s)] * 4, pictures, x_data) for s in range(count)]


def as_it_is(x_data: torch.Tensor) -> torch.Tensor:
    return x_data


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


@pytest.mark.parametrize("routing", ["top-k:2", "once", "oracle:s1"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_json_round_trip(make_world: Callable[..., Any], guidance: float, routing: str) -> None:
    world = make_world(1)
    if routing.startswith("oracle"):
        routing = f"oracle:{world.names[1]}"
    trajectory = world.trajectory(routing, [1, 2, 0], trace=True, guidance=guidance)
    noise = seeds.normal(0, "x_noise", first=0, count=3, shape=(2,)).double()
    sampler.euler(trajectory, noise, sampler.times(4).double())
    text = json.dumps(trace_json(trajectory.trace, world.names, list("abcd")), allow_nan=False)
    read = json.loads(text)
    assert read["schema_version"] == 1
    assert read["shards"] == world.names
    assert [step["t"] for step in read["steps"]] == [1.0, 0.75, 0.5, 0.25]
    for told, step in zip(read["steps"], trajectory.trace, strict=True):
        for name in ("gate_weights", "weights"):
            found = torch.tensor(told[name], dtype=torch.float64)
            torch.testing.assert_close(found, getattr(step, name), rtol=0, atol=1e-6)
            assert torch.allclose(found.sum(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-5)
        for name in ("null_gate_weights", "null_weights"):
            found = torch.tensor(told[name], dtype=torch.float64)
            torch.testing.assert_close(found, getattr(step, name), rtol=0, atol=1e-6)
            # Without guidance there is no such branch.
            total = torch.full((3,), float(guidance != 1), dtype=torch.float64)
            assert torch.allclose(found.sum(dim=1), total, atol=1e-5)
        assert told["experts_run"] == step.experts_run
    assert [step["x_data"] for step in read["steps"]] == list("abcd")


def test_no_trace_is_kept_unless_asked_for(make_world: Callable[..., Any]) -> None:
    trajectory = make_world(1).trajectory("full", [0])
    trajectory(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert trajectory.trace is None


@pytest.mark.parametrize("prompt_text", HOSTILE, ids=[f"{p[:12]!a}" for p in HOSTILE])
def test_a_strip_for_any_prompt(prompt_text: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it draws a box
        warnings.filterwarnings("error", message=".*constrained_layout.*")  # it draws nothing
        image = opened(strip_png(steps(2, 3), ["a", "b", "c"], [prompt_text, "plain"], as_it_is))
    plain = opened(strip_png(steps(2, 3), ["a", "b", "c"], ["other", "plain"], as_it_is))
    assert image.size == plain.size


def test_a_shard_may_be_called_anything() -> None:
    names = ["$x$", "$\\frac{", "<i>"]
    assert opened(strip_png(steps(1, 3), names, ["a prompt"], as_it_is)).size[0] > 0


def test_many_pictures_are_cut() -> None:
    few = opened(strip_png(steps(40, 2), ["a", "b"], ["p"] * 40, as_it_is, most=3))
    assert few.size == opened(strip_png(steps(3, 2), ["a", "b"], ["p"] * 3, as_it_is)).size


def test_one_shard_one_picture_one_step() -> None:
    assert opened(strip_png(steps(1, 1, count=1), ["only"], ["p"], as_it_is)).size[0] > 0


def test_a_preview_is_the_whole_batch_in_a_row() -> None:
    (step,) = steps(3, 2, count=1)
    row = np.asarray(opened(preview_png(step, as_it_is)))
    assert row.shape == (8, 24, 3)
    expected = ((step.x_data[0] + 1) * 127.5).round().numpy()
    for number in range(3):
        assert np.array_equal(np.moveaxis(row[:, 8 * number : 8 * number + 8], -1, 0), expected)
