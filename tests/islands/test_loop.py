"""The loop around a loss: resuming, fencing, what is refused, and what is written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest
import torch

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import Failed, Fenced, Interrupted, Refused
from atoll.core.manifest import Plan
from atoll.core.storage import Storage
from atoll.islands.loop import Course, Loop

COURSE = Course(
    plan=Plan(batch=4, images_seen=400),
    learning_rate=1e-2,
    weight_decay=0.01,
    betas=(0.9, 0.99),
    warmup=0.1,
    clip=1.0,
    ema_decay=0.9,
    checkpoints=7,
)


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loss_of(
    network: torch.nn.Module, at: int | None = None, event: Callable[[], object] | None = None
) -> Callable[[int, int], torch.Tensor]:
    """A regression whose batches are functions of images_seen; `event` happens before one."""

    def loss(first: int, count: int) -> torch.Tensor:
        if first == at and event is not None:
            event()
        x = torch.randn(count, 3, generator=torch.Generator().manual_seed(first))
        return (network(x)[:, 0] - x.sum(1)).square().mean()

    return loss


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def straight(storage: Storage, name: str = "straight") -> dict[str, torch.Tensor]:
    network = module()
    Loop(storage, name, network, COURSE, name=name).run(loss_of(network))
    return weights(network)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path) -> Storage:
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path}")


@pytest.mark.parametrize("at", [0, 60, 200, 396])
def test_interrupted_and_resumed_is_bitwise_the_straight_run(storage: Storage, at: int) -> None:
    expected = straight(storage)
    network = module()
    stop = loss_of(network, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if at < 396:
        with pytest.raises(Interrupted):
            Loop(storage, "cut", network, COURSE, name="cut").run(stop)
    else:  # the last step: nothing is left to interrupt
        Loop(storage, "cut", network, COURSE, name="cut").run(stop)
    network = module()
    Loop(storage, "cut", network, COURSE, name="cut").run(loss_of(network))
    for name, value in weights(network).items():
        assert torch.equal(value, expected[name])
    assert storage.read_bytes("cut/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")


def test_an_exception_loses_the_steps_since_the_last_commit_and_no_more(storage: Storage) -> None:
    expected = straight(storage)

    def fail() -> None:
        raise RuntimeError("a cosmic ray")

    network = module()
    with pytest.raises(RuntimeError):
        Loop(storage, "cut", network, COURSE, name="cut").run(loss_of(network, 220, fail))
    latest = Checkpoints(storage, "cut").latest()
    assert latest is not None
    assert 220 - 60 < latest.images_seen < 220  # seven commits over 400 images
    network = module()
    Loop(storage, "cut", network, COURSE, name="cut").run(loss_of(network))
    assert all(torch.equal(value, expected[name]) for name, value in weights(network).items())
    assert storage.read_bytes("cut/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")


def test_the_weights_at_the_end_are_the_average(storage: Storage) -> None:
    averaged = straight(storage)
    latest = Checkpoints(storage, "straight").latest()
    assert latest is not None
    for name, value in averaged.items():
        assert torch.equal(value, latest.tensors[f"average/{name}"])
        assert not torch.equal(value, latest.tensors[f"weights/{name}"])


def test_a_writer_that_was_succeeded_is_fenced(storage: Storage) -> None:
    network = module()
    take_over = loss_of(network, 100, lambda: Checkpoints(storage, "run").claim())
    with pytest.raises(Fenced):
        Loop(storage, "run", network, COURSE, name="run").run(take_over)
    commits = storage.list("run/commits")
    assert commits
    assert all(name.startswith("run/commits/000001-") for name in commits)
    network = module()
    Loop(storage, "run", network, COURSE, name="run").run(loss_of(network))
    assert all(torch.equal(v, straight(storage)[n]) for n, v in weights(network).items())


def test_a_loss_that_is_not_finite_stops_before_the_update(storage: Storage) -> None:
    network = module()

    def poison(first: int, count: int) -> torch.Tensor:
        value = loss_of(network)(first, count)
        return value * float("nan") if first == 200 else value

    with pytest.raises(Failed, match="after 200 images"):
        Loop(storage, "run", network, COURSE, name="run").run(poison)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    latest = Checkpoints(storage, "run").latest()
    assert latest is not None
    assert latest.images_seen < 200


def test_resuming_otherwise_is_refused(storage: Storage) -> None:
    straight(storage)
    network = module()
    other = Course(**{**vars(COURSE), "plan": Plan(batch=8, images_seen=400)})
    with pytest.raises(Refused, match="made otherwise"):
        Loop(storage, "straight", network, other, name="straight").run(loss_of(network))


def test_resuming_under_other_versions_needs_leave_and_is_journalled(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise RuntimeError

    network = module()
    with pytest.raises(RuntimeError):
        Loop(storage, "run", network, COURSE, name="run").run(loss_of(network, 200, die))
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(Refused, match="--allow-inexact-resume"):
        Loop(storage, "run", module(), COURSE, name="run").run(loss_of(network))
    leave = Course(**{**vars(COURSE), "bitwise_resume": False})
    elsewhere = Course(**{**vars(leave), "plan": Plan(batch=8, images_seen=400)})
    with pytest.raises(Refused, match="made otherwise"):  # another plan is another training
        Loop(storage, "run", module(), elsewhere, name="run").run(loss_of(network))
    network = module()
    Loop(storage, "run", network, leave, name="run").run(loss_of(network))
    lines = [json.loads(x) for x in storage.read_bytes("run/journal.jsonl").splitlines()]
    resumed, trained = lines
    assert (resumed["event"], resumed["bitwise"]) == ("resumed", False)
    assert resumed["is"]["torch"] == "9.9" != resumed["was"]["torch"]
    assert resumed["images_seen"] == trained["from_images_seen"] > 0
    # The version is only said to be another one: the result is the same all the same.
    expected = straight(storage)
    assert all(torch.equal(value, expected[name]) for name, value in weights(network).items())


def test_metrics_have_no_clock_and_the_journal_has(storage: Storage) -> None:
    straight(storage)
    lines = [json.loads(x) for x in storage.read_bytes("straight/metrics.jsonl").splitlines()]
    assert lines[-1]["images_seen"] == 400
    assert all(set(line) == {"images_seen", "loss", "gradient_norm"} for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] / 5
    beat = storage.read_json("straight/heartbeat.json")
    assert (beat["images_seen"], beat["of"], beat["generation"]) == (400, 400, 1)
    journal = json.loads(storage.read_bytes("straight/journal.jsonl").splitlines()[-1])
    assert journal["event"] == "trained"
    assert journal["images_per_second"] > 0
