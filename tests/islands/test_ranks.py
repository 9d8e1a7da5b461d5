"""Two processes at one training: the batch of one, stopped and resumed as one, and resharded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.core import recipes
from atoll.core.checkpoint import Checkpoints, Piece
from atoll.core.denoiser import Card, Denoiser
from atoll.core.errors import ConfigError, Fenced, Interrupted, Refused
from atoll.core.manifest import Plan
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.course import Course
from atoll.islands.group import Group
from atoll.islands.learner import Parallel
from atoll.islands.loop import Loop, Milestones
from atoll.islands.lora import attach
from atoll.islands.settings import DenoiserTraining, LoraConfig
from atoll.islands.step import Errors
from atoll.islands.train_denoiser import learner_of, train_here
from tests.islands.ranks import Pool, pool
from tests.islands.test_loop import COURSE as LONG
from tests.islands.test_loop import loss_of, module

COURSE = replace(LONG, plan=Plan(batch=4, images_seen=80), checkpoints=5)
KINDS: tuple[Parallel, ...] = ("ddp", "fsdp")
Weights = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    with pool(2) as ranks:
        yield ranks


# -- what a rank does; module-level, so that it can be sent there --------------------------------


def train(
    group: Group,
    uri: str,
    name: str,
    parallel: Parallel = "ddp",
    course: Course = COURSE,
    event: Callable[[Group, Checkpoints, int], None] | None = None,
) -> Weights:
    """The regression of the loop's tests; `event` may happen before any batch of a rank."""
    network = module()
    learner = learner_of(network, group, parallel, torch.device("cpu"))
    plain = loss_of(network)

    def loss(first: int, count: int) -> Errors:
        if event is not None:
            event(group, Checkpoints(Storage(uri), name), first)
        errors = plain(first, count)
        spoilt = event is poisoned and first == 41
        return replace(errors, loss=errors.loss * float("nan")) if spoilt else errors

    Loop(Storage(uri), name, network, course, name=name, learner=learner).run(loss)
    return {key: value.numpy() for key, value in learner.whole().state_dict().items()}


def stopped(group: Group, _place: Checkpoints, first: int) -> None:
    """Only the second rank is told to leave."""
    if group.rank == group.world - 1 and 40 <= first < 44:
        group.leave.set()


def overtaken(group: Group, place: Checkpoints, first: int) -> None:
    if group.leads and first == 40:
        place.claim()


def poisoned(group: Group, _place: Checkpoints, first: int) -> None:
    """A marker: one rank's share of one batch is not a number."""


def transform(
    group: Group, uri: str, name: str, parallel: Parallel, pack: str, rank: int | None
) -> Weights:
    """A real denoiser: activation checkpointing, two averages to choose from, and a milestone.

    With a `rank`, adapters are trained instead of weights, and merged.
    """
    shard = Pack(Path(pack))
    network = recipes.build(
        recipes.recipe_of("dit-tiny"), shard.card.picture, shard.text_width, seed=0,
        pooled_width=shard.pooled_width,
    )  # fmt: skip
    card = Card(
        name="x", kind="expert", shard="x", base_sha256=None, family="dit",
        prediction=DenoiserTraining().objective, latent_space="pixels", images_seen=0,
    )  # fmt: skip
    training = DenoiserTraining(
        gradient_checkpointing=True, accumulation=2, ema_decays=(0.2, 0.01), checkpoints=1,
        lora=LoraConfig(rank=rank),
    )  # fmt: skip
    adapters = attach(network, training.lora, seed=0)
    denoiser = Denoiser(network, card)

    def shown(seen: int) -> dict[str, bytes]:
        with torch.no_grad():
            row = torch.tensor([0])
            v = denoiser.velocity(shard.x_data(row), torch.tensor([0.5]), shard.cond(row))
        return {f"shown-{seen}.txt": f"{v.square().mean():.3f}".encode()}

    trained = train_here(
        Storage(uri), name, denoiser, shard, training, learning_rate=1e-3,
        plan=Plan(batch=8, images_seen=24), seed=0, stream="x", threads=1, device="cpu",
        group=group, parallel=parallel, milestones=Milestones((16,), shown),
    )  # fmt: skip
    if adapters is not None:
        adapters.merge(trained.network)
    return {key: value.numpy() for key, value in trained.network.state_dict().items()}


