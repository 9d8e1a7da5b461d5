"""The routing benchmark at its smallest; no figure is looked at but those that are no times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.core import sampler
from atoll.core.manifest import Picture
from atoll.router.chooser import sample_settings
from benchmarks import routing
from benchmarks.turns import Schedule

TINY = routing.Case(
    "dit-tiny", Picture(channels=1, height=8, width=8), torch.device("cpu"), torch.float32,
    batch=5, steps=3,
)  # fmt: skip


def test_its_rows() -> None:
    rows = routing.routings(TINY, Schedule(warm=1, turn=1e-4, pair=1e-4, pairs=1))
    assert [row["name"] for row in rows] == [
        "one expert for all 5", "once", "once, in passes of one expert", "mass:0.9",
        "mass:0.9, in passes of one expert", "one by one",
    ]  # fmt: skip
    assert all(row["value"] > 0 for row in rows)
    # Times alone decide, and a bar for a GPU is none for a processor.
    assert [row["bar"] for row in rows] == [1.1, 1.1, None, 1.1, None, None]


def test_what_a_gpu_would_show_is_said_to_be_unread() -> None:
    rows = routing.unread()
    assert {(row["value"], row["holds"]) for row in rows} == {(None, None)}
    assert [row["bar"] for row in rows] == [1.1, 1.1, 1.1, None, 3.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads rows of a GPU")
def test_what_is_said_to_be_unread_is_what_a_gpu_shows() -> None:
    schedule = Schedule(warm=1, turn=1e-4, pair=1e-4, pairs=1)
    rows = [
        row
        for batch in (routing.BATCH, routing.GPU.batch)
        for row in routing.routings(replace(routing.GPU, batch=batch), schedule)
        if row["bar"] is not None
    ]
    assert {row["name"] for row in routing.unread()} == {row["name"] for row in rows}


@pytest.mark.parametrize("text", ["once", "mass:0.9", "oracle:shard-00"])
def test_its_peers_make_the_same_pictures(text: str) -> None:
    """Or the comparison would be of other work."""
    settings = sample_settings(TINY.batch, routing.SHARDS, routing=text)
    trajectory = TINY.trajectory(settings, trace=True)
    sampler.euler(trajectory, TINY.noise(settings), sampler.times(TINY.steps))
    assert trajectory.trace is not None
    ours = TINY.ours(settings)
    peer = TINY.by_hand(settings, [step.weights for step in trajectory.trace])
    torch.testing.assert_close(peer, ours, rtol=1e-5, atol=1e-5)
    if text == "oracle:shard-00":
        torch.testing.assert_close(TINY.alone(settings), ours, rtol=1e-5, atol=1e-5)


def test_paged_experts_are_measured_in_a_process_of_their_own() -> None:
    rows = routing.memory("dit-tiny", routing.GPU.picture, 2)
    assert [row["unit"] for row in rows] == ["experts", "experts"]
    assert [row["against"].split("; ")[1].split()[0] for row in rows] == ["1", "3"]
