"""Checkpoints: fencing, what damage does to them, pruning, and writers killed at every step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core.checkpoint import Checkpoint, Checkpoints, newest_facts
from atoll.core.digest import canonical_json
from atoll.core.errors import ExitCode, Fenced, Refused
from atoll.core.storage import Storage
from tests.core.conftest import near
from tests.waiting import PATIENCE_SECONDS, until

PLACE = "islands/s0"


def tensors(images_seen: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((64,), float(images_seen)),
        "step": torch.tensor(images_seen),
        "bf16": torch.arange(4, dtype=torch.bfloat16) / images_seen,
    }


def facts(images_seen: int) -> dict[str, Any]:
    return {"threads": 1, "versions": {"torch": "2", "1": 0.1}, "loss": images_seen / 3}


def commit(writer: Checkpoints, images_seen: int) -> None:
    writer.seal(images_seen, [writer.write(images_seen, tensors(images_seen))], facts(images_seen))


def writer_of(storage: Storage, *, keep: int = 2) -> Checkpoints:
    writer = Checkpoints(storage, PLACE, keep=keep)
    writer.claim()
    return writer


def assert_is(found: Checkpoint | None, images_seen: int) -> None:
    assert found is not None
    assert found.images_seen == images_seen
    assert found.facts == facts(images_seen)
    wanted = tensors(images_seen)
    assert found.tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)


def test_nothing_committed_is_none(storage: Storage) -> None:
    assert Checkpoints(storage, PLACE).latest() is None
    assert writer_of(storage).latest() is None


def test_newest_commit_comes_back_bitwise(storage: Storage) -> None:
    writer = writer_of(storage)
    for images_seen in (8, 16, 1000, 10_000):
        commit(writer, images_seen)
        assert_is(Checkpoints(storage, PLACE).latest(), images_seen)


def test_newest_facts_are_those_of_the_newest_sound_record(storage: Storage) -> None:
    writer = writer_of(storage)
    assert newest_facts(storage, PLACE) == {}
    for images_seen in (8, 16):
        commit(writer, images_seen)
        assert newest_facts(storage, PLACE) == facts(images_seen)
    storage.write_bytes(writer.names()[-1], b"{}")
    assert newest_facts(storage, PLACE) == facts(8)


def test_a_checkpoint_of_another_version_is_refused_and_stays(storage: Storage) -> None:
    writer = writer_of(storage)
    commit(writer, 8)
    (name,) = storage.list(f"{PLACE}/commits")
    record = storage.read_json(name)
    del record["record_sha256"]
    record["schema_version"] = 1
    sealed = {**record, "record_sha256": hashlib.sha256(canonical_json(record)).hexdigest()}
    storage.write_bytes(name, canonical_json(sealed))
    before = storage.sha256(PLACE)
    with pytest.raises(Refused, match="schema version 1") as refused:
        writer.latest()
    assert "version of Atoll that wrote it" in str(refused.value.cure)
    assert storage.sha256(PLACE) == before


def test_facts_with_numbers_as_keys_still_verify(storage: Storage) -> None:
    writer = writer_of(storage)
    file = writer.write(8, {"a": torch.ones(1)})
    writer.seal(8, [file], {"times": {2: 1, 10: (1, 2)}, "nan": float("inf")})
    found = writer.latest()
    assert found is not None
    assert found.facts == {"times": {"2": 1, "10": [1, 2]}, "nan": float("inf")}


def test_generations_count_up_and_every_claim_fences_the_one_before(storage: Storage) -> None:
    writers = [writer_of(storage) for _ in range(5)]
    assert [writer.generation for writer in writers] == [1, 2, 3, 4, 5]
    for writer in writers[:-1]:
        with pytest.raises(Fenced, match=r"Generation 5 has taken over islands/s0 from"):
            writer.check_fence()
    writers[-1].check_fence()


def test_zombie_is_refused_and_changes_nothing(storage: Storage) -> None:
    zombie = writer_of(storage)
    commit(zombie, 8)
    commit(zombie, 16)
    heir = writer_of(storage)
    before = {name: storage.read_bytes(name) for name in storage.list()}
    with pytest.raises(Fenced) as caught:
        commit(zombie, 24)
    assert caught.value.exit_code == ExitCode.FENCED == 8
    assert {name: storage.read_bytes(name) for name in storage.list()} == before
    assert_is(heir.latest(), 16)
    commit(heir, 24)
    assert_is(heir.latest(), 24)


def test_writer_overtaken_between_payload_and_record_makes_no_commit(storage: Storage) -> None:
    zombie = writer_of(storage)
    commit(zombie, 8)
    writing = storage.writing

    @contextlib.contextmanager
    def overtaken(name: str) -> Iterator[Path]:
        with writing(name) as path:
            yield path
        writer_of(storage)

    storage.writing = overtaken  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        commit(zombie, 16)
    storage.writing = writing  # type: ignore[method-assign]
    assert_is(Checkpoints(storage, PLACE).latest(), 8)


def test_zombie_past_its_last_check_deletes_nothing_of_its_heir(storage: Storage) -> None:
    zombie = writer_of(storage)
    commit(zombie, 8)
    create = storage.create

    def overtaken(name: str, data: bytes) -> None:
        """The heir writes its payload just before the zombie creates its record and prunes."""
        create(name, data)
        if "/commits/" in name and not storage.list(f"{PLACE}/gen")[1:]:
            create(f"{PLACE}/gen/000002.json", b"{}")
            storage.write_bytes(f"{PLACE}/checkpoints/000002-000000000004.safetensors", b"heir")

    storage.create = overtaken  # type: ignore[method-assign]
    for images_seen in (16, 24, 32):
        if images_seen > 16:
            storage.remove(f"{PLACE}/gen/000002.json")  # a zombie that sees nothing at all
        commit(zombie, images_seen)
        assert storage.exists(f"{PLACE}/checkpoints/000002-000000000004.safetensors")


def test_only_the_newest_are_kept_with_their_payloads(storage: Storage) -> None:
    writer = writer_of(storage, keep=3)
    for images_seen in range(8, 80, 8):
        commit(writer, images_seen)
    names = [f"000001-{n:012d}" for n in (56, 64, 72)]
    assert storage.list(f"{PLACE}/commits") == [f"{PLACE}/commits/{n}.json" for n in names]
    assert storage.list(f"{PLACE}/checkpoints") == [
        f"{PLACE}/checkpoints/{n}.safetensors" for n in names
    ]


Damage = Callable[[bytes], bytes | None]
DAMAGE: dict[str, Damage] = {
    "removed": lambda data: None,
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "end lost": lambda data: data[:-3],
    "zeroed": lambda data: bytes(len(data)),
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "of another kind": lambda data: b"[]\n",
}


def damage(storage: Storage, name: str, how: Damage) -> None:
    data = how(storage.read_bytes(name))
    if data is None:
        storage.remove(name)
    else:
        storage.write_bytes(name, data)


@near
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("kind", ["commits", "checkpoints"])
def test_damaged_newest_is_passed_over_for_the_one_before(
    storage: Storage, kind: str, how: str
) -> None:
    writer = writer_of(storage)
    for images_seen in (8, 16, 24):
        commit(writer, images_seen)
    damage(storage, storage.list(f"{PLACE}/{kind}")[-1], DAMAGE[how])
    heir = writer_of(storage)
    assert_is(heir.latest(), 16)
    # ... and the heir goes on from there: it commits, and prunes the damaged one in time.
    for images_seen in (20, 24, 28):
        commit(heir, images_seen)
        assert_is(Checkpoints(storage, PLACE).latest(), images_seen)


@pytest.mark.parametrize("kind", ["commits", "checkpoints"])
def test_every_flipped_bit_is_seen(tmp_path: Path, kind: str) -> None:
    storage = Storage(tmp_path)
    writer = writer_of(storage)
    commit(writer, 8)
    commit(writer, 16)
    newest = storage.list(f"{PLACE}/{kind}")[-1]
    data = storage.read_bytes(newest)
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        (tmp_path / newest).write_bytes(flipped)
        found = Checkpoints(storage, PLACE).latest()  # the writer would remove it
        assert found is not None
        # A flip between blanks leaves the record what it was.
        if found.images_seen != 8:
            assert kind == "commits"
            assert json.loads(flipped) == json.loads(data)
            assert_is(found, 16)


def test_a_writer_that_passes_over_its_own_damaged_commit_can_make_it_again(
    storage: Storage,
) -> None:
    """As a training that goes back from a spike, and comes by the same place with other weights."""
    writer = writer_of(storage)
    for images_seen in (8, 16):
        commit(writer, images_seen)
    damage(storage, storage.list(f"{PLACE}/checkpoints")[-1], DAMAGE["halved"])
    assert_is(writer.latest(), 8)
    other = {**tensors(16), "weight": torch.zeros(64)}
    writer.seal(16, [writer.write(16, other)], facts(16))
    found = writer.latest()
    assert found is not None
    assert torch.equal(found.tensors["weight"], torch.zeros(64))


def test_what_a_killed_writer_left_of_a_payload_goes_with_the_next(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    commit(writer_of(storage), 8)
    child = os.fork()
    if child == 0:
        with storage.writing(f"{PLACE}/checkpoints/000001-000000000016.safetensors") as path:
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    folder = tmp_path / PLACE / "checkpoints"
    assert len([path for path in folder.iterdir() if path.name.startswith(".")]) == 1
    heir = writer_of(storage)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert_is(heir.latest(), 8)


def test_all_damaged_is_none_and_the_next_commit_counts(storage: Storage) -> None:
    writer = writer_of(storage)
    for images_seen in (800, 1600):
        commit(writer, images_seen)
    for name in storage.list(f"{PLACE}/checkpoints"):
        damage(storage, name, DAMAGE["halved"])
    heir = writer_of(storage)
    assert heir.latest() is None
    for images_seen in (8, 16, 24):
        commit(heir, images_seen)
        assert_is(Checkpoints(storage, PLACE).latest(), images_seen)


def test_places_do_not_touch_each_other(storage: Storage) -> None:
    one, other = Checkpoints(storage, "islands/s"), Checkpoints(storage, "islands/s1")
    one.claim(), other.claim()
    one.check_fence(), other.check_fence()
    commit(other, 8)
    assert one.latest() is None
    commit(one, 16)
    assert_is(other.latest(), 8)


@pytest.mark.parametrize("keep", [1, 2])
def test_commit_killed_at_every_step_is_never_worse_than_before(
    tmp_path: Path, killed_at_every_step: Callable[..., Iterator[bool]], keep: int
) -> None:
    storage, seen = Storage(tmp_path), [0]
    writer = writer_of(storage, keep=keep)
    commit(writer, 8)
    before = [8]

    def prepare() -> None:
        """A resume: a new generation goes on from whatever was there."""
        nonlocal writer
        writer = writer_of(storage, keep=keep)
        found = writer.latest()
        assert found is not None
        before[0] = found.images_seen

    for ended in killed_at_every_step(prepare, lambda: commit(writer, before[0] + 8), stride=1):
        found = Checkpoints(storage, PLACE).latest()
        assert found is not None
        assert found.images_seen in (before[0], before[0] + 8)
        assert not ended or found.images_seen == before[0] + 8
        assert_is(found, found.images_seen)
        seen.append(found.images_seen)
    assert seen[-1] > 16
    assert len(storage.list(f"{PLACE}/commits")) <= keep + 1
    assert len(storage.list(f"{PLACE}/checkpoints")) <= keep + 2


def test_training_killed_at_random_moments_loses_one_interval_at_most(tmp_path: Path) -> None:
    storage, random_ = Storage(tmp_path), random.Random(0)
    told = tmp_path / "told"
    newest = 0
    for _ in range(15):
        told.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            writer = writer_of(storage)
            found = writer.latest()
            images_seen = found.images_seen if found else 0
            while True:
                images_seen += 8
                commit(writer, images_seen)
                told.write_text(str(images_seen))
        until(told.exists, every=0.001)
        time.sleep(random_.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        promised = int(told.read_text() or newest)  # empty where it was killed while it told
        found = Checkpoints(storage, PLACE).latest()
        newest = found.images_seen if found else 0
        assert newest >= promised
        if found:
            assert_is(found, newest)
    assert newest >= 8 * 15


def _claim_many(uri: str, rounds: int, start: Any, won: Any) -> None:
    place = Checkpoints(Storage(uri), PLACE)
    start.wait()
    for _ in range(rounds):
        won.put(place.claim())


def test_racing_claims_are_all_different(tmp_path: Path) -> None:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(8), context.Queue()
    racers = [
        context.Process(target=_claim_many, args=(str(tmp_path), 5, start, won)) for _ in range(8)
    ]
    for racer in racers:
        racer.start()
    claimed = sorted(won.get(timeout=PATIENCE_SECONDS) for _ in range(40))
    for racer in racers:
        racer.join()
    assert claimed == list(range(1, 41))
