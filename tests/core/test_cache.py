"""The block cache: the bytes of the files themselves, within bounds, whatever the store does."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.core import cache as cache_module
from atoll.core.blocks import BLOCK_BYTES, BLOCKS_NAME, FarFile, read_blocks, write_blocks
from atoll.core.cache import BlockCache, _pieces, _runs
from atoll.core.errors import ConfigError, Failed, Refused
from atoll.core.storage import Storage
from tests.core.conftest import at_once
from tests.waiting import until

SIZES = {"a": 100 * BLOCK_BYTES + 7, "b": 3 * BLOCK_BYTES, "c": 11}
LEAST = 64 * BLOCK_BYTES / 2**30  # GiB of the smallest cache there is


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of random bytes, and the digests of their blocks."""
    folder = tmp_path_factory.mktemp("blocks")
    for name, size in SIZES.items():
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    write_blocks(folder, list(SIZES))
    return folder


@pytest.fixture
def far(contents: Path, flaky: type[Any]) -> dict[str, FarFile]:
    """The same files on a store."""
    place = Storage("flaky://blocks")
    place.publish(contents, "x")
    flaky.reads.clear()
    return files(contents, place.patient())


def files(contents: Path, place: Storage) -> dict[str, FarFile]:
    return read_blocks(place, "x", list(SIZES), (contents / BLOCKS_NAME).read_bytes())


def settled(cache: BlockCache) -> None:
    """Wait until nothing is fetched ahead any more."""
    assert cache._ahead is not None
    cache._ahead.join()


def check_reads(contents: Path, far: dict[str, FarFile], cache: BlockCache, seed: int) -> None:
    """Random reads, of which some cross blocks and all files, are those of the local files."""
    draw = random.Random(seed)
    whole = {name: (contents / name).read_bytes() for name in SIZES}
    for _ in range(15):
        name = draw.choice(list(SIZES))
        length = draw.choice([0, 1, 10, min(SIZES[name], 3 * BLOCK_BYTES)])
        starts = [draw.randrange(SIZES[name] - length + 1) for _ in range(draw.choice([0, 1, 40]))]
        wanted = b"".join(whole[name][start : start + length] for start in starts)
        assert cache.read(far[name], starts, length) == wanted


def test_what_is_read_is_what_the_files_hold(contents: Path, far: dict[str, FarFile]) -> None:
    """104 blocks through a cache of 64, so that it turns over many times."""
    cache = BlockCache(LEAST)
    check_reads(contents, far, cache, 0)
    assert cache._file is not None
    assert os.fstat(cache._file).st_blocks * 512 <= 64 * BLOCK_BYTES
    assert len(cache._slots) <= 64
    assert not cache._coming


def test_threads_share_it_and_fetching_ahead_changes_nothing(
    contents: Path, far: dict[str, FarFile], flaky: type[Any]
) -> None:
    flaky.seconds = 0.0005
    cache = BlockCache(LEAST)

    def work(seed: int) -> None:
        for turn in range(3):
            cache.expect((far["a"], b) for b in random.Random(seed).sample(range(100), 50))
            check_reads(contents, far, cache, 10 * seed + turn)

    at_once(work, 4)
    settled(cache)
    assert not cache._coming


def test_what_is_expected_is_there_when_it_is_read(far: dict[str, FarFile], flaky: Any) -> None:
    cache = BlockCache(LEAST)
    cache.expect([(far["b"], 1), *((far["a"], number) for number in (9, 3, 4, 5, 99))])
    settled(cache)
    asked = [("a", 3), ("a", 9), ("a", 99), ("b", 1)]
    assert flaky.reads == [(name, number * BLOCK_BYTES) for name, number in asked]
    flaky.failures = 1  # nobody notices
    cache.read(far["a"], [3 * BLOCK_BYTES + 5], 3 * BLOCK_BYTES - 5)
    assert flaky.failures == 1
    cache.expect((far["a"], number) for number in (3, 4))  # nothing to do: no thread is started
    settled(cache)
    assert cache.bytes_fetched == 6 * BLOCK_BYTES


def test_a_reader_waits_for_what_is_on_its_way(far: dict[str, FarFile], flaky: Any) -> None:
    flaky.seconds = 0.2
    cache = BlockCache(LEAST)
    cache.expect([(far["b"], 1)])
    until(lambda: cache._coming, every=0.001)
    cache.read(far["b"], [BLOCK_BYTES], 10)
    assert len(flaky.reads) == 1


def test_the_block_used_longest_ago_goes_first(far: dict[str, FarFile]) -> None:
    cache = BlockCache(LEAST)
    for number in range(64):
        cache.read(far["a"], [number * BLOCK_BYTES], 1)
    cache.read(far["a"], [0], 1)
    cache.read(far["a"], [64 * BLOCK_BYTES], 1)
    assert (far["a"], 0) in cache._slots
    assert (far["a"], 1) not in cache._slots
    fetched = cache.bytes_fetched
    cache.read(far["a"], [0, 2 * BLOCK_BYTES], 1)
    assert cache.bytes_fetched == fetched


