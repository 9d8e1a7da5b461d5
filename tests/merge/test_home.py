"""Soups that lie on object storage: the same bytes, one writer, and whole or not let pass."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import Failed, Refused, UsageError
from atoll.core.lock import InUse, exclusive
from atoll.core.storage import Storage
from atoll.merge import soup
from atoll.merge.home import Home
from atoll.merge.recipe import RECIPE_NAME, STATE, Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS
from tests.s3 import Gate

STATED = Settings(state=True)


@pytest.fixture
def store() -> Iterator[str]:
    """A place on a store, and nothing there yet."""
    place = f"memory://{uuid.uuid4().hex}"
    yield place
    fs = fsspec.filesystem("memory")
    if fs.exists(place):
        fs.rm(place, recursive=True)


def put(path: Path, place: str) -> str:
    """Upload a folder."""
    target = Storage(place)
    for file in sorted(path.rglob("*")):
        if file.is_file():
            target.put(file, file.relative_to(path).as_posix())
    return place


def content(place: str) -> dict[str, bytes]:
    """Every file there."""
    storage = Storage(place)
    return {name: storage.read_bytes(name) for name in storage.list()}


def fetched(place: str, folder: Path) -> Path:
    """A copy here."""
    for name, data in content(place).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Read(MemoryFileSystem):
    """A store that takes nothing."""

    protocol = "read"

    def pipe_file(self, *_given: Any, **_named: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("settings", [Settings(), STATED])
def test_a_soup_on_a_store_is_the_one_on_a_disk(make_expert, store, tmp_path, settings):
    a, b, c = (make_expert(name) for name in "abc")
    near = soup.create(tmp_path / "near", {a: 1, b: 2}, settings)
    far = soup.create(f"{store}/soup/", {a: 1, b: 2}, settings)
    assert (far.recipe.sha256, far.card) == (near.recipe.sha256, near.card)
    before = content(f"{store}/soup")
    assert set(before) == {f.relative_to(near.place).as_posix()
                           for f in Path(near.place).rglob("*") if f.is_file()}  # fmt: skip
    assert before[WEIGHTS] == (near.place / WEIGHTS).read_bytes()
    # Paths of this machine are whole there: from a store nothing is relative to them.
    assert [part.path for part in far.recipe.ingredients] == [str(a), str(b)]
    assert soup.create(f"{store}/soup", {b: 2, a: 1}, settings).recipe == far.recipe

    soup.add(f"{store}/soup", {c: 1})
    again = soup.create(f"{store}/three", {c: 1, b: 2, a: 1}, settings)
    assert content(f"{store}/soup") == content(f"{store}/three")
    assert verify(f"{store}/soup").holds
    assert Home(f"{store}/soup").sha256_folder() == sha256_folder(
        fetched(f"{store}/soup", tmp_path / "fetched")
    )
    assert soup.show(f"{store}/soup").recipe == again.recipe
    shutil.rmtree(c)  # it need not be there any more
    soup.remove(f"{store}/soup", "shard-c")
    assert content(f"{store}/soup") == before
    with pytest.raises(Refused, match="another soup at memory"):
        soup.create(f"{store}/soup", {a: 1}, settings)


def test_leaving_one_out_on_a_store(make_expert, store, tmp_path):
    experts = {make_expert(name): weight for name, weight in {"a": 1, "b": 2, "c": 3}.items()}
    near, far = (soup.leave_one_out(out, experts) for out in (tmp_path / "loo", f"{store}/loo"))
    assert far["b"].place == f"{store}/loo/without-b"
    for name, one in far.items():
        assert Home(one.place).sha256(WEIGHTS) == sha256_file(near[name].place / WEIGHTS)
        assert verify(one.place).holds


def test_what_lies_on_one_store_is_relative_and_moves_with_it(make_expert, s3: Gate, tmp_path):
    root = f"s3://runs/{tmp_path.name}"
    uris = [put(make_expert(name), f"{root}/experts/{name}") for name in "ab"]
    made = soup.create(f"{root}/soups/all", dict.fromkeys(uris, 1))
    assert [part.path for part in made.recipe.ingredients] == ["../../experts/a", "../../experts/b"]
    assert verify(made.place).holds
    fetched(root, tmp_path / "fetched")
    assert verify(tmp_path / "fetched" / "soups" / "all").holds
    Storage(uris[0]).remove("")
    with pytest.raises(UsageError, match=f"{root}/experts/a"):
        verify(made.place)
    assert verify(made.place, search=[tmp_path / "fetched"]).holds


def test_a_state_afar_is_read_and_the_others_are_not(make_expert, store, tmp_path, monkeypatch):
    paths = [make_expert(name) for name in "abcde"]
    uris = [put(path, f"{store}/experts/{path.name}") for path in paths]
    soup.create(f"{store}/soup", dict.fromkeys(uris[:4], 1), STATED)
    read: list[str] = []
    ranges = Storage.read_ranges

    def spy(self: Storage, asked: Any) -> Any:
        read.extend(f"{self.uri}/{name}" for name, start, _ in asked if start > 8)
        return ranges(self, asked)

    monkeypatch.setattr(Storage, "read_ranges", spy)
    made = soup.add(f"{store}/soup", {uris[4]: 1})
    assert made.plan is not None
    assert made.plan.from_state
    assert set(read) == {f"{store}/soup/{STATE}/{WEIGHTS}", f"{uris[4]}/{WEIGHTS}"}
    monkeypatch.undo()
    assert made.recipe.sha256 == soup.create(tmp_path / "s", dict.fromkeys(uris, 1)).recipe.sha256
    # A state that is damaged costs time and nothing else.
    state = Storage(f"{store}/soup/{STATE}")
    state.write_bytes(WEIGHTS, state.read_bytes(WEIGHTS)[:-8] + b"\1" * 8)
    soup.remove(f"{store}/soup", "e")
    soup.create(f"{store}/four", dict.fromkeys(uris[:4], 1), STATED)
    assert content(f"{store}/soup") == content(f"{store}/four")


def test_sums_that_one_float64_does_not_hold_are_kept_afar_too(make_expert, store):
    def wide(state: dict[str, Any]) -> None:
        state["conv_in.bias"][0] = 2.0**60

    a = make_expert("a", change=wide)
    b, c = make_expert("b"), make_expert("c")
    soup.create(f"{store}/soup", {a: 1, b: 1}, STATED)
    assert any(name.endswith(".rest.safetensors") for name in content(f"{store}/soup"))
    before = content(f"{store}/soup")
    assert soup.add(f"{store}/soup", {c: 1}).plan is not None
    assert verify(f"{store}/soup").holds
    soup.remove(f"{store}/soup", "c")
    assert content(f"{store}/soup") == before


def test_what_is_no_part_of_the_soup_goes(make_expert, store):
    a, b = make_expert("a"), make_expert("b")
    made = soup.create(f"{store}/soup", {a: 1})
    Storage(made.place).write_bytes(f"{STATE}/{WEIGHTS}", b"of somebody")
    with pytest.raises(Refused, match="header"):
        verify(made.place)
    Storage(made.place).write_bytes(f"{STATE}/more.json", b"of somebody")
    Storage(made.place).remove(f"{STATE}/{WEIGHTS}")
    assert verify(made.place).problems == (f"{STATE}/more.json is no part of this soup",)
    Storage(made.place).write_bytes("README.md", b"of its owner")
    soup.add(made.place, {b: 1})
    assert verify(made.place).holds
    assert set(content(str(made.place))) == {
        "README.md", "atoll.json", "config.json", RECIPE_NAME, WEIGHTS
    }  # fmt: skip


class Killed(BaseException):
    """Not an error that anybody handles."""


@pytest.mark.parametrize("new", [True, False])
def test_whoever_goes_on_the_way_leaves_what_the_same_command_makes_whole(
    make_expert, store, monkeypatch, new
):
    a, b, c = (make_expert(name) for name in "abc")
    place, whole = f"{store}/soup", f"{store}/whole"
    soup.create(whole, {a: 1, b: 1, c: 1}, STATED if new else Settings())
    left = 0

    def counted(act: Any) -> Any:
        def counting(self: Storage, *given: Any, **named: Any) -> Any:
            nonlocal left
            if self.uri == place and "lock.json" not in given:
                left -= 1
                if left < 0:
                    raise Killed
            return act(self, *given, **named)

        return counting

    def change() -> None:
        if new:
            soup.create(place, {a: 1, b: 1, c: 1}, STATED)
        else:
            soup.add(place, {c: 1})

    for step in range(100):
        if not new:
            soup.create(place, {a: 1, b: 1}, STATED)
            Storage(place).remove(STATE)  # as a soup without one would be, but for its recipe
            recipe = json.loads(Storage(place).read_bytes(RECIPE_NAME))
            del recipe["state_sha256"]
            Storage(place).write_json(RECIPE_NAME, recipe)
            Storage(place).write_bytes(f"{STATE}/stale.json", b"{}")
        left = step
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "put", counted(Storage.put))
            patch.setattr(Storage, "remove", counted(Storage.remove))
            try:
                change()
                ended = True
            except Killed:
                ended = False
        assert not Storage(place).exists("lock.json")
        there = content(place)
        if ended:
            assert there == content(whole)
            break
        if there:
            assert not verify(place).holds or there == content(whole)
        if RECIPE_NAME in there and not new:
            recipe = json.loads(there[RECIPE_NAME])
            assert [part["name"] for part in recipe["ingredients"]] == ["a", "b"]
        change()
        assert content(place) == content(whole)
        Storage(place).remove("")
    assert step > 8


KILLED = """
import os, signal, sys
from atoll.core.storage import Storage
from atoll.merge import soup

