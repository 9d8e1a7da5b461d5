"""The corpus of the shares benchmark: clusters of the shares that it says."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shares import PARTS, thinned


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=600))
def test_every_cluster_keeps_its_part_and_no_more_is_left_out_than_must_be(names, more) -> None:
    clusters = [names[cluster] for cluster in [*range(8)] * 40 + more]
    rows = thinned(clusters)
    assert rows == sorted(set(rows))
    there, kept = Counter(clusters), Counter(clusters[row] for row in rows)
    parts = dict(zip([cluster for cluster, _ in there.most_common()], PARTS, strict=True))
    for cluster, part in parts.items():
        assert abs(kept[cluster] - part * len(rows)) <= len(PARTS)
    # The one that there is least of, for its part, stays whole; rounding may cost one.
    assert any(there[cluster] - kept[cluster] <= 1 for cluster in parts)
