"""The streamed safetensors file against the format's own library."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import stream as streaming
from atoll.merge import weights as reading
from atoll.merge.stream import Out, stream
from atoll.merge.weights import DTYPES, WEIGHTS_NAME, Layout, Weights, as_bytes

STATE = {
    **{f"t.{name.lower()}": torch.arange(6).reshape(2, 3).to(d) for name, d in DTYPES.items()},
    "b": torch.ones(3),
    "a": torch.ones(()),
    "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    'ü " \n': torch.ones(1, dtype=torch.float16),
    "long": torch.arange(7001, dtype=torch.int16),
}
EXPECTED = save(STATE, {"format": "pt"})


def layouts() -> dict[str, Layout]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {key: Layout(names[value.dtype], tuple(value.shape)) for key, value in STATE.items()}


def first_of(_name: str, _first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    for out in outs:
        out.copy_(values[0])


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    (tmp_path / WEIGHTS_NAME).write_bytes(save(STATE, {"by": "a stranger"}))
    return Weights([tmp_path / WEIGHTS_NAME])


@pytest.mark.parametrize("piece", [8, 1000, 1 << 23])
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_are_those_of_the_library(
    weights: Weights, tmp_path: Path, monkeypatch, piece: int, threads: int
) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", piece)
    monkeypatch.setattr(streaming, "_SYNCED_BYTES", 5000)
    out = tmp_path / "out"
    with weights:
        (digest,) = stream([weights], layouts(), first_of, outs=[Out(out)], threads=threads)
        assert out.read_bytes() == EXPECTED
        assert digest == hashlib.sha256(EXPECTED).hexdigest()
        assert stream([weights], layouts(), first_of, outs=[Out()]) == [digest]
        turned = dict(reversed(layouts().items()))
        assert stream([weights], turned, first_of, outs=[Out()]) == [digest]
        file = tmp_path / WEIGHTS_NAME
        assert weights.sha256() == {file: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_pieces_are_put_in_order_whoever_makes_them(weights: Weights, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 500)
    makers = set()

    def slowly(_name: str, _first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        makers.add(threading.get_ident())
        time.sleep(random.uniform(0, 0.01))
        outs[0].copy_(values[0])

    with weights:
        stream([weights], layouts(), slowly, outs=[Out(tmp_path / "out")], threads=4)
    assert (tmp_path / "out").read_bytes() == EXPECTED
    assert len(makers) == 4


def test_several_files_come_of_one_reading(weights: Weights, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 500)
    outs = [Out(tmp_path / "a"), Out(), Out(tmp_path / "b", {"by": "us", "of": "ü"})]
    with weights:
        digests = stream([weights], layouts(), first_of, outs=outs, threads=2)
    assert (tmp_path / "a").read_bytes() == EXPECTED
    made = [EXPECTED, EXPECTED, (tmp_path / "b").read_bytes()]
    assert digests == [hashlib.sha256(each).hexdigest() for each in made]
    with safe_open(tmp_path / "b", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "us", "of": "ü"}
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in STATE.items())


def test_memory_does_not_grow_with_the_files(weights: Weights, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_MEMORY_BYTES", 60_000)
    seen: set[int] = set()

    def spy(_name: str, _first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        parts = [*values, *outs]
        seen.add(sum(part.nbytes for part in parts))
        places = sorted((part.data_ptr(), part.nbytes) for part in parts if part.nbytes)
        assert all(at % 64 == 0 for at, _ in places)
        assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(places))
        outs[0].copy_(values[-1])

    others = [Weights([tmp_path / WEIGHTS_NAME]) for _ in range(30)]
    for other in others:
        other.__enter__()
    stream(others, layouts(), spy, outs=[Out(tmp_path / "out")], threads=2)
    for other in others:
        other.__exit__(None, None, None)
    assert (tmp_path / "out").read_bytes() == EXPECTED
    assert max(seen) <= 60_000 / 12  # ten wait at most while two are made


def test_every_thread_computes_on_one_processor(weights: Weights):
    seen = []

    def spying(_name: str, _first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        seen.append(torch.get_num_threads())
        outs[0].copy_(values[0])

    torch.set_num_threads(2)
    with weights:
        stream([weights], layouts(), spying, outs=[Out()], threads=2)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_an_error_in_a_rule_ends_it(weights: Weights, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", 100)

    def failing(name: str, _first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        if name == "long":
            raise Refused("as it would be for a NaN")
        outs[0].copy_(values[0])

    with weights, pytest.raises(Refused, match="as it would be"):
        stream([weights], layouts(), failing, outs=[Out(tmp_path / "out")], threads=3)
    assert not [each for each in threading.enumerate() if each.name.startswith("stream")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_the_place_is_taken_first_where_a_filesystem_can(
    weights: Weights, tmp_path, monkeypatch, number: int
) -> None:
    def cannot(_descriptor: int, _at: int, size: int) -> None:
        assert size == len(EXPECTED)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    with weights:
        if number == errno.ENOSPC:
            with pytest.raises(OSError, match="No space"):
                stream([weights], layouts(), first_of, outs=[Out(tmp_path / "out")])
        else:
            stream([weights], layouts(), first_of, outs=[Out(tmp_path / "out")])
            assert (tmp_path / "out").read_bytes() == EXPECTED


def from_afar(path: Path, at: int, into: memoryview) -> int:
    data = path.read_bytes()[at : at + len(into)]
    into[: len(data)] = data
    return len(data)


@pytest.mark.parametrize("reader", [None, from_afar])
@pytest.mark.parametrize("ahead", [0, 3000, 1 << 25])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.usefixtures("weights")
def test_a_file_is_hashed_whatever_is_read_of_it_and_when(
    tmp_path: Path, monkeypatch, threads: int, ahead: int, reader
) -> None:
    monkeypatch.setattr(reading, "_AHEAD_BYTES", ahead)
    weights = Weights([tmp_path / WEIGHTS_NAME], reader)
    draw = random.Random(threads)
    parts = []
    for name, layout in layouts().items():
        for first in range(0, max(layout.count, 1), 500):
            parts += [(name, first, min(500, layout.count - first))] * draw.randrange(3)
    draw.shuffle(parts)

    def read(part: tuple[str, int, int]) -> None:
        name, first, count = part
        piece = torch.empty(count, dtype=STATE[name].dtype)
        weights.read(name, first, piece)
        expected = STATE[name].reshape(-1)[first : first + count].contiguous()
        assert as_bytes(piece) == as_bytes(expected)

    file = tmp_path / WEIGHTS_NAME
    expected = {file: hashlib.sha256(file.read_bytes()).hexdigest()}
    for _ in range(2):
        with weights, ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, parts))
            assert weights.sha256() == expected
    # Opened again, it is read again.
    file.write_bytes(save({"t": torch.ones(3)}))
    with weights:
        assert weights.sha256() != expected


def test_what_is_hashed_in_order_is_read_once(
    weights: Weights, tmp_path: Path, monkeypatch
) -> None:
    read, preadv = [], os.preadv

    def spy(descriptor: int, into: list[memoryview], at: int) -> int:
        read.append(preadv(descriptor, into, at))
        return read[-1]

    with weights:
        monkeypatch.setattr(os, "preadv", spy)
        stream([weights], layouts(), first_of, outs=[Out()], threads=1)
        weights.sha256()
    assert sum(read) == (tmp_path / WEIGHTS_NAME).stat().st_size