def test_half_of_the_cache_is_the_most_that_is_fetched_ahead(far: dict[str, FarFile]) -> None:
    cache = BlockCache(LEAST)
    cache.expect((far["a"], number) for number in range(100))
    settled(cache)
    assert [number for _, number in cache._slots] == list(range(32))


# -- what goes wrong -----------------------------------------------------------------------------


def test_an_outage_is_ridden_out(far: dict[str, FarFile], contents: Path, flaky: Any) -> None:
    flaky.failures = 3
    assert BlockCache(LEAST).read(far["c"], [0], 11) == (contents / "c").read_bytes()
    assert flaky.failures == 0


def test_an_outage_that_does_not_end_is_told(
    contents: Path, far: dict[str, FarFile], flaky: Any
) -> None:
    flaky.failures = 10**6
    cache, hasty = (
        BlockCache(LEAST),
        files(contents, Storage("flaky://blocks").patient(seconds=0.05)),
    )
    cache.expect([(hasty["c"], 0)])
    with pytest.raises(Failed, match=r"away for \d+ s, reading x/c: the store is away.*it resumes"):
        cache.read(hasty["c"], [0], 11)
    settled(cache)
    flaky.failures = 0
    assert len(cache.read(hasty["c"], [0], 11)) == 11  # nothing is claimed for ever


def test_what_was_garbled_on_the_way_is_fetched_again(
    far: dict[str, FarFile], contents: Path, flaky: Any
) -> None:
    flaky.garbled = 1
    assert BlockCache(LEAST).read(far["c"], [0], 11) == (contents / "c").read_bytes()


def test_a_changed_file_is_refused_where_it_is_changed(far: dict[str, FarFile]) -> None:
    place = far["b"].storage
    data = bytearray(place.read_bytes("x/b"))
    data[2 * BLOCK_BYTES] ^= 1
    place.write_bytes("x/b", bytes(data))
    cache = BlockCache(LEAST)
    cache.read(far["b"], [0], 2 * BLOCK_BYTES)
    with pytest.raises(Refused, match=r"131072 to 196608 of flaky://blocks/x/b are not those"):
        cache.read(far["b"], [BLOCK_BYTES], BLOCK_BYTES + 1)


def test_a_file_that_is_gone_is_refused_at_once(far: dict[str, FarFile]) -> None:
    far["b"].storage.remove("x/b")
    with pytest.raises(Refused, match="x/b is no longer there"):
        BlockCache(LEAST).read(far["b"], [0], 1)


def _full_after(slots: int) -> Callable[..., int]:
    write = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset >= slots * BLOCK_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    return pwrite


def test_a_full_disk_makes_the_cache_smaller(
    contents: Path, far: dict[str, FarFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlockCache(2 * LEAST)
    monkeypatch.setattr(cache_module.os, "pwrite", _full_after(70))
    check_reads(contents, far, cache, 1)
    cache.read(far["a"], [0], SIZES["a"])
    check_reads(contents, far, cache, 2)
    assert len(cache._slots) == 70


def test_a_disk_without_room_is_a_sentence(
    far: dict[str, FarFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module.os, "pwrite", _full_after(10))
    with pytest.raises(Failed, match=r"No space left in /.*lower cache_gib.*TMPDIR"):
        BlockCache(LEAST).read(far["a"], [0], SIZES["a"])


def test_a_cache_of_nearly_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.001 GiB cannot hold.*0\.00390625 GiB or more"):
        BlockCache(0.001)


def test_digests_that_do_not_fit_are_refused(contents: Path, flaky: Any) -> None:
    data = (contents / BLOCKS_NAME).read_bytes()
    place = Storage("flaky://blocks")
    for names, given_ in ((["nobody"], data), (["a"], b"torn"), (["a"], data[:-1])):
        with pytest.raises(Refused, match="does not fit the files"):
            read_blocks(place, "x", names, given_)


# -- the arithmetic of blocks --------------------------------------------------------------------


@given(st.lists(st.integers(0, 9 * BLOCK_BYTES), max_size=5), st.integers(0, 3 * BLOCK_BYTES))
def test_pieces_cover_the_result_once_and_in_place(starts: list[int], length: int) -> None:
    found: dict[int, int] = {}
    for number, pieces in _pieces(starts, length).items():
        for place, first, last in pieces:
            assert 0 <= first < last <= BLOCK_BYTES
            row, within = divmod(place, length)
            assert number * BLOCK_BYTES + first == starts[row] + within
            assert place not in found
            found[place] = last - first
    assert sum(found.values()) == len(starts) * length
    ends = [place + size for place, size in sorted(found.items())]
    assert ends[:-1] == sorted(found)[1:]


@given(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 200))))
def test_runs_are_the_blocks_again(wanted: set[tuple[str, int]]) -> None:
    files = {name: FarFile(Storage("memory://"), name, 0, b"") for name in "ab"}
    runs = _runs([(files[name], number) for name, number in wanted])
    assert [(file.name, number) for file, run in runs for number in run] == sorted(wanted)
    assert all(len(run) <= 64 for _, run in runs)
    for (one, a), (other, b) in itertools.pairwise(runs):
        assert one is not other or a.stop < b.start or len(a) == 64
