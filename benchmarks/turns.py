"""Trainings of one process that take turns of a few steps.

What slows the machine for a while slows all of them alike, so that ratios need no quiet machine,
and each goes on from where it was: warm, with its own clockwork of commits and heartbeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import islice

Peer = Generator[None, None, None]
"""A training that yields before each of its steps."""

Settle = Callable[[], None]
Ours = Callable[[int, Callable[[Settle], None]], None]
"""(steps, what to call before each of them) -> a training of so many steps.

What is called is told how to wait for work that goes on beside the steps, so that it ends in a turn
of its own and not in one of a peer.
"""


@dataclass(frozen=True)
class Schedule:
    """How long is measured, in seconds of each training's own."""

    warm: int  # steps before anything is timed
    turn: float
    pair: float
    pairs: int


@dataclass
class Times:
    """Seconds that each training took in each round of turns of `steps` steps.

    `worked` are the processor's own, of all threads: others on the machine do not lengthen these.
    """

    steps: int
    rounds_a_pair: int
    rounds: list[dict[str, float]] = field(default_factory=list)
    worked: list[dict[str, float]] = field(default_factory=list)

    def seconds(self, name: str) -> float:
        """Of all that was timed."""
        return sum(each[name] for each in self.rounds)

    def rate(self, name: str) -> float:
        """Steps per second."""
        return self.steps * len(self.rounds) / self.seconds(name)

    def ratios(self, name: str, peer: str) -> list[float]:
        """How much faster than `peer` it was, pair by pair."""
        found = []
        for start in range(0, len(self.rounds), self.rounds_a_pair):
            pair = self.rounds[start : start + self.rounds_a_pair]
            found.append(sum(each[peer] for each in pair) / sum(each[name] for each in pair))
        return found

    def ratio(self, name: str, peer: str) -> float:
        """The median of the pairs."""
        return statistics.median(self.ratios(name, peer))

    def work_ratio(self, name: str, peer: str) -> float:
        """How much less a processor worked for it than for `peer`, over all rounds."""
        return sum(each[peer] for each in self.worked) / sum(each[name] for each in self.worked)


def planned(schedule: Schedule, seconds: float) -> Times:
    """Turns of about the wanted length, for steps of so many seconds."""
    steps = max(1, round(schedule.turn / seconds))
    return Times(steps, rounds_a_pair=max(1, round(schedule.pair / (steps * seconds))))


def interleave(
    ours: Ours,
    peers: Mapping[str, Peer],
    schedule: Schedule,
    *,
    wait: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
) -> Times:
    """Let `ours` run, and after each of its turns every peer for as many steps.

    The first peer's warm-up says how long a step is. `wait` is called before a clock is read, for
    an accelerator to be done; `between` after every round, untimed.
    """
    seconds = 0.0
    for number, peer in enumerate(peers.values()):
        _advance(peer, 1 + schedule.warm // 2)  # what comes before the first step included
        half, _ = _timed(peer, schedule.warm - schedule.warm // 2, wait)
        seconds = seconds if number else half / (schedule.warm - schedule.warm // 2)
    times = planned(schedule, seconds)
    rounds = times.rounds_a_pair * schedule.pairs
    order = list(peers)
    taken, began, work_began = 0, 0.0, 0.0

    def before(settle: Settle) -> None:
        nonlocal taken, began, work_began
        timed = taken - schedule.warm
        taken += 1
        if timed < 0 or timed % times.steps:
            return
        settle()
        wait()
        if timed:
            laps = {"ours": (time.perf_counter() - began, time.process_time() - work_began)}
            for name in order:
                laps[name] = _timed(peers[name], times.steps, wait)
            order.append(order.pop(0))  # nobody always follows the same one
            times.rounds.append({name: seconds for name, (seconds, _) in laps.items()})
            times.worked.append({name: worked for name, (_, worked) in laps.items()})
            between()
        wait()
        began, work_began = time.perf_counter(), time.process_time()

    ours(schedule.warm + rounds * times.steps + 1, before)
    return times


def alternate(names: Mapping[str, Peer], schedule: Schedule, wait: Callable[[], None]) -> Times:
    """Likewise of trainings none of which is the loop: the first one stands for `ours`."""
    first, *others = names

    def ours(steps: int, before: Callable[[Settle], None]) -> None:
        next(names[first])
        for _ in range(steps):
            before(lambda: None)
            next(names[first])

    times = interleave(ours, {name: names[name] for name in others}, schedule, wait=wait)
    for kept in (times.rounds, times.worked):
        kept[:] = [{first: each.pop("ours"), **each} for each in kept]
    return times


def _advance(peer: Peer, steps: int) -> None:
    for _ in islice(peer, steps):
        pass


def _timed(peer: Peer, steps: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of work by the processor."""
    wait()
    began, work_began = time.perf_counter(), time.process_time()
    _advance(peer, steps)
    wait()
    return time.perf_counter() - began, time.process_time() - work_began
