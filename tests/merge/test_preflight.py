"""What is said before a soup is made, held against direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.core.conditioning import Conditioning
from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import sha256_folder
from atoll.core.errors import DataError, Refused, UsageError
from atoll.core.manifest import Picture
from atoll.core.pack import Pack, ShardCard, write_pack, write_shard_card
from atoll.merge import grams, soup
from atoll.merge.barrier import measure_barrier
from atoll.merge.preflight import check
from atoll.merge.recipe import Settings
from atoll.merge.weights import WEIGHTS_NAME as WEIGHTS


def flat(path: Path) -> np.ndarray:
    state = load_file(path / WEIGHTS)
    return torch.cat([state[name].double().reshape(-1) for name in sorted(state)]).numpy()


@pytest.fixture
def base(make_expert) -> Path:
    return make_expert("base", kind="base", base_sha256=None)


def test_moves_and_cosines_are_those_of_all_weights(make_expert, base, tmp_path, monkeypatch):
    monkeypatch.setattr(grams, "_CHUNK", 100)
    digest = sha256_folder(base)
    paths = [make_expert(name, base_sha256=digest) for name in "bac"]
    found = check(tmp_path / "soup", dict.fromkeys(paths, 1), base=base)
    assert [one.ingredient.name for one in found.opened] == ["a", "b", "c"]
    start, *ends = (flat(path) for path in (base, paths[1], paths[0], paths[2]))
    moves = [end - start for end in ends]
    compared = found.comparison
    assert compared.elements == len(start)
    assert compared.base_norm == pytest.approx(np.linalg.norm(start))
    assert compared.moves == pytest.approx(
        [np.linalg.norm(move) / np.linalg.norm(start) for move in moves]
    )
    for i, ours in enumerate(moves):
        for j, theirs in enumerate(moves):
            cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
            mean = (np.linalg.norm(ends[i]) + np.linalg.norm(ends[j])) / 2
            assert compared.cosines[i][j] == pytest.approx(cosine)
            assert compared.distances[i][j] == pytest.approx(
                np.linalg.norm(ends[i] - ends[j]) / mean, abs=1e-9
            )
    # Without a base distances are left, and are the same.
    alone = check(tmp_path / "soup", dict.fromkeys(paths, 1)).comparison
    assert (alone.base_norm, alone.moves, alone.cosines) == (None, None, None)
    for ours, theirs in zip(alone.distances, compared.distances, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    assert not (tmp_path / "soup").exists()


def test_what_did_not_move_has_no_direction(make_expert, base, tmp_path):
    still = make_expert("still", base_sha256=sha256_folder(base))
    (still / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes())
    found = check(tmp_path / "soup", {still: 1}, base=base).comparison
    assert (found.moves, found.cosines, found.distances) == ([0.0], [[None]], [[0.0]])


def test_what_create_refuses_is_refused_and_nothing_is_divided_by_zero(make_expert, base, tmp_path):
    digest = sha256_folder(base)
    paths = [make_expert(name, base_sha256=digest) for name in "ab"]
    with pytest.raises(UsageError, match="without --variant"):
        check(tmp_path / "soup", {make_variant(paths[0]): 1}, Settings(variant="x"), pack=tmp_path)
    state = load_file(paths[1] / WEIGHTS)
    save_file(state | {"conv_in.bias": torch.full((4,), float("nan"))}, paths[1] / WEIGHTS)
    with pytest.raises(Refused, match="'b' holds NaN or infinity in tensor 'conv_in"):
        check(tmp_path / "soup", dict.fromkeys(paths, 1), base=base)
    for path in paths:
        save_file({name: torch.zeros_like(v) for name, v in state.items()}, path / WEIGHTS)
    found = check(tmp_path / "soup", dict.fromkeys(paths, 1)).comparison
    assert found.distances == [[None, None], [None, None]]


def make_variant(path: Path) -> Path:
    save_file(load_file(path / WEIGHTS), path / WEIGHTS.replace(".s", ".x.s"))
    return path


def test_integers_do_not_count_and_shapes_do(make_expert, base, tmp_path):
    (base / CARD_NAME).unlink()
    stranger = make_expert("a")
    (stranger / CARD_NAME).unlink()
    for path in (base, stranger):
        save_file(load_file(path / WEIGHTS) | {"n": torch.arange(5)}, path / WEIGHTS)
    found = check(tmp_path / "soup", {stranger: 1}, base=base).comparison
    assert found.elements == len(flat(stranger)) - 5
    assert math.isfinite(found.moves[0])
    save_file({"other": torch.ones(2)}, base / WEIGHTS)
    with pytest.raises(Refused, match="'a' and 'base' cannot"):
        check(tmp_path / "soup", {stranger: 1}, base=base)


def pack(folder: Path, *, held_out: int = 12, records: int = 20, width: int = 8) -> Path:
    folder.mkdir()
    pixels = torch.randint(0, 256, (records + held_out, 1, 8, 8), dtype=torch.uint8)
    captions = Conditioning(
        torch.randn(2, 3, width), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8),
        torch.tensor([True, False]),
    )  # fmt: skip
    write_pack(folder / "pack-00000.safetensors", pixels, torch.ones(len(pixels)).long(), captions)
    card = ShardCard(
        name="s", records=records, held_out=held_out, encoder="none", files={},
        picture=Picture(channels=1, height=8, width=8),
        packs={"pack-00000.safetensors": len(pixels)},
    )  # fmt: skip
    write_shard_card(folder, card)
    return folder


def test_a_barrier_is_what_the_middle_costs(make_expert, tmp_path):
    paths = [make_expert(name) for name in "abc"]
    shard = pack(tmp_path / "shard")
    found = check(tmp_path / "soup", dict.fromkeys(paths, 1), pack=shard).barrier
    assert found is not None
    assert found.records == 12
    # A soup of two is an expert whose loss is that of the middle.
    middle = make_expert("middle")
    made = soup.create(tmp_path / "two", {paths[0]: 1, paths[2]: 1})
    save_file(load_file(made.place / WEIGHTS), middle / WEIGHTS)
    every = check(tmp_path / "soup", {middle: 1, paths[0]: 1}, pack=shard).barrier
    assert every is not None
    assert every.losses[0] == pytest.approx(found.losses[0])
    wanted = every.losses[1] - (found.losses[0] + found.losses[2]) / 2
    assert found.barriers[0][2] == found.barriers[2][0] == pytest.approx(wanted, abs=1e-6)
    assert [found.barriers[i][i] for i in range(3)] == [0, 0, 0]
    made = soup.create(tmp_path / "three", dict.fromkeys(paths, 1))
    save_file(load_file(made.place / WEIGHTS), middle / WEIGHTS)
    whole = check(tmp_path / "soup", {middle: 1}, pack=shard).barrier
    assert whole is not None
    assert whole.losses == pytest.approx([found.soup])


def test_a_barrier_wants_experts_and_records(make_expert, tmp_path):
    path = make_expert("a")
    opened = check(tmp_path / "soup", {path: 1}).opened
    without_held_out = Pack(pack(tmp_path / "trained", held_out=0))
    assert measure_barrier(opened, without_held_out).records == 20
    with pytest.raises(DataError, match="no records"):
        measure_barrier(opened, Pack(pack(tmp_path / "empty", held_out=0, records=0)))
    with pytest.raises(Refused, match="records of s are not for"):
        check(tmp_path / "soup", {path: 1}, pack=pack(tmp_path / "other", width=5))
    (path / CARD_NAME).unlink()
    with pytest.raises(Refused, match=r"atoll\.json, which says what they predict"):
        check(tmp_path / "soup", {path: 1}, pack=tmp_path / "trained")
