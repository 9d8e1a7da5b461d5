"""The most telling caption words of each shard: log-odds with a Dirichlet prior.

Monroe, Colaresi and Quinn 2008, "Fightin' Words" (log-odds ratio, its variance, z-score): a word
counts by how surely it is more frequent here, so that neither words that are frequent everywhere
nor words that occur once come out on top. Their shorter variance, for rare words, is not used: in
short captions "photo" stands nearly everywhere and would look sure of anything.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_WORD = re.compile(r"[^\W\d_]{2,}|\d+")
_PRIOR_CAPTIONS = 100.0  # the prior weighs as much as this many captions like the average one
_SURE = 2.5  # well above chance, since every word of every shard is a comparison


def count_words(captions: Mapping[str, int]) -> Counter[str]:
    """In how many captions each word occurs, of captions with how often they occur."""
    counts: Counter[str] = Counter()
    for caption, times in captions.items():
        for word in set(_WORD.findall(caption.lower())):
            counts[word] += times
    return counts


def telling_words(
    counts: Mapping[str, Mapping[str, int]], captions: Mapping[str, int], *, most: int
) -> dict[str, list[str]]:
    """For each group its most telling words, the surest first.

    `counts` holds each group's captions per word and `captions` its captions in all.
    """
    everywhere: Counter[str] = Counter()
    for group in counts.values():
        everywhere.update(group)
    total = sum(captions.values())
    found: dict[str, list[str]] = {}
    for name, here in counts.items():
        scores = {
            word: _z_score(here[word], captions[name], everywhere[word], total)
            for word in here
            if everywhere[word] < total  # one in every caption tells nothing
        }
        sure = [word for word, score in scores.items() if score > _SURE]
        found[name] = sorted(sure, key=lambda word: (-scores[word], word))[:most]
    return found


def _z_score(here: int, n_here: int, everywhere: int, total: int) -> float:
    """How many standard deviations a word's log-odds here are above those elsewhere."""
    prior = _PRIOR_CAPTIONS * everywhere / total
    rest = _PRIOR_CAPTIONS - prior
    there, n_there = everywhere - here, total - n_here
    with_here, without_here = here + prior, n_here - here + rest
    with_there, without_there = there + prior, n_there - there + rest
    ratio = math.log(with_here / without_here) - math.log(with_there / without_there)
    variance = 1 / with_here + 1 / without_here + 1 / with_there + 1 / without_there
    return ratio / math.sqrt(variance)
