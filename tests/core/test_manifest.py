"""The manifest: what it refuses, and that it says the same after a round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from atoll.core.errors import DataError, ExitCode, Refused, UsageError
from atoll.core.manifest import (
    MANIFEST_NAME,
    Artefact,
    Commons,
    Encoder,
    Expert,
    Manifest,
    Partition,
    Picture,
    Plan,
    Shard,
    check_artefact,
    check_schema,
    parse_size,
    require,
)
from atoll.core.storage import Storage

SHA = "0" * 64


def manifest(**changes: Any) -> Manifest:
    def artefact(path: str) -> dict[str, str]:
        return {"path": path, "sha256": SHA}

    shards = {
        name: Shard(**artefact(f"shards/{name}"), records=9, held_out=1)
        for name in ("shard-00", "shard-01", "museum")
    }
    return Manifest(
        picture=Picture(channels=1, height=8, width=8),
        encoder=Encoder(**artefact("partition/encoder"), spec="fit"),
        partition=Partition(**artefact("partition/assignments.parquet"), by="clusters"),
        commons=Commons(**artefact("commons"), declared="0.1", records=5, held_out=1),
        shards=shards,
        seed=0,
        **changes,
    )


def full() -> Manifest:
    made = manifest(recipe="unet-tiny", exports=["s3://bucket/é"])
    made.shards["museum"].plan = Plan(batch=8, images_seen=80)
    artefact = Artefact(path="x", sha256=SHA)
    made.base = made.ensemble = artefact
    made.experts["museum"] = Expert(path="e", sha256=SHA, gate_head=artefact, images_seen=80)
    made.soups["s"] = artefact
    return made


def test_round_trip(storage: Storage) -> None:
    made = full()
    made.save(storage)
    first = storage.read_bytes(MANIFEST_NAME)
    assert Manifest.load(storage) == made
    Manifest.load(storage).save(storage)
    assert storage.read_bytes(MANIFEST_NAME) == first


def test_bytes_do_not_depend_on_the_order_in_which_shards_came(storage: Storage) -> None:
    one, other = full(), full()
    other.shards = dict(reversed(other.shards.items()))
    one.save(storage)
    first = storage.read_bytes(MANIFEST_NAME)
    other.save(storage)
    assert storage.read_bytes(MANIFEST_NAME) == first


def test_the_words_of_a_size_are_read_back() -> None:
    assert parse_size(Picture(channels=1, height=12, width=20).size) == (12, 20)
    for text in ("", "16", "16x", "3x16", "16x2049", "016x16", "16x16x16", "16X16", "16x-16"):
        with pytest.raises(ValueError, match=f"'{text}' is no shape; allowed: HxW.*4 to 2048"):
            parse_size(text)


def test_no_run_is_a_usage_error(storage: Storage) -> None:
    with pytest.raises(UsageError, match=r"There is no run at .*atoll partition") as caught:
        Manifest.load(storage)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_version_is_refused_and_untouched(storage: Storage, version: Any) -> None:
    values = full().model_dump(mode="json") | {"schema_version": version}
    storage.write_json(MANIFEST_NAME, values)
    with pytest.raises(Refused, match=r"schema version .*Allowed: 1.*Cure") as caught:
        Manifest.load(storage)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert storage.read_json(MANIFEST_NAME) == values


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"3", b"\xff", b'"manifest"'])
def test_what_is_no_manifest_is_refused(storage: Storage, data: bytes) -> None:
    storage.write_bytes(MANIFEST_NAME, data)
    with pytest.raises(Refused):
        Manifest.load(storage)


def _change(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values[parent]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("seed", None),
        ("seed", "x"),
        ("shards", [1]),
        ("shards.museum.records", "many"),
        ("shards.museum.sha256", None),
        ("shards.museum.surprise", 1),
        ("surprise", 1),
        ("picture.height", 0.5),
        ("experts.museum.gate_head", None),
    ],
)
def test_damage_is_refused_and_named(storage: Storage, dotted: str, value: Any) -> None:
    values = json.loads(full().model_dump_json())
    _change(values, dotted, value)
    storage.write_json(MANIFEST_NAME, values)
    with pytest.raises(Refused, match=rf"is damaged: {dotted}.*Cure: restore"):
        Manifest.load(storage)


def test_wrong_assignment_is_caught_at_once() -> None:
    with pytest.raises(ValidationError):
        full().seed = "x"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "meant"), [("shard_00", "shard-00"), ("Museum", "museum"), ("shrad-01", "shard-01")]
)
def test_unknown_shard_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        full().shard(name)
    assert f"There is no shard '{name}'. Did you mean '{meant}'?" in str(caught.value)
    assert "Allowed: shard-00, shard-01, museum" in str(caught.value)
    assert full().shard("museum").records == 9


def test_artefact_is_checked_against_its_digest(storage: Storage) -> None:
    for name in ("expert/config.json", "expert/sub/weights"):
        storage.write_bytes(name, b"content")
    artefact = Artefact(path="expert", sha256=storage.sha256("expert"))
    check_artefact(storage, artefact)
    storage.write_bytes("expert/sub/weights", b"contenu")
    with pytest.raises(Refused, match=r"expert has sha256 .*the manifest says"):
        check_artefact(storage, artefact)
    storage.remove("expert")
    with pytest.raises(Refused, match="in the manifest and not in storage"):
        check_artefact(storage, artefact)


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b"])
def test_artefact_outside_the_run_is_refused(storage: Storage, path: str) -> None:
    with pytest.raises(Refused, match="not a name inside a run"):
        check_artefact(storage, Artefact(path=path, sha256=SHA))


def test_require_says_which_command_is_missing() -> None:
    made = full()
    assert require(made.base, "base", "atoll base RUN") is made.base
    with pytest.raises(DataError, match=r"has no base yet. Cure: atoll base RUN"):
        require(None, "base", "atoll base RUN")


def test_check_schema_takes_only_the_expected_version() -> None:
    check_schema({"schema_version": 3}, 3, "x")
    for values in ({"schema_version": 2}, {}, [], None, "x"):
        with pytest.raises(Refused, match="x has schema version"):
            check_schema(values, 3, "x")


def test_picture_shape_is_channel_height_width() -> None:
    assert Picture(channels=3, height=32, width=16).shape == (3, 32, 16)
