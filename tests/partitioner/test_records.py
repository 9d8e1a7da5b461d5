from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.core.errors import DataError, UsageError
from atoll.partitioner.readers import Row
from atoll.partitioner.records import (
    HELD_OUT,
    TRAIN,
    Gathered,
    Record,
    Spool,
    canonical,
    digest,
    gather,
    record_id,
    split_of,
    without_duplicates,
)
from atoll.partitioner.settings import PartitionConfig

Write = Callable[[Path, list[dict[str, Any]]], str]
Configure = Callable[..., PartitionConfig]


def gathered(corpus: str, config: PartitionConfig) -> Gathered:
    with Spool() as spool:
        return gather(corpus, spool, config)


def record(number: int, content: str = "") -> Record:
    name = digest(str(number))
    return Record(name, content or name, "c", None, None, 0, 0, (8, 8))


def test_the_id_is_of_everything_a_record_holds() -> None:
    row = Row("here", b"a", "b", "c", "d")
    moved = Row("elsewhere", b"a", "b", "c", "d")
    assert record_id(row) == record_id(moved)
    others = [
        Row("", b"ab", "", "c", "d"),
        Row("", b"a", "bc", "", "d"),
        Row("", b"a", "b", None, "d"),
        Row("", b"a", "b", "c", "e"),
        Row("", b"a", "b", "cd", None),
    ]
    assert len({record_id(other) for other in [row, *others]}) == 6


@given(st.lists(st.one_of(st.none(), st.text(), st.binary()), max_size=4), st.data())
def test_digests_of_different_parts_differ(parts: list[Any], data: st.DataObject) -> None:
    flat = [part.encode() if isinstance(part, str) else part for part in parts]
    other = data.draw(st.lists(st.one_of(st.none(), st.binary()), max_size=4))
    assert (digest(*flat) == digest(*other)) == (flat == other)
    assert digest(*parts) == digest(*flat)


def test_the_split_is_a_share_and_grows_with_it() -> None:
    records = [record(number) for number in range(4000)]
    small = {r.id for r in records if split_of(r, 0.05) == HELD_OUT}
    large = {r.id for r in records if split_of(r, 0.2) == HELD_OUT}
    assert small < large
    assert 150 < len(small) < 250
    assert all(split_of(r, 0.0) == TRAIN for r in records)
    ordered = canonical(reversed(records), 0.05)
    assert ordered == canonical(records, 0.05)
    assert [split_of(r, 0.05) for r in ordered].index(HELD_OUT) == 4000 - len(small)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=40), st.randoms())
def test_which_twin_survives_does_not_depend_on_the_order(
    pairs: list[tuple[int, int]], random: Any
) -> None:
    records = [record(number, str(content)) for number, content in pairs]
    kept = without_duplicates(records)
    assert {r.content for r in kept} == {r.content for r in records}
    assert len(kept) == len({r.content for r in kept})
    random.shuffle(records)
    assert without_duplicates(records) == kept or {r.id for r in kept} == {
        r.id for r in without_duplicates(records)
    }


def test_commons_and_private_are_divided_by_hash_or_by_owner(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    corpus = parquet(tmp_path / "c.parquet", digits)
    found = gathered(corpus, config(commons="0.25"))
    assert len(found.commons) + len(found.private) == 400
    assert 70 < len(found.commons) < 130
    assert not {r.id for r in found.commons} & {r.id for r in found.private}
    owners = gathered(corpus, config(by="owner", commons="Museum, Bo"))
    assert {r.owner for r in owners.commons} == {"Museum", "Bo"}
    assert {r.owner for r in owners.private} == {"Ada", "Cléo"}
    public = parquet(tmp_path / "public.parquet", digits[:150])
    second = gathered(corpus, config(commons=public))
    # The private twins of the commons are dropped, and only they.
    assert (len(second.commons), len(second.private)) == (150, 250)
    # A commons of its own needs no owners.
    bare = [{"image": row["image"], "caption": row["caption"]} for row in digits[:150]]
    by_owner = config(by="owner", commons=parquet(tmp_path / "bare.parquet", bare))
    assert len(gathered(corpus, by_owner).private) == 250


def test_unreadable_pictures_are_listed_counted_and_refused_beyond_the_share(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path,
) -> None:  # fmt: skip
    bad = [{**digits[0], "image": digits[0]["image"][:60]}, {**digits[1], "image": b"nonsense"}]
    corpus = parquet(tmp_path / "c.parquet", digits[:198] + bad)
    with pytest.raises(
        DataError, match=r"2 of 200 pictures .* row 198: .*row 199: not a pict"
    ) as e:
        gathered(corpus, config(max_unreadable=0.005))
    assert "at most 0.5%" in e.value.allowed
    found = gathered(corpus, config(max_unreadable=0.01))
    assert len(found.unreadable) == 2
    assert len(found.commons) + len(found.private) == 198
    with pytest.raises(DataError, match="1 of 1 pictures"):
        gathered(parquet(tmp_path / "b.parquet", bad[1:]), config(max_unreadable=1.0))


def test_missing_captions_are_counted(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    silent = [{**row, "caption": "  "} for row in digits[:120]]
    corpus = parquet(tmp_path / "c.parquet", silent + digits[120:200])
    with pytest.raises(DataError, match=r"120 of 200 rows .* have no caption"):
        gathered(corpus, config())
    assert len(gathered(corpus, config(max_uncaptioned=0.6)).private) > 100


def test_corpora_that_are_too_small_say_what_is_allowed(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    corpus = parquet(tmp_path / "c.parquet", digits[:60])
    with pytest.raises(DataError, match="--shards 59 is more than the") as caught:
        gathered(corpus, config(shards=59, commons="0.99", holdout=0.0))
    assert caught.value.allowed.startswith("1 to ")
    for few in (config(commons="0.001"), config(commons="0.1", shards=20)):
        with pytest.raises(DataError, match="The commons has"):
            gathered(corpus, few)
    with pytest.raises(DataError, match="No private records"):
        gathered(corpus, config(commons=corpus))
    pq.write_table(pa.Table.from_pylist(digits)[:0], tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no rows"):
        gathered(str(tmp_path / "empty.parquet"), config())


def test_owners_must_be_named_and_known(
    digits: list[dict[str, Any]], parquet: Write, config: Configure, tmp_path: Path
) -> None:
    corpus = parquet(tmp_path / "c.parquet", digits[:40])
    with pytest.raises(UsageError, match=r"names 'Musem'.* Did you mean 'Museum'\?"):
        gathered(corpus, config(by="owner", commons="Musem"))
    nameless = parquet(tmp_path / "n.parquet", [*digits[:40], {**digits[41], "owner": None}])
    with pytest.raises(DataError, match="1 of 41 records have no owner"):
        gathered(nameless, config(by="owner", commons="Museum"))
