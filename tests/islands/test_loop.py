"""The loop around a loss: resuming, fencing, what is refused, and what is written."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core.checkpoint import Checkpoints
from atoll.core.disk import fsync
from atoll.core.errors import ConfigError, Failed, Fenced, Interrupted, Refused
from atoll.core.manifest import Plan
from atoll.core.storage import Storage
from atoll.islands.course import Course
from atoll.islands.loop import Loop, Milestones
from atoll.islands.settings import GuardConfig
from atoll.islands.state import NotBitwise
from atoll.islands.step import Errors, Loss

COURSE = Course(
    plan=Plan(batch=4, images_seen=400),
    learning_rate=1e-2,
    weight_decay=0.01,
    betas=(0.9, 0.99),
    warmup=0.1,
    clip=1.0,
    ema_decays=(0.9,),
    checkpoints=7,
)


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loss_of(
    network: torch.nn.Module, at: int | None = None, event: Callable[[], object] | None = None
) -> Callable[[int, int], Errors]:
    """A regression whose batches are functions of images_seen; `event` happens before one."""

    def loss(first: int, count: int) -> Errors:
        if first == at and event is not None:
            event()
        x = torch.cat([torch.randn(1, 3, generator=_seeded(first + i)) for i in range(count)])
        each = (network(x)[:, 0] - x.sum(1)).square()
        return Errors(each.mean(), each.detach(), torch.linspace(0.01, 0.99, count))

    return loss


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        assert torch.equal(value, latest.tensors[f"average-0/{name}"])
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


def test_a_writer_that_is_succeeded_while_the_disk_takes_its_metrics_leaves_its_heir_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is frozen there; that its heir is through by then, its last file says."""
    run, heirs = Storage(tmp_path), b"all that the heir has to say\n"
    metrics = tmp_path / "run/metrics.jsonl"
    plain, taken = fsync, []

    def slow(path: Path) -> None:
        plain(path)
        if "metrics" in path.name and metrics.exists() and not taken:
            taken.append(path)
            Checkpoints(run, "run").claim()
            metrics.write_bytes(heirs)

    monkeypatch.setattr("atoll.core.storage.fsync", slow)
    network = module()
    with pytest.raises(Fenced):
        Loop(run, "run", network, COURSE, name="run").run(loss_of(network))
    assert taken
    assert metrics.read_bytes() == heirs


def poisoned(network: torch.nn.Module, *at: int, value: float = float("nan")) -> Loss:
    """The regression with batches that must not reach the weights."""

    def loss(first: int, count: int) -> Errors:
        errors = loss_of(network)(first, count)
        return replace(errors, loss=errors.loss * value) if first in at else errors

    return loss


