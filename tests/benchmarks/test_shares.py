"""The corpus of the shares benchmark: owners of the shares that it says, each of one look."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from benchmarks import shares


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), min_size=900, max_size=1500))
def test_owners_have_one_look_each_and_their_part_of_the_records(names, more) -> None:
    look_of = [names[look] for look in list(range(8)) * 40 + more]
    rows, owners = shares.thinned(look_of)
    assert rows == sorted(set(rows))
    public = owners.count(shares.PUBLIC)
    assert public == int(len(look_of) * shares.PUBLIC_PART)
    assert owners[:public] == [shares.PUBLIC] * public
    looks: dict[str, set[int]] = {}
    for row, owner in zip(rows[public:], owners[public:], strict=True):
        looks.setdefault(owner, set()).add(look_of[row])
    assert all(len(found) == 1 for found in looks.values())
    counts = [count for _, count in sorted(Counter(owners[public:]).items())]
    total = sum(counts)
    for count, part in zip(counts, shares.OWNERS, strict=True):
        assert abs(count - part * total) <= len(counts)
    # No more is left out than one owner's part asks for.
    left = Counter(look_of[public:])
    assert any(left[min(looks[owner])] - owners.count(owner) <= 1 for owner in looks)
