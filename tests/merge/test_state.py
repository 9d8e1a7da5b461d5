"""The running state: exact sums that show no history, and soups changed from them bit by bit."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import canonical_json, sha256_folder
from atoll.core.errors import Refused, UsageError
from atoll.merge import exact, soup, state, stream
from atoll.merge.recipe import Block, Settings
from atoll.merge.sums import add, divide
from atoll.merge.verify import verify
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS
from benchmarks.rounding import rounded
from tests.merge.test_exact import any_bits, bits, like_weights

STATE = Settings(state=True)
SUMS = Path(state.state_name(WEIGHTS))
RESTS = Path(state.rest_name(WEIGHTS))
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def paths(make_expert) -> list[Path]:
    return [make_expert(name) for name in NAMES]


def create(out: Path, paths: list[Path], asked: Settings = STATE) -> Path:
    return soup.create(out, dict.fromkeys(paths, 1), asked).place


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sums_are_exact_and_show_no_history(data):
    dtypes = data.draw(st.lists(st.sampled_from(exact.DTYPES), min_size=1, max_size=6))
    draw = data.draw(st.sampled_from([any_bits, like_weights]))
    seed = data.draw(st.integers(0, 2**31))
    tensors = [draw(dtype, 30, seed=seed + i) for i, dtype in enumerate(dtypes)]
    weights = data.draw(st.lists(st.integers(1, 99), min_size=len(dtypes), max_size=len(dtypes)))
    order = data.draw(st.permutations(range(len(dtypes))))
    stranger = draw(torch.float32, 30, seed=seed + 99)

    def summed(history) -> tuple[Tensor, dict[int, int]]:
        sums, rests = torch.zeros(30, dtype=torch.float64), {}
        for tensor, weight in history:
            add(sums, rests, tensor, weight)
        return sums, rests

    pairs = list(zip(tensors, weights, strict=True))
    sums, rests = summed(pairs)
    for other in (
        summed([pairs[i] for i in order]),
        summed([(stranger, 7), *pairs, (stranger, -7)]),
    ):
        assert torch.equal(sums.view(torch.int64), other[0].view(torch.int64))
        assert rests == other[1]
    wholes = [Fraction(rests.get(i, 0), 2**149) + Fraction(float(s)) for i, s in enumerate(sums)]
    for whole, near, column in zip(
        wholes,
        sums.tolist(),
        zip(*(t.double().tolist() for t in tensors), strict=True),
        strict=True,
    ):
        assert whole == sum(Fraction(v) * w for v, w in zip(column, weights, strict=True))
        assert near == float(whole)  # the nearest
    for dtype in exact.DTYPES:
        means = [rounded(whole / sum(weights), dtype) + 0.0 for whole in wholes]
        wanted = torch.tensor(means, dtype=torch.float64).to(dtype)
        out = torch.empty(30, dtype=dtype)
        if bool(torch.isfinite(wanted).all()):
            divide(sums, rests, sum(weights), out)
            assert bits(out) == bits(wanted)
            continue
        with pytest.raises(exact.NotFiniteError):
            divide(sums, rests, sum(weights), out)


def test_a_soup_with_its_state_is_the_soup_and_can_be_verified(paths, tmp_path):
    out, plain = create(tmp_path / "soup", paths), create(tmp_path / "plain", paths, Settings())
    assert (out / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert soup.show(out).recipe.name == soup.show(plain).recipe.name
    assert "state_sha256" not in json.loads((plain / "soup.json").read_text())
    found, parts = load_file(out / SUMS), [load_file(path / WEIGHTS) for path in paths]
    for name, sums in found.items():
        wanted = sum(part[name].double() for part in parts)
        assert sums.dtype == torch.int64
        assert float((sums.view(torch.float64) - wanted).abs().max()) < 1e-15
    with safe_open(out / SUMS, "pt") as ours, safe_open(out / WEIGHTS, "pt") as theirs:
        assert ours.offset_keys() == theirs.offset_keys()
    assert verify(out).holds
    data = bytearray((out / SUMS).read_bytes())
    data[-3] ^= 1
    (out / SUMS).write_bytes(data)
    assert any(SUMS.as_posix() in problem for problem in verify(out).problems)
    with pytest.raises(Refused, match="soup of soups"):
        soup.create(tmp_path / "next", {out / SUMS: 1})
    with pytest.raises(Refused, match="another soup"):
        create(plain, paths)


def test_a_change_reads_what_changed_and_makes_the_same(paths, make_expert, tmp_path):
    every = create(tmp_path / "every", paths)
    out = create(tmp_path / "soup", paths[:4])
    four = sha256_folder(out)
    # What is not read is not missed: its header is enough.
    data = bytearray((paths[0] / WEIGHTS).read_bytes())
    (paths[0] / WEIGHTS).write_bytes(data[:-4] + b"\x00\x00\x80\x3f")
    made = soup.add(out, {paths[4]: 1})
    (paths[0] / WEIGHTS).write_bytes(data)
    assert made.plan is not None
    assert made.plan.from_state
    size = sum(value.nbytes for value in load_file(paths[0] / WEIGHTS).values())
    assert (made.plan.read_bytes, made.plan.written_bytes) == (3 * size, 3 * size)
    assert sha256_folder(out) == sha256_folder(every)
    left = soup.remove(out, "e")
    assert left.plan is not None
    assert left.plan.from_state
    assert sha256_folder(out) == four
    assert verify(out).holds


@pytest.mark.parametrize("dtype", exact.DTYPES)
def test_the_way_that_moves_less_is_taken(make_expert, tmp_path, dtype):
    """A state has 8 bytes an element: it is of use where all others together have more."""
    paths = [make_expert(name, dtype=dtype) for name in "abcdefgh"]
    width = torch.empty(0, dtype=dtype).element_size()
    out = create(tmp_path / "soup", paths[:1])
    for count in range(2, 9):
        made = soup.add(out, {paths[count - 1]: 1})
        assert made.plan is not None
        assert made.plan.from_state == ((count - 1) * width > 8)
        assert sha256_folder(out) == sha256_folder(create(tmp_path / f"of-{count}", paths[:count]))
    plain = create(tmp_path / "plain", paths[:7], Settings())
    added = soup.add(plain, {paths[7]: 1})
    assert added.plan is not None
    assert not added.plan.from_state
    size = sum(value.nbytes for value in load_file(paths[0] / WEIGHTS).values())
    assert (added.plan.read_bytes, added.plan.written_bytes) == (8 * size, size)


def far_apart(state: dict[str, Tensor]) -> None:
    """An element whose sum with others needs more than 53 bits, and less than 107."""
    value = state["conv_in.weight"].reshape(-1)
    value[5] *= 2.0**-45
    value[6] *= 2.0**30


def test_what_float64_does_not_hold_is_kept_besides(make_expert, tmp_path, monkeypatch):
    paths = [make_expert(name, change=far_apart if name in "bd" else None) for name in NAMES]
    every = create(tmp_path / "every", paths)
    rests = load_file(every / RESTS)
    assert list(rests) == ["conv_in.weight"]
    assert {5, 6} & set(rests["conv_in.weight"][0].tolist())
    assert verify(every).holds
    out = create(tmp_path / "soup", paths[:4])
    four = sha256_folder(out)
    made = soup.add(out, {paths[4]: 1})
    assert made.plan is not None
    assert made.plan.from_state
    assert sha256_folder(out) == sha256_folder(every)
    monkeypatch.setattr(stream, "_PIECE_BYTES", 52)
    monkeypatch.setattr(exact, "CHUNK", 4)
    soup.remove(out, "e")
    assert sha256_folder(out) == four
    assert sha256_folder(create(tmp_path / "again", paths[3::-1])) == four
    monkeypatch.undo()
    # Without those that were far apart there is nothing left over, and no file of it.
    soup.remove(out, "b")
    assert (out / RESTS).is_file()
    soup.add(out, {paths[4]: 1})
    soup.remove(out, "d")
    assert not (out / RESTS).exists()
    assert sha256_folder(out) == sha256_folder(
        create(tmp_path / "ace", [paths[0], paths[2], paths[4]])
    )


def test_what_is_too_far_apart_has_no_state(make_expert, tmp_path):
    def beginning(value: float):
        def change(state: dict[str, Tensor]) -> None:
            state["conv_in.weight"].reshape(-1)[0] = value

        return change

    values = {"a": 1.0, "b": 2.0**-60 * (1 + 2.0**-23), "c": 1e-40}
    paths = [make_expert(name, change=beginning(value)) for name, value in values.items()]
    with pytest.raises(Refused, match=r"'conv_in\.weight' lie so far apart"):
        create(tmp_path / "soup", paths)
    create(tmp_path / "soup", paths, Settings())


def test_many_that_are_left_over_are_too_many(make_expert, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_MOST_RESTS", 1)
    paths = [make_expert(name, change=far_apart if name == "b" else None) for name in "abc"]
    with pytest.raises(Refused, match="lie so far apart"):
        create(tmp_path / "soup", paths)


def overwrite(file: Path, value: float) -> None:
    """One sum of a state is another."""
    data = bytearray(file.read_bytes())
    data[-8:] = torch.tensor([value], dtype=torch.float64).numpy().tobytes()
    file.write_bytes(data)


def rests_of(places: object, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    return {"conv_in.weight": torch.tensor(places).to(dtype)}


DAMAGE = {
    "no sums": lambda out: (out / SUMS).unlink(),
    "NaN": lambda out: overwrite(out / SUMS, math.nan),
    "infinity": lambda out: overwrite(out / SUMS, math.inf),
    "large": lambda out: overwrite(out / SUMS, 1e60),
    "largest": lambda out: overwrite(out / SUMS, 1e308),
    "a bit": lambda out: overwrite(out / SUMS, 0.5),
    "other tensors": lambda out: save_file(rests_of([0.0]), out / SUMS),
    "another rest": lambda out: overwrite(out / RESTS, 2.0**-70),
    "no rest": lambda out: (out / RESTS).unlink(),
    "rests of floats": lambda out: save_file(rests_of([[0], [1]], torch.float32), out / RESTS),
    "rests in a row": lambda out: save_file(rests_of([1, 2]), out / RESTS),
    "rests out of reach": lambda out: save_file(rests_of([[10**9, 3], [1, 2]]), out / RESTS),
    "rests that are none": lambda out: (out / RESTS).write_text("none"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_is_not_as_recorded_is_made_anew(make_expert, paths, tmp_path, caplog, damage):
    paths[1] = make_expert("b", change=far_apart)
    out, every = create(tmp_path / "soup", paths[:4]), create(tmp_path / "every", paths)
    four = sha256_folder(out)
    DAMAGE[damage](out)
    assert not verify(out).holds
    assert not soup.add(out, {paths[4]: 1}).plan.from_state
    assert sha256_folder(out) == sha256_folder(every)
    DAMAGE[damage](out)
    assert not soup.remove(out, "e").plan.from_state
    assert sha256_folder(out) == four
    assert caplog.text.count("of no use") == 2


def test_a_file_that_is_no_part_of_a_soup_is_found(paths, tmp_path):
    out = create(tmp_path / "soup", paths)
    save_file(rests_of([[0], [1]]), out / RESTS)
    assert any("no part of this soup" in problem for problem in verify(out).problems)
    assert soup.remove(out, "e").plan.from_state is False
    assert verify(out).holds


@pytest.mark.parametrize("told", ["gone", "changed", "another", "away"])
def test_what_leaves_and_is_not_as_recorded(paths, tmp_path, caplog, told):
    out, never = create(tmp_path / "soup", paths), create(tmp_path / "never", paths[:4])
    if told == "gone":
        (paths[4] / WEIGHTS).unlink()
    elif told == "changed":
        value = load_file(paths[4] / WEIGHTS)
        save_file({name: each + 1 for name, each in value.items()}, paths[4] / WEIGHTS)
    elif told == "another":
        save_file({"conv_in.weight": torch.ones(2)}, paths[4] / WEIGHTS, {"format": "pt"})
    else:
        recipe = json.loads((out / "soup.json").read_text())
        recipe["ingredients"][4]["path"] = "http://127.0.0.1:9/models/e"
        (out / "soup.json").write_bytes(canonical_json(recipe))
    made = soup.remove(out, "e")
    assert made.plan is not None
    assert not made.plan.from_state
    assert ("made anew" in caplog.text) == (told in ("changed", "another"))
    assert sha256_folder(out) == sha256_folder(never)


def test_headers_of_what_is_not_read_decide_nothing(make_expert, tmp_path):
    """Whoever stays and is in another dtype by now is noticed, as it would be without a state."""
    a = make_expert("a")
    others = [make_expert(name, dtype=torch.bfloat16) for name in "bcdefg"]
    z = make_expert("z", dtype=torch.bfloat16)
    out = create(tmp_path / "soup", [a, *others])
    make_expert("a", dtype=torch.bfloat16)
    with pytest.raises(Refused, match="are not those that are in the soup"):
        soup.add(out, {z: 1})
    make_expert("a")
    assert not soup.add(out, {z: 1}).plan.from_state
    assert sha256_folder(out) == sha256_folder(create(tmp_path / "every", [a, *others, z]))


def test_whether_there_is_a_state_does_not_depend_on_the_way(make_expert, tmp_path):
    def beginning(value: float):
        def change(state: dict[str, Tensor]) -> None:
            state["conv_in.weight"].reshape(-1)[0] = value

        return change

    values = {"a": 1.0, "b": 2.0**-60 * (1 + 2.0**-23), "c": 1e-40, "d": -1e-40, "e": 0.0, "f": 0.0}
    paths = {name: make_expert(name, change=beginning(value)) for name, value in values.items()}
    out = create(tmp_path / "soup", [paths[name] for name in "cdef"])
    assert soup.add(out, {paths["a"]: 1}).plan.from_state
    assert soup.add(out, {paths["b"]: 1}).plan.from_state
    assert verify(out).holds
    assert sha256_folder(out) == sha256_folder(create(tmp_path / "every", list(paths.values())))
    before = sha256_folder(out)
    with pytest.raises(Refused, match="lie so far apart"):
        soup.remove(out, "d")
    assert sha256_folder(out) == before


def test_who_does_not_count_may_hold_anything(make_expert, tmp_path):
    def broken(state: dict[str, Tensor]) -> None:
        state["conv_in.bias"][0] = torch.nan

    a, b, base = make_expert("a"), make_expert("b", change=broken), make_expert("base")
    for number, path in enumerate((a, b, base)):
        told = load_file(path / WEIGHTS) | {"steps": torch.tensor([number], dtype=torch.int32)}
        save_file(told, path / WEIGHTS, {"format": "pt"})
    told["steps"][0] = 0
    save_file(told, base / WEIGHTS, {"format": "pt"})
    silent = [Block(tensors=name, weights={"b": 0}) for name in ("conv_in.bias", "steps")]
    for number, method in enumerate(("mean", "ties", "dare", "state")):
        asked = Settings(blocks=silent, state=method == "state")
        if method in ("ties", "dare"):
            asked = Settings(blocks=silent, method=method)
        known = base if method in ("ties", "dare") else None
        for path in (a, b, base):
            (path / CARD_NAME).unlink(missing_ok=True)
        made = soup.create(tmp_path / str(number), {a: 1, b: 1}, asked, base=known)
        assert load_file(made.place / WEIGHTS)["steps"].tolist() == [0]
        assert verify(made.place).holds


def test_flushed_denormals_are_refused(paths, tmp_path):
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            create(tmp_path / "soup", paths)
    finally:
        torch.set_flush_denormal(False)


def test_blocks_that_change_how_others_count(paths, tmp_path):
    def block(pattern: str, **weights: int) -> Block:
        return Block(tensors=pattern, weights=weights)

    asked = Settings(state=True, blocks=[block("conv_*", a=3), block("time_*", b=0)])
    out = create(tmp_path / "soup", paths[:4], asked)
    four = sha256_folder(out)
    # What is weighed for the one that comes alone leaves the others as they are.
    made = soup.add(out, {paths[4]: 1}, blocks=[block("time_*", e=2)])
    assert made.plan is not None
    assert made.plan.from_state
    both = [block("conv_*", a=3), block("time_*", b=0, e=2)]
    every = create(tmp_path / "every", paths, Settings(state=True, blocks=both))
    assert sha256_folder(out) == sha256_folder(every)
    soup.remove(out, "e")
    assert sha256_folder(out) == four
    # A longer pattern takes the tensors of a shorter one, and a's weight there with it.
    made = soup.add(out, {paths[4]: 1}, blocks=[block("conv_in.*", e=2)])
    assert made.plan is not None
    assert not made.plan.from_state
    more = [block("conv_*", a=3), block("conv_in.*", e=2), block("time_*", b=0)]
    every = create(tmp_path / "more", paths, Settings(state=True, blocks=more))
    assert sha256_folder(out) == sha256_folder(every)


def test_several_dtypes_and_integers(make_expert, tmp_path):
    dtypes = dict(zip(NAMES, (*exact.DTYPES, torch.float32, torch.bfloat16), strict=True))
    paths = [make_expert(name, dtype=dtype) for name, dtype in dtypes.items()]
    for path in paths:
        told = load_file(path / WEIGHTS) | {"steps": torch.tensor([1, 2], dtype=torch.int32)}
        save_file(told, path / WEIGHTS, {"format": "pt"})
    out = create(tmp_path / "soup", paths[:4])
    soup.add(out, {paths[4]: 1})
    assert sha256_folder(out) == sha256_folder(create(tmp_path / "every", paths))
    assert load_file(out / WEIGHTS)["steps"].tolist() == [1, 2]
    assert verify(out).holds
    told["steps"] = torch.tensor([1, 3], dtype=torch.int32)
    save_file(told, paths[4] / WEIGHTS, {"format": "pt"})
    soup.remove(out, "e")  # which is another than it was
    before = sha256_folder(out)
    assert before == sha256_folder(create(tmp_path / "four", paths[:4]))
    with pytest.raises(Refused, match="'steps' differs between 'a' and 'e'"):
        soup.add(out, {paths[4]: 1})
    assert sha256_folder(out) == before


def test_the_soups_dtype_follows_who_is_in_it(make_expert, tmp_path):
    paths = [make_expert(name, dtype=torch.bfloat16) for name in "abcdefg"]
    wide = make_expert("wide")
    out = create(tmp_path / "soup", paths)
    assert soup.add(out, {wide: 1}).plan.from_state
    assert {value.dtype for value in load_file(out / WEIGHTS).values()} == {torch.float32}
    assert sha256_folder(out) == sha256_folder(create(tmp_path / "every", [*paths, wide]))


def test_negative_weights_and_what_does_not_fit(make_expert, tmp_path):
    def large(state: dict[str, Tensor]) -> None:
        state["conv_in.bias"][:] = 60000.0

    a, b = (
        make_expert("a", dtype=torch.float16, change=large),
        make_expert("b", dtype=torch.float16),
    )
    with pytest.raises(Refused, match="does not fit into float16"):
        soup.create(tmp_path / "soup", {a: 3, b: -1}, STATE, negative=True)
    wide = Settings(state=True, dtype="float32")
    made = soup.create(tmp_path / "soup", {a: 3, b: -1}, wide, negative=True)
    assert verify(made.place).holds

    def broken(state: dict[str, Tensor]) -> None:
        state["conv_in.bias"][0] = torch.nan

    c = make_expert("c", change=broken)
    with pytest.raises(Refused, match="'c' holds NaN"):
        create(tmp_path / "other", [b, c])
    assert not (tmp_path / "other").exists()


def test_what_keeps_no_state(paths, tmp_path):
    with pytest.raises(UsageError, match="ties has no running state"):
        create(tmp_path / "soup", paths, Settings(method="ties", state=True))
    with pytest.raises(UsageError, match="keeps no running state"):
        soup.leave_one_out(tmp_path / "loo", dict.fromkeys(paths, 1), STATE)
    file = tmp_path / "x.safetensors"
    save_file(
        {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.ones(2, 1)}, file
    )
    with pytest.raises(Refused, match="not for adapters"):
        create(tmp_path / "soup", [file])
    assert not os.path.exists(tmp_path / "soup")