def skipping(storage: Storage, name: str, *ranges: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What a training comes to that passes over these images without learning from them."""
    network = module()
    loop = Loop(storage, name, network, COURSE, name=name)
    for first, end in ranges:
        loop._state.guard._skipped.append({"first": first, "end": end, "commit": -1})
    loop.run(loss_of(network))
    return weights(network)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_poisoned_batch_is_gone_back_from_and_skipped(storage: Storage, value: float) -> None:
    expected = skipping(storage, "straight", (200, 204))
    network = module()
    Loop(storage, "run", network, COURSE, name="run").run(poisoned(network, 200, value=value))
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())
    assert storage.read_bytes("run/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")
    lines = [json.loads(x) for x in storage.read_bytes("run/journal.jsonl").splitlines()]
    assert [line["event"] for line in lines] == ["skipped", "trained"]
    assert (lines[0]["first"], lines[0]["end"]) == (200, 204)
    latest = Checkpoints(storage, "run").latest()
    assert latest is not None
    assert latest.facts["guard"]["skipped"] == [{"first": 200, "end": 204, "commit": 168}]


def test_what_is_to_be_skipped_outlives_a_kill(storage: Storage) -> None:
    expected = skipping(storage, "straight", (200, 204))

    def die() -> None:
        raise RuntimeError

    network = module()

    def loss(first: int, count: int) -> Errors:
        if first == 280:  # the next commit is behind it, and knows
            die()
        return poisoned(network, 200)(first, count)

    with pytest.raises(RuntimeError):
        Loop(storage, "run", network, COURSE, name="run").run(loss)
    network = module()
    # Not poisoned any more: what was decided before stands.
    Loop(storage, "run", network, COURSE, name="run").run(loss_of(network))
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())


def test_a_second_refusal_skips_more_before_it_and_then_the_training_gives_up(
    storage: Storage,
) -> None:
    network = module()
    generous = replace(COURSE, guard=GuardConfig(attempts=3, share=1))
    Loop(storage, "run", network, generous, name="run").run(poisoned(network, 180, 192))
    lines = [json.loads(x) for x in storage.read_bytes("run/journal.jsonl").splitlines()]
    skipped = [(line["first"], line["end"]) for line in lines if line["event"] == "skipped"]
    assert skipped == [(180, 184), (188, 196)]

    network = module()
    with pytest.raises(Failed, match=r"3 attempts from 168 on") as caught:
        Loop(storage, "bad", network, generous, name="bad").run(
            poisoned(network, *range(180, 400, 4))
        )
    assert "learning_rate" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    sparing = replace(COURSE, guard=GuardConfig(attempts=100, share=0.02))
    network = module()
    with pytest.raises(Failed, match="would be skipped"):
        Loop(storage, "much", network, sparing, name="much").run(
            poisoned(network, 100, 200, 300, 340)
        )


def test_without_a_spike_guard_only_what_is_not_finite_is_refused(storage: Storage) -> None:
    network = module()
    course = replace(COURSE, guard=GuardConfig(spike=None))
    Loop(storage, "run", network, course, name="run").run(poisoned(network, 200, value=1e6))
    lines = [json.loads(x) for x in storage.read_bytes("run/journal.jsonl").splitlines()]
    assert [line["event"] for line in lines] == ["trained"]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_batch_in_parts_is_the_batch(storage: Storage, accumulation: int) -> None:
    expected = straight(storage)
    network = module()
    course = replace(COURSE, accumulation=accumulation)
    Loop(storage, "parts", network, course, name="parts").run(loss_of(network))
    for name, value in weights(network).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="in 3 parts"):
        Loop(storage, "x", module(), replace(COURSE, accumulation=3), name="x")


def test_both_kernels_of_the_optimiser_agree(storage: Storage) -> None:
    expected = straight(storage)
    network = module()
    Loop(storage, "x", network, replace(COURSE, kernel="foreach"), name="x").run(loss_of(network))
    for name, value in weights(network).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_of_several_averages_the_best_on_held_out_records_is_published(storage: Storage) -> None:
    network = module()
    losses = iter([3.0, 1.0, 2.0])
    course = replace(COURSE, ema_decays=(0.5, 0.9, 0.99))
    Loop(storage, "run", network, course, name="run").run(
        loss_of(network), held_out=lambda: next(losses)
    )
    expected = straight(storage)  # of decay 0.9
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())
    line = json.loads(storage.read_bytes("run/journal.jsonl").splitlines()[-1])
    assert line["held_out_loss"] == {"0.5": 3.0, "0.9": 1.0, "0.99": 2.0}
    # Where nothing is held out, the first one.
    network = module()
    Loop(storage, "none", network, replace(course, ema_decays=(0.9, 0.5)), name="none").run(
        loss_of(network)
    )
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())


def showing(network: torch.nn.Module, made: list[int]) -> Milestones:
    """Files that say which weights were lent at a milestone, and in which mode."""

    def make(seen: int) -> dict[str, bytes]:
        made.append(seen)
        vector = torch.nn.utils.parameters_to_vector(network.parameters())
        return {f"shown-{seen}": vector.detach().numpy().tobytes() + bytes([network.training])}

    return Milestones((100, 168, 396), make)


def test_milestones_show_the_average_and_leave_no_trace(storage: Storage) -> None:
    expected = straight(storage)
    network, made = module(), []
    Loop(storage, "run", network, COURSE, name="run").run(
        loss_of(network), milestones=showing(network, made)
    )
    assert made == [100, 168, 396]
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())
    assert storage.read_bytes("run/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")

    def die() -> None:
        raise RuntimeError

    # Killed behind a commit at the very place of a milestone: that is not made again, and is there.
    network, made = module(), []
    with pytest.raises(RuntimeError):
        Loop(storage, "cut", network, COURSE, name="cut").run(
            loss_of(network, 172, die), milestones=showing(network, made)
        )
    latest = Checkpoints(storage, "cut").latest()
    assert latest is not None
    assert latest.images_seen == 168
    shown = b"".join(latest.tensors[f"average-0/{n}"].numpy().tobytes() for n in expected)
    assert storage.read_bytes("cut/shown-168") == shown + b"\0"
    network = module()
    Loop(storage, "cut", network, COURSE, name="cut").run(
        loss_of(network), milestones=showing(network, made)
    )
    assert made == [100, 168, 396]
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())
    for name in ("shown-100", "shown-168", "shown-396"):
        assert storage.read_bytes(f"cut/{name}") == storage.read_bytes(f"run/{name}")


def test_commits_by_the_clock_come_besides(storage: Storage) -> None:
    network = module()
    course = replace(COURSE, checkpoints=1, checkpoint_seconds=1e-6)
    made: list[int] = []
    loop = Loop(storage, "run", network, course, name="run")
    seal = loop._checkpoints.seal
    loop._checkpoints.seal = lambda seen, *rest: (made.append(seen), seal(seen, *rest))  # type: ignore
    loop.run(loss_of(network))
    assert made[0] == 0
    assert made[-1] == 400
    assert len(made) > 4
    expected = straight(storage)
    assert all(torch.equal(v, expected[n]) for n, v in weights(network).items())


def test_resuming_otherwise_is_refused(storage: Storage) -> None:
    straight(storage)
    network = module()
    other = replace(COURSE, plan=Plan(batch=8, images_seen=400))
    with pytest.raises(Refused) as raised:
        Loop(storage, "straight", network, other, name="straight").run(loss_of(network))
    said = "The checkpoint of straight was made otherwise: plan.batch 4 then and 8 now"
    assert raised.value.what == said
    assert "--allow" not in str(raised.value)  # which would not help


def test_resuming_under_other_versions_needs_leave_and_is_journalled(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise RuntimeError

    network = module()
    with pytest.raises(RuntimeError):
        Loop(storage, "run", network, COURSE, name="run").run(loss_of(network, 200, die))
    version = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(NotBitwise, match="--allow-inexact-resume") as raised:
        Loop(storage, "run", module(), COURSE, name="run").run(loss_of(network))
    assert raised.value.differing == {"torch": [version, "9.9"]}
    assert raised.value.what == (
        f"The checkpoint of run was made otherwise: torch {version} then and 9.9 now"
    )
    # By its first argument and its fields, as Ray hands it on from a worker.
    assert copy.copy(raised.value).differing == raised.value.differing
    leave = replace(COURSE, bitwise_resume=False)
    elsewhere = replace(leave, plan=Plan(batch=8, images_seen=400))
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


OTHERWISE: list[dict[str, Any]] = [
    {"learning_rate": 5e-3},
    {"weight_decay": 0.5},
    {"betas": (0.8, 0.99)},
    {"warmup": 0.7},
    {"clip": 0.1},
    {"guard": GuardConfig(spike=2.0)},
    {"accumulation": 2},
    {"kernel": "foreach"},
    {"loss": {"weight": "cosmap"}},
]


@pytest.mark.parametrize("change", OTHERWISE, ids=lambda change: next(iter(change)))
def test_resuming_with_other_settings_is_never_called_bitwise(
    storage: Storage, change: dict[str, Any]
) -> None:
    straight(storage)
    assert getattr(COURSE, next(iter(change))) != next(iter(change.values()))
    other = replace(COURSE, **change)
    with pytest.raises(Refused, match="--allow-inexact-resume"):
        Loop(storage, "straight", module(), other, name="straight").run(loss_of(module()))
    other = replace(other, bitwise_resume=False)
    Loop(storage, "straight", module(), other, name="straight").run(loss_of(module()))
    lines = [json.loads(x) for x in storage.read_bytes("straight/journal.jsonl").splitlines()]
    assert [line["bitwise"] for line in lines if line["event"] == "resumed"] == [False]


def test_another_start_is_another_training_and_other_commits_are_not(storage: Storage) -> None:
    straight(storage)
    leave = replace(COURSE, bitwise_resume=False)
    for other, said in (
        (replace(leave, ema_decays=(0.9, 0.5)), "ema_decays"),
        (replace(leave, origin={"width": 64}), r"origin\.width None then and 64 now"),
    ):
        with pytest.raises(Refused, match=said):
            Loop(storage, "straight", module(), other, name="straight").run(loss_of(module()))
    oftener = replace(COURSE, checkpoints=20, checkpoint_seconds=1.0)
    Loop(storage, "straight", module(), oftener, name="straight").run(loss_of(module()))


def test_metrics_have_no_clock_and_the_journal_has(storage: Storage) -> None:
    straight(storage)
    lines = [json.loads(x) for x in storage.read_bytes("straight/metrics.jsonl").splitlines()]
    assert lines[-1]["images_seen"] == 400
    keys = {"images_seen", "loss", "gradient_norm", "error_by_t"}
    assert all(set(line) == keys for line in lines)
    assert all(len(line["error_by_t"]) == 8 for line in lines)
    losses = [line["loss"] for line in lines]
    assert sum(losses[-10:]) < sum(losses[:10]) / 5
    beat = storage.read_json("straight/heartbeat.json")
    assert (beat["images_seen"], beat["of"], beat["generation"]) == (400, 400, 1)
    journal = json.loads(storage.read_bytes("straight/journal.jsonl").splitlines()[-1])
    assert journal["event"] == "trained"
    assert journal["images_per_second"] > 0
