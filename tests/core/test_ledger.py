"""The ledger: lineage, and that no entry can be changed, dropped, moved or slipped in unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest

import atoll
from atoll.core.errors import ExitCode, Refused
from atoll.core.ledger import FOLDER, Ledger, LedgerEntry
from atoll.core.storage import Storage
from tests.core.conftest import at_once, near

ENTRIES = 6


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def name_of(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


@pytest.fixture
def ledger(storage: Storage) -> Ledger:
    """Shards a and b, an expert of each, the ensemble of both, and a soup of one expert."""
    made = Ledger(storage)
    shards = [made.append("shard", s, sha(s), shards=[s]) for s in "ab"]
    experts = [made.append("expert", p.name, sha("e" + p.name), parents=[p]) for p in shards]
    made.append("ensemble", "ensemble", sha("ensemble"), parents=experts)
    made.append("soup", "s", sha("soup"), parents=experts[:1], note={"weights": {"a": 1}})
    return made


def test_shards_are_the_union_of_own_and_parents(ledger: Ledger) -> None:
    by_name = {(e.kind, e.name): e for e in ledger.entries()}
    assert by_name["expert", "a"].shards == ["a"]
    assert by_name["ensemble", "ensemble"].shards == ["a", "b"]
    assert by_name["ensemble", "ensemble"].parents == [2, 3]
    assert by_name["soup", "s"].shards == ["a"]
    tuned = ledger.append(
        "gate", "g", sha("g"), parents=[by_name["soup", "s"]], shards=["c", "b", "c"]
    )
    assert tuned.shards == ["a", "b", "c"]


def test_entries_are_files_numbered_and_chained(ledger: Ledger, storage: Storage) -> None:
    assert storage.list(FOLDER) == [name_of(n) for n in range(ENTRIES)]
    previous = "0" * 64
    for number, entry in enumerate(ledger.entries()):
        data = storage.read_bytes(name_of(number))
        assert json.loads(data)["previous_sha256"] == entry.previous_sha256 == previous
        assert entry.id == number
        assert entry.schema_version == 1
        assert entry.code_version == atoll.__version__
        previous = hashlib.sha256(data).hexdigest()
    assert ledger.head() == previous


def test_nothing_in_it_depends_on_a_clock_or_a_place(ledger: Ledger) -> None:
    twin = Ledger(Storage("memory://twin"))
    try:
        for e in ledger.entries():
            parents = [twin.entries()[p] for p in e.parents]
            twin.append(e.kind, e.name, e.sha256, parents=parents, shards=e.shards, note=e.note)
        assert twin.head() == ledger.head()
    finally:
        Storage("memory://twin").remove("")


def test_empty_ledger(storage: Storage) -> None:
    assert Ledger(storage).entries() == []
    assert Ledger(storage).head() == "0" * 64
    assert Ledger(storage).latest("shard", "a") is None


def test_append_again_is_the_same_entry(ledger: Ledger, storage: Storage) -> None:
    before = ledger.entries()
    assert ledger.append("shard", "a", sha("a"), shards=["a"]) == before[0]
    assert ledger.append("soup", "s", sha("soup"), parents=[before[2]]) == before[5]
    assert ledger.entries() == before
    assert Ledger(storage).entries() == before


def test_new_content_and_its_return_are_new_entries(ledger: Ledger) -> None:
    ledger.append("shard", "a", sha("a2"), shards=["a"])
    back = ledger.append("shard", "a", sha("a"), shards=["a"])
    assert back.id == ENTRIES + 1
    latest = ledger.latest("shard", "a")
    assert latest == back
    assert len(ledger.entries()) == ENTRIES + 2


def test_same_bytes_reached_by_more_shards_are_recorded_anew(ledger: Ledger) -> None:
    more = ledger.append("soup", "s", sha("soup"), shards=["b"], parents=[ledger.entries()[2]])
    assert more.id == ENTRIES
    assert more.shards == ["a", "b"]


def test_same_name_of_another_kind_is_another_artefact(ledger: Ledger) -> None:
    assert ledger.append("soup", "a", sha("a"), shards=["a"]).id == ENTRIES


Tamper = Callable[[Storage, int], None]


def _edit(storage: Storage, number: int) -> None:
    values = storage.read_json(name_of(number))
    values["shards"] = []
    storage.write_json(name_of(number), values)


def _reformat(storage: Storage, number: int) -> None:
    values = storage.read_json(name_of(number))
    storage.write_bytes(name_of(number), json.dumps(values).encode())


def _delete(storage: Storage, number: int) -> None:
    storage.remove(name_of(number))


def _swap(storage: Storage, number: int) -> None:
    other = (number + 1) % ENTRIES
    one, two = storage.read_bytes(name_of(number)), storage.read_bytes(name_of(other))
    storage.write_bytes(name_of(number), two)
    storage.write_bytes(name_of(other), one)


def _insert(storage: Storage, number: int) -> None:
    """A forged entry with honest links on its left, everything after it moved up."""
    for later in range(ENTRIES - 1, number - 1, -1):
        values = storage.read_json(name_of(later)) | {"id": later + 1}
        storage.write_json(name_of(later + 1), values)
    values = storage.read_json(name_of(number + 1)) | {"id": number, "name": "forged"}
    storage.write_json(name_of(number), values)


def _slip_in(storage: Storage, number: int) -> None:
    storage.write_bytes(f"{FOLDER}/{number:06d}-b.json", storage.read_bytes(name_of(number)))


def _damage(storage: Storage, number: int) -> None:
    storage.write_bytes(name_of(number), storage.read_bytes(name_of(number))[:-20])


TAMPERS = [_edit, _reformat, _delete, _swap, _insert, _slip_in, _damage]


@near
@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda t: t.__name__.strip("_"))
@pytest.mark.parametrize("number", range(ENTRIES))
def test_tampering_is_seen(ledger: Ledger, storage: Storage, tamper: Tamper, number: int) -> None:
    """By the chain; for the last entry, which none follows, by the head a certificate holds."""
    head = ledger.head()
    tamper(storage, number)
    if number == ENTRIES - 1 and tamper in (_edit, _reformat, _delete):
        assert ledger.head() != head
        return
    with pytest.raises(Refused, match=FOLDER) as caught:
        ledger.entries()
    assert caught.value.exit_code == ExitCode.REFUSED


@near
@pytest.mark.parametrize("change", ["renamed", "other id"])
def test_last_entry_out_of_its_place_is_refused(
    ledger: Ledger, storage: Storage, change: str
) -> None:
    values = storage.read_json(name_of(5))
    storage.remove(name_of(5))
    if change == "renamed":
        storage.write_json(name_of(7), values)
    else:
        storage.write_json(name_of(5), values | {"id": 7})
    with pytest.raises(Refused, match="entry 5 was expected here"):
        ledger.entries()


@near
@pytest.mark.parametrize("key", sorted(LedgerEntry.model_fields))
def test_every_field_is_under_the_chain(ledger: Ledger, storage: Storage, key: str) -> None:
    values = storage.read_json(name_of(1))
    forged = {"int": 7, "str": "x", "dict": {"x": 1}, "list": [0] if key == "parents" else ["x"]}
    values[key] = forged[type(values[key]).__name__]
    storage.write_json(name_of(1), values)
    with pytest.raises(Refused):
        ledger.entries()
    with pytest.raises(Refused):
        ledger.append("shard", "c", sha("c"))
    assert len(storage.list(FOLDER)) == ENTRIES


@near
@pytest.mark.parametrize("change", [{"surprise": 1}, {"id": "x"}, {"schema_version": 2}])
def test_entry_of_another_form_is_refused(
    ledger: Ledger, storage: Storage, change: dict[str, object]
) -> None:
    storage.write_json(name_of(5), storage.read_json(name_of(5)) | change)
    with pytest.raises(Refused):
        ledger.entries()


def test_of_racing_appends_one_wins_and_the_others_are_told(storage: Storage) -> None:
    def race(number: int) -> str | None:
        """Its name, where it is told that it has won."""
        try:
            return Ledger(storage).append("shard", str(number), sha(str(number))).name
        except Refused:
            return None

    won = [name for name in at_once(race, 8) if name is not None]
    assert won
    # Whoever won, the chain holds.
    assert sorted(entry.name for entry in Ledger(storage).entries()) == sorted(won)


def test_append_between_look_and_write_is_refused(storage: Storage) -> None:
    ledger, create = Ledger(storage), storage.create

    def overtaken(name: str, data: bytes) -> None:
        storage.create = create  # type: ignore[method-assign]
        Ledger(storage).append("shard", "other", sha("other"))
        create(name, data)

    storage.create = overtaken  # type: ignore[method-assign]
    with pytest.raises(Refused, match=r"at the same moment. Cure: run one command at a time"):
        ledger.append("shard", "mine", sha("mine"))
    assert [entry.name for entry in ledger.entries()] == ["other"]