def killed(self, file, name, **given):
    put(self, file, name, **given)
    if name.endswith(".safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)

put, Storage.put = Storage.put, killed
soup.add(sys.argv[1], {sys.argv[2]: 1})
"""


def test_a_kill_on_s3_leaves_a_lock_that_says_what_to_do(
    make_expert, s3: Gate, tmp_path, monkeypatch
):
    a, b = (put(make_expert(n), f"s3://runs/{tmp_path.name}/{n}") for n in "ab")
    place = f"s3://runs/{tmp_path.name}/soup"
    soup.create(place, {a: 1})
    before = content(place)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, place, b],
        check=False,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    assert ended.returncode == -signal.SIGKILL
    assert not verify(place).holds
    assert list(scratch.glob("atoll-soup-*/*.safetensors"))
    with pytest.raises(InUse, match="Another command") as refused:
        soup.add(place, {b: 1})
    assert f"remove {place}/lock.json" in refused.value.cure
    Storage(place).remove("lock.json")
    soup.add(place, {b: 1})
    assert not list(scratch.glob("atoll-soup-*"))
    assert verify(place).holds
    soup.remove(place, "b")
    assert content(place) == before


def test_places_where_no_soup_can_be_made(make_expert, store, monkeypatch):
    a = make_expert("a")
    with exclusive(Storage(f"{store}/soup")), pytest.raises(InUse):
        soup.create(f"{store}/soup", {a: 1})
    for name in ("notes.txt", "photo.png", "old.ckpt", "org/name/model_index.json"):
        Storage(f"{store}/mine").write_bytes(name, b"mine")
        with pytest.raises(Refused, match="mine is not empty and holds no soup"):
            soup.create(f"{store}/mine", {a: 1})
        assert content(f"{store}/mine") == {name: b"mine"}
        Storage(f"{store}/mine").remove(name)
    with pytest.raises(UsageError, match="a file's name"):
        soup.create(f"{store}/soup.safetensors", {a: 1})
    for odd in ("s3://b//soup", "s3://b/x/../soup", "s3://b/./soup"):
        with pytest.raises(Refused, match="empty parts"):
            soup.create(odd, {a: 1})
    with pytest.raises(Refused, match="password"):
        soup.create("s3://me:secret@bucket/soup", {a: 1})
    fsspec.register_implementation("read", Read, clobber=True)
    for place in ("http://127.0.0.1:9/soup", "read://soup"):
        with pytest.raises(Refused, match=f"Nothing can be written at {place}"):
            soup.create(place, {a: 1})
    for ask in (soup.show, verify, lambda place: soup.add(place, {a: 1})):
        with pytest.raises(UsageError, match=f"There is no soup at {store}/none"):
            ask(f"{store}/none")
    assert not Storage(store).exists("none")
    monkeypatch.setattr("tempfile.tempdir", "/dev/full")
    with pytest.raises((Failed, OSError)):
        soup.create(f"{store}/soup", {a: 1})
    assert not Storage(f"{store}/soup").exists("")


def test_who_loses_the_lock_touches_nothing_more(make_expert, store, monkeypatch):
    """Somebody took it for a dead writer's, and another has been at work since."""
    a, b = make_expert("a"), make_expert("b")
    place = f"{store}/soup"

    def claim(_: object) -> None:
        Storage(place).remove("lock.json")
        soup.create(place, {b: 1})

    with pytest.raises(InUse, match="taken away"):
        soup.create(place, {a: 1}, claim=claim)
    assert verify(place).holds
    assert [part.name for part in soup.show(place).recipe.ingredients] == ["b"]
    # Nor does its end take away another's lock.
    with exclusive(Storage(place)):
        mine = Storage(place).read_bytes("lock.json")
        Storage(place).write_bytes("lock.json", b"{}")
    assert Storage(place).read_bytes("lock.json") == b"{}" != mine


def test_places_are_claimed_before_anything_is_put_there(make_expert, store, tmp_path):
    experts = {make_expert(name): 1 for name in "abc"}
    claimed: list[Any] = []

    def claim(place: Any) -> None:
        assert set(content(place)) <= {"lock.json"}
        claimed.append(place)

    soup.create(f"{store}/soup", experts, claim=claim)
    soup.leave_one_out(f"{store}/loo", experts, claim=claim)
    soup.create(tmp_path / "near", experts, claim=claim)
    loo = [f"{store}/loo/without-{name}" for name in "abc"]
    assert sorted(claimed) == [*loo, f"{store}/soup"]


def test_a_file_that_shrinks_while_it_is_hashed(make_expert, store):
    made = soup.create(f"{store}/soup", {make_expert("a"): 1})
    home = Home(made.place)
    Storage(made.place).write_bytes(WEIGHTS, Storage(made.place).read_bytes(WEIGHTS)[:100])
    with pytest.raises(Refused, match="became shorter"):
        home.sha256(WEIGHTS)
    assert home.sha256("nothing") == ""