# -- what comes of it ----------------------------------------------------------------------------


def lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(name).splitlines()]


def assert_close(ours: Weights, expected: Weights, **how: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], err_msg=name, **how)


def assert_equal(*all_of_them: Weights) -> None:
    for each in all_of_them[1:]:
        assert_close(each, all_of_them[0], rtol=0)


def state(storage: Storage, name: str) -> Weights:
    """The whole last checkpoint, optimiser and averages included."""
    latest = Checkpoints(storage, name).latest()
    assert latest is not None
    return {key: value.numpy() for key, value in latest.tensors.items()}


@pytest.mark.parametrize("parallel", KINDS)
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (5, 1), (8, 2)])
def test_two_workers_are_one_with_the_same_batch(
    pair: Pool, tmp_path: Path, parallel: Parallel, batch: int, accumulation: int
) -> None:
    course = replace(
        COURSE, plan=Plan(batch=batch, images_seen=10 * batch), accumulation=accumulation
    )
    one = train(Group(), str(tmp_path), "one", course=course)
    first, second = pair.run(train, str(tmp_path), "two", parallel, course)
    assert_equal(first, second)
    assert_close(first, one, rtol=1e-5, atol=1e-6)
    storage = Storage(tmp_path)
    assert_close(state(storage, "two"), state(storage, "one"), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(
        lines(storage, "two/metrics.jsonl"), lines(storage, "one/metrics.jsonl"), strict=True
    ):
        assert ours["images_seen"] == theirs["images_seen"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    assert len(lines(storage, "two/journal.jsonl")) == 1  # the second rank writes none


@pytest.mark.parametrize("parallel", KINDS)
def test_stopped_together_and_resumed_is_bitwise(
    pair: Pool, tmp_path: Path, parallel: Parallel
) -> None:
    storage, uri = Storage(tmp_path), str(tmp_path)
    straight = pair.run(train, uri, "straight", parallel)
    left = pair.run(train, uri, "cut", parallel, COURSE, stopped)
    assert [type(error) for error in left] == [Interrupted, Interrupted]
    latest = Checkpoints(storage, "cut").latest()
    assert latest is not None
    assert latest.images_seen == 44  # the step in which one rank was told, and none after it
    assert_equal(*straight, *pair.run(train, uri, "cut", parallel))
    assert_equal(state(storage, "straight"), state(storage, "cut"))
    assert storage.read_bytes("cut/metrics.jsonl") == storage.read_bytes("straight/metrics.jsonl")


@pytest.mark.parametrize(
    ("before", "after"), [("two ddp", "one"), ("two fsdp", "one"), ("one", "two fsdp"),
                          ("two fsdp", "two ddp")]
)  # fmt: skip
def test_other_workers_go_on_by_leave_alone_and_it_is_journalled(
    pair: Pool, tmp_path: Path, before: str, after: str
) -> None:
    storage, uri = Storage(tmp_path), str(tmp_path)

    def run(workers: str, course: Course = COURSE, event: Any = None) -> Any:
        kind = workers.removeprefix("two ")
        if workers == "one":
            try:
                return train(Group(), uri, "run", "ddp", course, event)
            except (Refused, Interrupted) as error:
                return error
        return pair.run(train, uri, "run", kind, course, event)[0]

    assert isinstance(run(before, event=stopped), Interrupted)
    refused = run(after)
    assert isinstance(refused, Refused)
    assert "workers" in str(refused)
    assert "--allow-inexact-resume" in str(refused)
    resumed = run(after, replace(COURSE, bitwise_resume=False))
    assert_close(resumed, train(Group(), uri, "straight"), rtol=1e-5, atol=1e-6)
    told = lines(storage, "run/journal.jsonl")[0]
    assert (told["event"], told["bitwise"], told["images_seen"]) == ("resumed", False, 44)
    facts = [(told[when]["workers"], told[when]["parallel"]) for when in ("was", "is")]
    named = {"one": (1, "none"), "two ddp": (2, "ddp"), "two fsdp": (2, "fsdp")}
    assert facts == [named[before], named[after]]
    # No line of metrics is missing or twice, and their sums are of all images.
    seen = [line["images_seen"] for line in lines(storage, "run/metrics.jsonl")]
    assert seen == [line["images_seen"] for line in lines(storage, "straight/metrics.jsonl")]


def test_what_one_rank_cannot_learn_from_all_skip(pair: Pool, tmp_path: Path) -> None:
    storage, uri = Storage(tmp_path), str(tmp_path)
    course = replace(COURSE, plan=Plan(batch=2, images_seen=80))
    first, second = pair.run(train, uri, "run", "ddp", course, poisoned)
    assert_equal(first, second)
    skipped, trained = lines(storage, "run/journal.jsonl")
    assert (skipped["event"], skipped["first"], skipped["end"]) == ("skipped", 40, 42)
    assert trained["event"] == "trained"


def test_ranks_that_are_succeeded_are_all_fenced(pair: Pool, tmp_path: Path) -> None:
    left = pair.run(train, str(tmp_path), "run", "fsdp", COURSE, overtaken)
    assert [type(error) for error in left] == [Fenced, Fenced]


def test_a_shard_of_a_checkpoint_that_is_damaged_is_nobodys(pair: Pool, tmp_path: Path) -> None:
    storage, uri = Storage(tmp_path), str(tmp_path)
    straight = pair.run(train, uri, "straight", "fsdp")
    pair.run(train, uri, "cut", "fsdp", COURSE, stopped)
    (torn,) = [
        name for name in storage.list("cut/checkpoints") if name.endswith("44-1of2.safetensors")
    ]
    path = storage.local(torn)
    path.write_bytes(path.read_bytes()[:-1])
    assert_equal(*straight, *pair.run(train, uri, "cut", "fsdp"))
    resumed = lines(storage, "cut/journal.jsonl")[-1]
    assert resumed["from_images_seen"] == 32  # the commit before it


def test_each_rank_writes_and_reads_its_own_part(pair: Pool, tmp_path: Path) -> None:
    pair.run(train, str(tmp_path), "run", "fsdp")
    places = Checkpoints(Storage(tmp_path), "run")
    newest = places.names()[-1]
    whole = places.load(newest)
    parts = [places.load(newest, Piece(index, 2)) for index in (0, 1)]
    assert whole is not None
    for name, value in whole.tensors.items():
        for index, part in enumerate(parts):
            assert part is not None
            assert torch.equal(part.tensors[name], Piece(index, 2).of(value))
    assert whole.tensors["weights/0.weight"].shape == (8, 3)
    assert parts[1] is not None
    assert parts[1].tensors["weights/0.weight"].shape == (4, 3)
    assert parts[1].tensors["weights/2.weight"].shape == (0, 8)  # one row, and it is the first's


def test_fewer_images_than_workers_are_refused(pair: Pool, tmp_path: Path) -> None:
    course = replace(COURSE, accumulation=4)
    refused, _ = pair.run(train, str(tmp_path), "run", "ddp", course)
    assert isinstance(refused, ConfigError)
    assert "2 workers" in str(refused)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("parallel", KINDS)
def test_a_transformer_in_two_workers_is_the_one_of_one(
    pair: Pool, tmp_path: Path, made: Path, parallel: Parallel, rank: int | None
) -> None:
    pack = str(made / "shards" / "shard-00")
    one = transform(Group(), str(tmp_path), "one", parallel, pack, rank)
    first, second = pair.run(transform, str(tmp_path), parallel, parallel, pack, rank)
    assert_equal(first, second)
    assert_close(first, one, rtol=1e-3, atol=1e-5)
    shown = [(tmp_path / name / "shown-16.txt").read_bytes() for name in ("one", parallel)]
    assert shown[0] == shown[1]
    chosen = [
        lines(Storage(tmp_path), f"{name}/journal.jsonl")[-1]["held_out_loss"]
        for name in ("one", parallel)
    ]
    assert chosen[0] == pytest.approx(chosen[1], rel=1e-4)
