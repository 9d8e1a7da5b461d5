"""Storage on local files, in memory and on S3: names, scopes, folders, digests, no space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from atoll.core.digest import canonical_json, sha256_file, sha256_folder
from atoll.core.errors import DataError, ExitCode, Failed, Fenced, Refused
from atoll.core.storage import MARKERS, Storage

ESCAPES = ("..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a/.", "/")


def make(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# -- files ---------------------------------------------------------------------------------------


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("a/b.bin", b"\x00\xff" * 1000)
    assert storage.read_bytes("a/b.bin") == b"\x00\xff" * 1000
    storage.write_bytes("a/b.bin", b"shorter")
    assert storage.read_bytes("a/b.bin") == b"shorter"
    assert storage.exists("a/b.bin")
    assert storage.exists("a")
    assert not storage.exists("a/c")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/c")


def test_json_has_one_layout(storage: Storage) -> None:
    storage.write_json("x.json", {"b": [1, 2.5, None], "a": "é"})
    wanted = '{\n  "a": "é",\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    assert storage.read_bytes("x.json").decode() == wanted
    assert storage.read_json("x.json") == {"a": "é", "b": [1, 2.5, None]}


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_refused(storage: Storage, data: bytes) -> None:
    storage.write_bytes("x.json", data)
    with pytest.raises(Refused, match=r"x\.json is not readable JSON.*Cure"):
        storage.read_json("x.json")


def test_writing_appears_when_the_block_ends_well(storage: Storage) -> None:
    with storage.writing("a/big.bin") as path:
        path.write_bytes(b"content")
        assert not storage.exists("a/big.bin")
    assert storage.read_bytes("a/big.bin") == b"content"
    with contextlib.suppress(RuntimeError), storage.writing("a/big.bin") as path:
        path.write_bytes(b"torn")
        raise RuntimeError
    assert storage.read_bytes("a/big.bin") == b"content"
    assert storage.list() == ["a/big.bin"]


def test_lines_are_appended_in_order(storage: Storage) -> None:
    for line in ("one", "two", "drei é"):
        storage.append_line("journal/m.jsonl", line)
    assert storage.read_bytes("journal/m.jsonl").decode().splitlines() == ["one", "two", "drei é"]


def test_list_is_sorted_relative_and_without_temporaries(storage: Storage) -> None:
    for name in ("b/2", "b/10", "a", "b/c/d", "bb/e"):
        storage.write_bytes(name, b"x")
    if storage.is_local:  # what a killed writer leaves
        make(storage.local(""), **{"b__._dot_2.0f": "x"})
        (storage.local("b") / ".c.0f").mkdir()
        (storage.local("b") / ".c.0f" / "d").write_text("x")
        (storage.local("") / ".lock").touch()
        assert len(list(storage.local("").rglob(".*"))) >= 2
    assert storage.list() == ["a", "b/10", "b/2", "b/c/d", "bb/e"]
    assert storage.list("b") == ["b/10", "b/2", "b/c/d"]
    assert storage.list("b/c") == ["b/c/d"]
    assert storage.list("nothing") == []


def test_remove_takes_files_and_whole_folders_and_nothing_else(storage: Storage) -> None:
    for name in ("a/1", "a/b/2", "ab/3"):
        storage.write_bytes(name, b"x")
    storage.remove("a")
    storage.remove("a")
    assert storage.list() == ["ab/3"]
    storage.remove("ab/3")
    assert storage.list() == []


# -- names and scopes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_out_are_refused_by_every_method(
    storage: Storage, name: str, tmp_path: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: storage.read_bytes(name),
        lambda: storage.read_json(name),
        lambda: storage.write_bytes(name, b""),
        lambda: storage.write_json(name, {}),
        lambda: storage.create(name, b""),
        lambda: storage.append_line(name, ""),
        lambda: storage.exists(name),
        lambda: storage.list(name),
        lambda: storage.remove(name),
        lambda: storage.local(name),
        lambda: storage.publish(tmp_path, name),
        lambda: storage.sha256(name),
        lambda: storage.writing(name).__enter__(),
    ]
    for call in calls:
        with pytest.raises(Refused, match="not a name inside a run"):
            call()


@given(parts=st.lists(st.sampled_from(["..", ".", "", "a", "b c", "é", "..."]), max_size=5))
def test_a_name_is_either_refused_or_inside(parts: list[str]) -> None:
    place, name = Storage("/nowhere/run"), "/".join(parts)
    try:
        path = place.local(name)
    except Refused:
        assert not name or name.startswith("/") or {"", ".", ".."} & set(parts)
    else:
        inside = os.path.normpath(path)
        assert inside == "/nowhere/run" or inside.startswith("/nowhere/run/")


def test_scoped_handle_reads_and_writes_only_what_it_was_given(storage: Storage) -> None:
    for name in ("commons/a", "shards/s0/a", "shards/s00/a", "shards/s1/a", "manifest.json"):
        storage.write_bytes(name, b"x")
    island = storage.scoped(read=["commons", "shards/s0"], write=["islands/s0"])
    assert island.read_bytes("commons/a") == b"x"
    assert island.list("shards/s0") == ["shards/s0/a"]
    island.write_bytes("islands/s0/y", b"y")
    assert island.read_bytes("islands/s0/y") == b"y"
    denied: list[Callable[[], Any]] = [
        lambda: island.read_bytes("manifest.json"),
        lambda: island.read_bytes("shards/s1/a"),
        lambda: island.read_bytes("shards/s00/a"),
        lambda: island.list(),
        lambda: island.list("shards"),
        lambda: island.exists("shards/s1"),
        lambda: island.local("shards/s1"),
        lambda: island.sha256("manifest.json"),
        lambda: island.write_bytes("commons/a", b"y"),
        lambda: island.create("shards/s0/b", b"y"),
        lambda: island.remove("shards/s0/a"),
        lambda: island.append_line("islands/s1/log", "y"),
        lambda: island.publish(Path("/tmp"), "islands"),
    ]
    for call in denied:
        with pytest.raises(PermissionError, match=r"this handle may not (read|write)"):
            call()
    assert storage.list("islands") == ["islands/s0/y"]


@pytest.mark.parametrize("uri", ["nosuch://place", "s4://bucket/run"])
def test_unknown_kind_of_place_is_a_data_error(uri: str) -> None:
    with pytest.raises(DataError, match="not a place that fsspec can open"):
        Storage(uri)


# -- folders and digests -------------------------------------------------------------------------


def test_publish_replaces_whole_and_keeps_nothing_of_before(
    storage: Storage, tmp_path: Path
) -> None:
    storage.publish(make(tmp_path / "one", a="1", sub__b="2"), "islands/s/expert")
    assert storage.list() == ["islands/s/expert/a", "islands/s/expert/sub/b"]
    storage.publish(make(tmp_path / "two", c="3", atoll_dot_json="{}"), "islands/s/expert")
    assert storage.list() == ["islands/s/expert/atoll.json", "islands/s/expert/c"]
    local = storage.local("islands/s/expert")
    assert {p.name: p.read_text() for p in local.iterdir()} == {"c": "3", "atoll.json": "{}"}
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["atoll.json", "c"]


@pytest.mark.parametrize("leave", [0, 1, 2])
def test_a_file_is_replaced_only_where_that_is_allowed_first_and_last(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    """Who may write is asked again when the data is on the disk, which may take a while."""
    steps: list[str] = []
    storage.write_bytes("x/metrics", b"heir")
    monkeypatch.setattr("atoll.core.storage.fsync", lambda path: steps.append(Path(path).name))

    def check() -> None:
        steps.append("asked")
        assert storage.read_bytes("x/metrics") == b"heir"
        if steps.count("asked") > leave:
            raise Fenced("another has taken over")

    wanted = 2 if storage.is_local else 1
    with contextlib.nullcontext() if leave >= wanted else pytest.raises(Fenced):
        storage.write_bytes("x/metrics", b"mine", check=check)
    assert storage.read_bytes("x/metrics") == (b"mine" if leave >= wanted else b"heir")
    assert storage.list() == ["x/metrics"]
    assert steps[0] == "asked"
    if storage.is_local:
        assert [path.name for path in storage.local("x").iterdir()] == ["metrics"]
        assert leave == 0 or ("metrics" in steps[1] and steps[2] == "asked")


def test_writing_folder_publishes_only_what_ended_well(storage: Storage) -> None:
    with storage.writing_folder("x/expert") as folder:
        make(folder, a="1")
    with contextlib.suppress(RuntimeError), storage.writing_folder("x/expert") as folder:
        make(folder, b="2")
        raise RuntimeError
    assert storage.list() == ["x/expert/a"]


def test_who_has_lost_the_right_to_a_folder_changes_nothing_of_it(
    storage: Storage, tmp_path: Path
) -> None:
    storage.publish(make(tmp_path / "heir", atoll_dot_json="heir"), "x/expert")

    def lost() -> None:
        raise Fenced("another has taken over")

    with pytest.raises(Fenced):
        storage.publish(make(tmp_path / "zombie", a="zombie"), "x/expert", check=lost)
    assert storage.read_bytes("x/expert/atoll.json") == b"heir"
    with pytest.raises(Fenced), storage.writing_folder("x/expert", check=lost) as folder:
        make(folder, a="zombie")
    assert storage.list() == ["x/expert/atoll.json"]
    assert storage.read_bytes("x/expert/atoll.json") == b"heir"


def test_a_local_file_is_put_whole_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(b"12345")
    heard: list[int] = []
    storage.put(file, "x/y", advance=heard.append)
    assert storage.read_bytes("x/y") == b"12345"
    assert sum(heard) == 5

    def lost() -> None:
        raise Fenced("another has taken over")

    file.write_bytes(b"67")
    with pytest.raises(Fenced):
        storage.put(file, "x/y", check=lost)
    assert storage.read_bytes("x/y") == b"12345"


def test_who_loses_it_while_uploading_uploads_no_more(tmp_path: Path) -> None:
    place, asked = Storage("memory://lost-meanwhile"), []

    def check() -> None:
        asked.append(place.list())
        if len(asked) == 3:
            raise Fenced("another has taken over")

    with pytest.raises(Fenced):
        place.publish(
            make(tmp_path / "x", a="1", b="2", atoll_dot_json="{}"), "expert", check=check
        )
    assert place.list() == ["expert/a"]


def test_on_object_stores_the_marker_comes_last_and_goes_first(tmp_path: Path) -> None:
    place, done = Storage("memory://marker"), []
    put, remove = place.put, place.remove
    place.put = lambda file, name, **_: (done.append(name), put(file, name))  # type: ignore
    place.remove = lambda name: (done.append(f"-{name}"), remove(name))  # type: ignore
    files = {"atoll_dot_json": "{}", "weights": "w", "sub__z": "z", "config_dot_json": "{}"}
    place.write_bytes("expert/old", b"")
    place.publish(make(tmp_path / "x", **files), "expert")
    markers = [f"-expert/{name}" for name in reversed(MARKERS)]
    assert done[: len(markers)] == markers
    assert done[len(markers) :] == [
        "expert/sub/z", "expert/weights", "expert/config.json", "-expert/old", "expert/atoll.json"
    ]  # fmt: skip
    place.publish(make(tmp_path / "none"), "expert")
    assert place.list() == []


def test_lines_are_read_back_but_for_torn_ones(storage: Storage) -> None:
    assert list(storage.read_lines("journal.jsonl")) == []
    for number in range(3):
        storage.append_line("journal.jsonl", json.dumps({"n": number}))
    torn = storage.read_bytes("journal.jsonl") + b'[1]\n{"n": 3, "half\xff'
    storage.write_bytes("journal.jsonl", torn)
    assert [line["n"] for line in storage.read_lines("journal.jsonl")] == [0, 1, 2]


def test_listings_are_never_remembered(storage: Storage) -> None:
    assert not storage._fs.dircache.use_listings_cache
    assert storage.list("gen") == []
    Storage(storage.uri).create("gen/000001.json", b"{}")
    assert storage.list("gen") == ["gen/000001.json"]


def test_a_staged_copy_never_holds_what_was_removed_since(storage: Storage) -> None:
    storage.write_bytes("x/a", b"1")
    storage.write_bytes("x/b", b"2")
    both = storage.sha256("x")
    storage.remove("x/b")
    assert storage.sha256("x") != both
    assert [p.name for p in storage.local("x").iterdir()] == ["a"]
    assert storage.local("x/a").read_bytes() == b"1"
    assert (storage.local("") / "x" / "a").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        storage.sha256("nothing")


def test_sha256_is_what_coreutils_say(storage: Storage, tmp_path: Path) -> None:
    files = {"b": "1", "a__z": "2", "a__b": "3", "a_dot_x": "4", "é_dot_t": "5", "A": "", "a0": "6"}
    folder = make(tmp_path / "folder", **files)
    recipe = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    printed = subprocess.run(
        ["bash", "-c", recipe], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert sha256_folder(folder) == printed.split()[0]
    storage.publish(folder, "x/folder")
    assert storage.sha256("x/folder") == printed.split()[0]
    storage.write_bytes("y", b"data" * 100_000)
    assert storage.sha256("y") == hashlib.sha256(b"data" * 100_000).hexdigest()


@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove", "move"])
def test_sha256_of_a_folder_sees_every_change(change: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "x", a="1", b="2", sub__c="3")
    before = sha256_folder(folder)
    {
        "edit": lambda: (folder / "a").write_text("9"),
        "rename": lambda: (folder / "a").rename(folder / "aa"),
        "add": lambda: (folder / "d").write_text(""),
        "remove": lambda: (folder / "b").unlink(),
        "move": lambda: (folder / "a").rename(folder / "sub" / "a"),
    }[change]()
    assert sha256_folder(folder) != before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    run, before = Storage(tmp_path / "run"), os.umask(mask)
    try:
        with run.writing_folder("x/expert") as folder:
            save_file({"w": torch.zeros(1)}, folder / "w.safetensors")  # private by itself
            make(folder, sub__a="1")
        with run.writing("pack.safetensors") as path:
            save_file({"w": torch.zeros(1)}, path)
        run.write_bytes("plain", b"")
        run.create("exclusive", b"")
    finally:
        os.umask(before)
    for path in run.local("").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# -- no space left -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_no_space_is_a_failure_that_leaves_what_was_there(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(tmp_path / "run")
    run.write_bytes("a/x", b"before")
    run.publish(make(tmp_path / "one", a="1"), "a/folder")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def save_full(path: Path) -> None:
        path.write_bytes(b"torn")
        full()

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
        monkeypatch.setattr("shutil.copytree", full)
    writes: list[Callable[[], Any]] = [
        lambda: run.write_bytes("a/x", b"after"),
        lambda: run.write_json("a/x", {}),
        lambda: run.create("a/new", b"after"),
        lambda: run.publish(tmp_path / "one", "a/folder"),
    ]
    for write in writes:
        with pytest.raises(Failed, match=r"No space left.*Cure: free some space") as caught:
            write()
        assert caught.value.exit_code == ExitCode.FAILED == 1
    monkeypatch.undo()
    assert run.read_bytes("a/x") == b"before"
    assert run.list() == ["a/folder/a", "a/x"]
    assert [p.name for p in (tmp_path / "run/a").iterdir() if p.name.startswith(".")] == []


def test_no_space_while_the_content_is_made_is_a_failure_too(storage: Storage) -> None:
    with pytest.raises(Failed), storage.writing_folder("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(Failed), storage.writing("y"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert storage.list() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_no_space_reported_by_a_real_device(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    with pytest.raises(Failed), run.writing("x"), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_no_space_in_the_words_of_safetensors_is_a_failure(storage: Storage) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(Failed), storage.writing("x"):
        raise SafetensorError(said)
    with pytest.raises(SafetensorError), storage.writing("x"):
        raise SafetensorError("Error while serializing: something else")


def test_other_errors_of_the_system_keep_their_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        Storage(tmp_path).write_bytes("file/below", b"")


def test_canonical_json_round_trips() -> None:
    value = {"b": 0.1 + 0.2, "a": [2**53 + 1, 1e-300, "\x1f\n"]}
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_digest_of_a_file_is_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert sha256_file(tmp_path / "x") == hashlib.sha256().hexdigest()
