"""Every refusal says why, has its exit code, and leaves what was there as it was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.core import disk
from atoll.core.digest import sha256_folder
from atoll.core.errors import AtollError, Failed, MissingError, Refused, UsageError
from atoll.merge import exact, soup
from atoll.merge.recipe import Settings
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS
from atoll.merge.weights import Weights
from tests.waiting import PATIENCE_SECONDS


@pytest.fixture
def pair(make_expert, tmp_path) -> Path:
    """A soup of a and b."""
    return soup.create(tmp_path / "soup", {make_expert("a"): 1, make_expert("b"): 1}).place


def refused(kind: type[AtollError], folder: Path, call, *words: str) -> AtollError:
    """`call` fails as it should, and neither changed the soup nor left anything beside it."""
    before, beside = sha256_folder(folder), sorted(os.listdir(folder.parent))
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert sha256_folder(folder) == before
    assert sorted(os.listdir(folder.parent)) == beside
    return caught.value


@pytest.mark.parametrize(
    ("card", "word"),
    [
        ({"base_sha256": "c" * 64}, "base_sha256"),
        ({"family": "pixart"}, "family"),
        ({"prediction": "epsilon"}, "prediction"),
        (
            {"schedule": {"beta_schedule": "squaredcos_cap_v2"}},
            "schedule: our linear path and beta_schedule",
        ),
        ({"latent_space": "sd-vae"}, "latent_space"),
    ],
)
def test_strangers(make_expert, pair, card, word):
    stranger = make_expert("z", **card)
    error = refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), word, "'a' and 'z'")
    assert error.exit_code == 7
    with pytest.raises(Refused):
        soup.create(pair.parent / "new", {pair.parent / "experts" / "a": 1, stranger: 1})
    assert not (pair.parent / "new").exists()


def test_without_a_base_or_of_another_kind(make_expert, pair):
    rootless = make_expert("z", base_sha256=None)
    refused(Refused, pair, lambda: soup.add(pair, {rootless: 1}), "names no base")
    base = make_expert("base", kind="base", base_sha256=None)
    refused(Refused, pair, lambda: soup.add(pair, {base: 1}), "base_sha256", sha256_folder(base))


def test_soups_of_soups(make_expert, pair):
    cooked = soup.create(pair.parent / "other", {make_expert("c"): 1}).place
    refused(Refused, pair, lambda: soup.add(pair, {cooked: 1}), "name its ingredients")


def change_file(path: Path, change) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("conv_in.bias"), "conv_in.bias"),
        (lambda state: state.update(extra=torch.zeros(2)), "extra"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(5)}), "conv_in.bias"),
        (lambda s: s.update({"conv_in.bias": s["conv_in.bias"].int()}), "conv_in.bias"),
        (lambda s: s.update({"conv_in.bias": s["conv_in.bias"].double()}), "F64"),
        (lambda s: s["conv_in.bias"].fill_(float("nan")), "NaN"),
        (
            lambda s: s["conv_out.weight"][0, 0].fill_(float("inf")),
            "'z' holds NaN or infinity in tensor 'conv_out.weight'",
        ),
    ],
)
def test_other_tensors(make_expert, pair, change, word):
    stranger = make_expert("z")
    change_file(stranger, change)
    refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), word)


def test_integer_tensors_that_differ(make_expert, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    change_file(a, lambda state: state.update(counts=torch.arange(9)))
    change_file(b, lambda state: state.update(counts=torch.arange(9).flip(0)))
    with pytest.raises(Refused, match="'counts' differs between 'a' and 'b'"):
        soup.create(tmp_path / "soup", {a: 1, b: 1})
    assert sorted(os.listdir(tmp_path)) == ["experts"]


def test_another_configuration(make_expert, pair):
    stranger = make_expert("z")
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(config | {"norm_eps": 0.5}))
    refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), "norm_eps")
    notes = {"_diffusers_version": "0.1", "_name_or_path": "/home"}
    (stranger / "config.json").write_text(json.dumps(config | notes))
    soup.add(pair, {stranger: 1})  # who wrote it is no part of the network


def test_two_of_one_name(make_expert, pair, tmp_path):
    twin = make_expert("a", folder=tmp_path / "twin")
    refused(Refused, pair, lambda: soup.add(pair, {twin: 1}), "Two ingredients are named 'a'")
    with pytest.raises(Refused):
        soup.create(tmp_path / "new", {twin: 1, tmp_path / "experts" / "a": 1})


@pytest.mark.parametrize("weight", [0, -1, 0.5, 1.0, True, "2"])
def test_weights_that_are_no_positive_integers(make_expert, pair, weight):
    error = refused(
        UsageError, pair, lambda: soup.add(pair, {make_expert("c"): weight}), "positive integer"
    )
    assert error.exit_code == 2


def test_weights_that_add_up_to_too_much(make_expert, pair):
    call = {make_expert("c"): exact.MAX_TOTAL - 1}
    refused(UsageError, pair, lambda: soup.add(pair, call), str(exact.MAX_TOTAL))
    soup.add(pair, {path: weight - 1 for path, weight in call.items()})


def test_what_is_not_there(make_expert, pair, tmp_path):
    refused(UsageError, pair, lambda: soup.add(pair, {tmp_path / "nobody": 1}), "nobody")
    refused(UsageError, pair, lambda: soup.remove(pair, "bb"), "Did you mean 'b'?", "a, b")
    for call in (soup.show, verify, lambda path: soup.remove(path, "a")):
        with pytest.raises(UsageError, match="no soup"):
            call(tmp_path / "experts" / "a")
    with pytest.raises(UsageError, match="at least one"):
        soup.create(tmp_path / "new", {})
    weightless = make_expert("c")
    (weightless / WEIGHTS).unlink()
    refused(MissingError, pair, lambda: soup.add(pair, {weightless: 1}), "no weights")


def test_the_last_ingredient(pair):
    soup.remove(pair, "a")
    refused(Refused, pair, lambda: soup.remove(pair, "b"), "last ingredient")


def test_an_ingredient_that_changed_or_went_away(make_expert, pair, tmp_path):
    newcomer, b = make_expert("c"), tmp_path / "experts" / "b"
    change_file(b, lambda state: state["conv_in.bias"].add_(1))
    refused(Refused, pair, lambda: soup.add(pair, {newcomer: 1}), "'b'", "sha256")
    refused(Refused, pair, lambda: soup.remove(pair, "a"), "'b'")
    b.rename(tmp_path / "experts" / "hidden")
    (tmp_path / "experts" / "hidden" / "atoll.json").unlink()
    error = refused(UsageError, pair, lambda: soup.remove(pair, "a"), "--ingredients DIR")
    assert error.exit_code == 2
    soup.remove(pair, "b")  # needs only what stays


def test_a_place_that_is_taken(pair, tmp_path):
    a = tmp_path / "experts" / "a"
    refused(Refused, pair, lambda: soup.create(pair, {a: 1}), "another soup")
    refused(Refused, a, lambda: soup.create(a, {a: 1}), "holds no soup")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refused):
        soup.create(tmp_path / "file", {a: 1})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.update(schema_version=2),
        lambda values: values.update(surprise=1),
        lambda values: values.update(ingredients=[]),
        lambda values: values.update(ingredients=values["ingredients"][::-1]),
        lambda values: values["ingredients"][0].update(weight=0),
        lambda values: values.update(dtype="float8"),
        lambda values: values.pop("base_sha256"),
    ],
)
def test_a_recipe_of_another_schema_or_damaged(pair, damage):
    values = json.loads((pair / "soup.json").read_text())
    damage(values)
    (pair / "soup.json").write_text(json.dumps(values))
    refused(Refused, pair, lambda: soup.remove(pair, "a"), "soup.json")
    (pair / "soup.json").write_text("{")
    refused(Refused, pair, lambda: soup.show(pair), "not readable")


def test_files_from_strangers(make_expert, pair):
    stranger = make_expert("z")
    whole = (stranger / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for data in (
        b"",
        whole[:100],
        whole[:-1],
        whole + b"x",
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole[: 8 + length].replace(b'"shape":[4]', b'"shape":[5]', 1) + whole[8 + length :],
    ):
        (stranger / WEIGHTS).write_bytes(data)
        refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), "not a safetensors file")
    (stranger / WEIGHTS).unlink()
    for index, word in (
        ("[]", "not an index"),
        ('{"weight_map": {"x": "../../a/diffusion_pytorch_model.safetensors"}}', "outside"),
        ('{"weight_map": {"x": 3}}', "outside"),
    ):
        (stranger / f"{WEIGHTS}.index.json").write_text(index)
        refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), word)


def tensor(name: str = "a", **changes: object) -> str:
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes
    return f'"{name}": {json.dumps(entry)}'


HALF = tensor(shape=[8], data_offsets=[0, 32])


@pytest.mark.parametrize(
    "header",
    [
        f"{{{tensor()}, {tensor()}}}",
        f"{{{HALF}, {tensor(shape=[8], data_offsets=[32, 64])}}}",
        f"{{{HALF}, {tensor('b', shape=[12], data_offsets=[16, 64])}}}",
        f"{{{HALF}}}",
        f"{{{tensor(shape=[-16])}}}",
        f"{{{tensor(data_offsets=[-64, 0])}}}",
        f"{{{tensor(data_offsets=[0, 2**63])}}}",
        f"{{{tensor(shape=[2**62, 4])}}}",
        f"{{{tensor(shape=[16.0])}}}",
        f"{{{tensor(dtype='BF16')}}}",
        f"{{{tensor(dtype='F33')}}}",
        f"{{{tensor(dtype='F8_E4M3', shape=[64])}}}",
        f'{{"__metadata__": {{"a": 3}}, {tensor()}}}',
        "[" * 100_000,
        "",
    ],
    ids=[
        "the same twice", "twice", "overlapping", "with a hole", "negative shape",
        "negative offset", "beyond the end", "huge", "no whole number", "other dtype",
        "unknown dtype", "of 8 bits", "metadata", "deep", "none",
    ],
)  # fmt: skip
def test_hostile_headers(make_expert, pair, header):
    stranger = make_expert("z")
    text = header.encode()
    (stranger / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    refused(Refused, pair, lambda: soup.add(pair, {stranger: 1}), str(stranger))


@pytest.mark.parametrize(
    ("where", "code"),
    [("write", errno.ENOSPC), ("fsync", errno.EDQUOT), ("swap", errno.ENOSPC)],
)
def test_no_space_left(make_expert, pair, monkeypatch, code, where):
    newcomer = make_expert("c")

    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(os, "pwrite", full)
        elif where == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(disk, "_exchange", full)
        error = refused(Failed, pair, lambda: soup.add(pair, {newcomer: 1}), "No space left")
        assert error.exit_code == 1
    soup.add(pair, {newcomer: 1})
    assert verify(pair).holds


def _hold(folder: Path, ready, release) -> None:
    with disk.replacing(folder, alone=True) as partial:
        (partial / "x").write_text("half")
        ready.set()
        release.wait(PATIENCE_SECONDS)
        raise SystemExit


def test_a_second_writer(make_expert, pair):
    newcomer = make_expert("c")
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(pair, ready, release))
    other.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        refused(Refused, pair, lambda: soup.add(pair, {newcomer: 1}), "at work")
    finally:
        release.set()
        other.join()
    soup.add(pair, {newcomer: 1})


def test_a_dtype_that_is_too_narrow(make_expert, tmp_path):
    big = make_expert("a", change=lambda state: state["conv_in.bias"].fill_(1e5))
    with pytest.raises(Refused, match=r"'conv_in.bias' does not fit into float16"):
        soup.create(tmp_path / "soup", {big: 1}, Settings(dtype="float16"))
    soup.create(tmp_path / "soup", {big: 1}, Settings(dtype="bfloat16"))


def test_a_file_that_shrinks_while_it_is_read(make_expert):
    expert = make_expert("a")
    with Weights([expert / WEIGHTS]) as weights:
        last = max(weights.layout, key=lambda name: (weights.layout[name].count, name))
        os.truncate(expert / WEIGHTS, 5000)
        piece = torch.empty(weights.layout[last].count)
        with pytest.raises(Refused, match="shorter"):
            weights.read(last, 0, piece)


def test_leaving_one_out(make_expert, pair, tmp_path):
    a, b = make_expert("a"), make_expert("b")
    half, odd = make_expert("c", dtype=torch.float16), make_expert("d")
    card = json.loads((odd / "atoll.json").read_text())
    (odd / "atoll.json").write_text(json.dumps(card | {"name": "x/y"}))
    loo = tmp_path / "soup"  # where another soup stands already
    before = sha256_folder(loo)
    with pytest.raises(UsageError, match="another"):
        soup.leave_one_out(loo, {a: 1})
    with pytest.raises(Refused, match="several dtypes"):
        soup.leave_one_out(loo, {a: 1, b: 1, half: 1})
    with pytest.raises(Refused, match="no folder can be"):
        soup.leave_one_out(loo, {a: 1, odd: 1})
    assert sha256_folder(loo) == before
    # One place of several that is taken: none of the others is written.
    out = tmp_path / "loo"
    (out / "without-b").mkdir(parents=True)
    (out / "without-b" / "mine").write_text("mine")
    with pytest.raises(Refused, match="holds no soup"):
        soup.leave_one_out(out, {a: 1, b: 1, half: 1}, Settings(dtype="float32"))
    assert os.listdir(out) == ["without-b"]
    (out / "without-b" / "mine").unlink()
    soup.leave_one_out(out, {a: 1, b: 1, half: 1}, Settings(dtype="float32"))
    with pytest.raises(Refused, match="another soup"):
        soup.leave_one_out(out, {a: 1, b: 2, half: 1}, Settings(dtype="float32"))


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_soup_that_a_killed_writer_had_set_aside_is_changed(make_expert, pair, change):
    """Between the two renames by which a folder is replaced."""
    pair.rename(disk._old(pair))
    if change == "add":
        soup.add(pair, {make_expert("c"): 1})
    else:
        soup.remove(pair, "a")
    assert verify(pair).holds
    assert sorted(os.listdir(pair.parent)) == ["experts", "soup"]


KILLED = """
import os, signal, sys
from pathlib import Path
from atoll.merge import soup, stream

left, put = int(sys.argv[3]), stream._Sink.put

def killed(sink, data):
    global left
    put(sink, data)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

stream._Sink.put, stream._PIECE_BYTES = killed, 4096
soup.add(Path(sys.argv[1]), {Path(sys.argv[2]): 1})
"""


@pytest.mark.parametrize("pieces", [1, 2, 20])
def test_a_kill_in_the_middle_of_writing_leaves_the_soup_as_it_was(make_expert, pair, pieces):
    before, third = sha256_folder(pair), make_expert("c")
    made = subprocess.run(
        [sys.executable, "-c", KILLED, str(pair), str(third), str(pieces)], check=False
    )
    assert made.returncode == -signal.SIGKILL
    assert sha256_folder(pair) == before
    soup.add(pair, {third: 1})
    assert sorted(os.listdir(pair.parent)) == ["experts", "soup"]
    assert verify(pair).holds
    soup.remove(pair, "c")
    assert sha256_folder(pair) == before
