"""Experts that lie on object storage: the same soup, and no file of theirs fetched whole."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import sha256_file, sha256_folder
from atoll.core.errors import DataError, Refused, UsageError
from atoll.core.storage import Storage
from atoll.merge import soup, stream
from atoll.merge.far import place_of
from atoll.merge.model import FILE_NAME
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS


@pytest.fixture
def uploaded() -> Iterator[Callable[[Path], str]]:
    """Puts a local folder or file on a store and gives its URI."""
    fs, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"

    def put(path: Path, place: str = "") -> str:
        fs.put(str(path), f"{root}/{place or path.name}", recursive=path.is_dir())
        return f"memory:/{root}/{place or path.name}"

    yield put
    fs.rm(root, recursive=True)


def test_a_soup_of_uris_is_that_of_the_files(make_expert, uploaded, tmp_path):
    paths = [make_expert(name) for name in "abc"]
    expected = soup.create(tmp_path / "soup", dict(zip(paths, (1, 2, 3), strict=True))).place
    uris = [uploaded(path) for path in paths]
    out = soup.create(tmp_path / "far", {uris[0]: 1, paths[1]: 2, uris[2] + "/": 3}).place
    assert sha256_file(out / WEIGHTS) == sha256_file(expected / WEIGHTS)
    recipe = json.loads((out / "soup.json").read_text())
    assert [part["path"] for part in recipe["ingredients"]] == [
        uris[0], "../experts/b", uris[2] + "/",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "experts" / "a")
    assert verify(out).holds
    before = sha256_folder(out)
    soup.add(out, {uploaded(make_expert("d")): 1})
    soup.remove(out, "d")
    assert sha256_folder(out) == before


def test_what_is_afar_is_read_in_pieces_and_once(make_expert, uploaded, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE_BYTES", 4096)
    uri = uploaded(path := make_expert("a"))
    asked: list[tuple[int, int]] = []
    read = Storage.read_ranges

    def spy(self: Storage, ranges: Any) -> Any:
        asked.extend((start, end) for name, start, end in ranges if name == WEIGHTS)
        return read(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", spy)
    soup.create(tmp_path / "soup", {uri: 1})
    size = (path / WEIGHTS).stat().st_size
    header = asked[1][1]
    assert asked[:2] == [(0, 8), (0, header)]
    assert max(end - start for start, end in asked[2:]) <= max(4096, header)
    assert sum(end - start for start, end in asked[2:]) == size


def test_a_file_a_component_and_a_base_afar(make_expert, uploaded, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "one.safetensors")
    made = soup.create(tmp_path / "file", {uploaded(tmp_path / "one.safetensors"): 1})
    assert made.recipe.ingredients[0].name == "one"
    assert (made.place / FILE_NAME).is_file()

    whole = tmp_path / "whole"
    unet = make_expert("a", folder=whole / "unet")
    (unet / CARD_NAME).unlink()
    (whole / "model_index.json").write_text("{}")
    base = make_expert("base", kind="base", base_sha256=None)
    uri, base_uri = uploaded(whole), uploaded(base)
    made = soup.create(tmp_path / "component", {f"{uri}/unet": 1}, base=base_uri)
    assert [part.name for part in made.recipe.ingredients] == ["whole"]
    assert made.recipe.base_sha256 == sha256_folder(base)
    (base / CARD_NAME).unlink()
    made = soup.create(tmp_path / "other", {f"{uri}/unet": 1}, base=uploaded(base, "bare"))
    assert made.recipe.base_sha256 == sha256_file(base / WEIGHTS)
    assert verify(made.place).holds


def test_a_pipeline_afar(make_expert, uploaded, tmp_path):
    whole = tmp_path / "whole"
    (make_expert("a", folder=whole / "unet") / CARD_NAME).unlink()
    (whole / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"], "_x": 1}))
    made = soup.create(tmp_path / "soup", {uploaded(whole): 1})
    assert (made.place / "unet" / WEIGHTS).is_file()
    assert verify(made.place).holds


def test_what_is_not_afar_is_refused(uploaded, tmp_path):
    (tmp_path / "huge.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))
    huge = uploaded(tmp_path / "huge.safetensors")
    for uri, kind, words in (
        (f"{huge}-no", UsageError, "There is nothing at"),
        (huge.replace("huge", "none"), UsageError, "There is nothing at"),
        (huge, Refused, "its header is huge"),
    ):
        with pytest.raises(kind, match=words):
            soup.create(tmp_path / "soup", {uri: 1})
    (tmp_path / "short.safetensors").write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(Refused, match="not a safetensors file"):
        soup.create(tmp_path / "soup", {uploaded(tmp_path / "short.safetensors"): 1})
    assert not (tmp_path / "soup").exists()


def test_what_is_here_is_not_asked_for_afar(make_expert, uploaded, tmp_path, monkeypatch):
    path = make_expert("a")
    out = soup.create(tmp_path / "soup", {uploaded(path): 1}).place
    monkeypatch.setattr(Storage, "exists", None)
    monkeypatch.setattr(Storage, "list", None)
    assert verify(out, search=[path.parent]).holds


def test_a_uri_of_this_disk_is_a_path_and_one_with_a_secret_is_refused(make_expert, tmp_path):
    path = make_expert("a")
    assert place_of(f"file://{path}/../a") == place_of(str(path)) == path
    assert place_of("s3://b/a") == "s3://b/a"
    for uri in ("http://u:secret@h/a.safetensors", "https://h/a.safetensors?token=secret"):
        with pytest.raises(Refused) as caught:
            soup.create(tmp_path / "soup", {uri: 1})
        assert "secret" not in str(caught.value).replace("without secrets", "")


def test_a_revision_is_no_part_of_a_name(make_expert, uploaded, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "one@2.safetensors")
    path = make_expert("a")
    (path / CARD_NAME).unlink()
    uris = [uploaded(tmp_path / "one@2.safetensors"), uploaded(path, "sd@main")]
    names = [
        soup.create(tmp_path / str(n), {uri: 1}).recipe.ingredients[0].name
        for n, uri in enumerate(uris)
    ]
    assert names == ["one@2", "sd"]


def test_a_file_of_an_expert_afar_keeps_its_shard(make_expert, uploaded, tmp_path):
    uri = uploaded(make_expert("a"))
    made = soup.create(tmp_path / "soup", {f"{uri}/{WEIGHTS}": 1})
    assert made.recipe.shards == ["shard-a"]


@pytest.mark.parametrize("serving", ["all of a file", "all but the header", "no size"])
def test_servers_that_serve_no_ranges(make_expert, uploaded, tmp_path, monkeypatch, serving):
    uri = uploaded(make_expert("a"))
    read = Storage.read_ranges

    def whole(self: Storage, ranges: Any) -> Any:
        if serving == "all of a file" or ranges[0][1] or ranges[0][2] > 20_000:
            return [self.read_bytes(name) + b"more" for name, _, _ in ranges]
        return read(self, ranges)

    def unknown(_self: Storage, _name: str) -> int:
        raise TypeError("int() argument must not be NoneType")

    if serving == "no size":
        monkeypatch.setattr(Storage, "size", unknown)
    else:
        monkeypatch.setattr(Storage, "read_ranges", whole)
    with pytest.raises((Refused, DataError), match=r"parts of files|is not understood"):
        soup.create(tmp_path / "soup", {uri: 1})


def test_a_store_that_changes_meanwhile_is_found_out(make_expert, uploaded, tmp_path):
    uri = uploaded(make_expert("a"))
    out = soup.create(tmp_path / "soup", {uri: 1}).place
    fs = fsspec.filesystem("memory")
    name = uri.removeprefix("memory:/")
    data = bytearray(fs.cat_file(f"{name}/{WEIGHTS}"))
    data[-1] ^= 1
    fs.pipe_file(f"{name}/{WEIGHTS}", bytes(data))
    assert "are not those that are in the soup" in verify(out).problems[0]
    fs.pipe_file(f"{name}/{WEIGHTS}", bytes(data[:-9]))
    assert "not a safetensors file" in verify(out).problems[0]
