"""What happens to a training's storage work while the store is away, and when it stays away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from atoll.core.errors import Failed, Fenced
from atoll.islands import background
from atoll.islands.background import Background


class Store:
    """Takes work, or refuses it `away` times."""

    def __init__(self) -> None:
        self.away = 10**9
        self.taken: list[str] = []
        self.refused = threading.Event()

    def work(self, what: str) -> Callable[[], None]:
        def work() -> None:
            if self.away:
                self.away -= 1
                self.refused.set()
                raise OSError("the store is away")
            self.taken.append(what)

        return work


def test_what_waited_through_an_outage_follows_in_its_order() -> None:
    store, background = Store(), Background(pause=0.01)
    for what in "abc":
        background.submit(what, store.work(what))
    assert store.refused.wait(300)
    background.settle()  # returns, since waiting would not help
    assert not background.idle
    store.away = 0
    background.drain()
    assert store.taken == ["a", "b", "c"]
    assert background.idle
    background.close()


def test_an_outage_longer_than_patience_is_told_with_its_cause() -> None:
    store, background = Store(), Background(patience=0.05, pause=0.01)
    background.submit("a checkpoint", store.work("a"))
    with pytest.raises(Failed, match=r"away for \d+ s, writing a checkpoint: the store is away"):
        background.drain()
    with pytest.raises(Failed, match="writing a checkpoint"):
        background.submit("more", store.work("b"))
    background.close()
    assert store.taken == []


def test_what_is_no_outage_is_told_at_once() -> None:
    def fenced() -> None:
        raise Fenced("another has taken over")

    background = Background()
    background.submit("a checkpoint", fenced)
    with pytest.raises(Fenced):
        background.drain()
    background.close()


def test_an_ending_training_gives_a_long_outage_its_grace_from_then_on() -> None:
    store, background = Store(), Background(pause=0.01)
    background.submit("a checkpoint", store.work("a"))
    time.sleep(6.0)  # longer than the grace that follows
    background.submit("more", store.work("b"))
    store.away = 1
    background.drain(patience=5.0)
    assert store.taken == ["a", "b"]
    background.close()


def test_an_ending_training_does_not_wait_for_a_store_for_ever() -> None:
    store, background = Store(), Background(pause=0.01)
    background.submit("a checkpoint", store.work("a"))
    background.submit("another", store.work("b"))
    began = time.monotonic()
    with pytest.raises(Failed, match="writing a checkpoint"):
        background.drain(patience=0.2)
    background.close()
    assert time.monotonic() - began < 30  # and not the hour of a training that goes on


def test_asked_to_leave_it_gives_an_outage_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the training waits for it, and cannot tell it so."""
    monkeypatch.setattr(background, "GRACE_SECONDS", 0.05)
    store, leave = Store(), threading.Event()
    waiting = Background(pause=0.01, leave=leave.is_set)
    waiting.submit("a checkpoint", store.work("a"))
    assert store.refused.wait(300)
    leave.set()
    with pytest.raises(Failed, match="writing a checkpoint"):
        waiting.drain()
    waiting.close()


def test_a_pause_ends_when_the_training_does() -> None:
    store, background = Store(), Background(pause=600.0)
    background.submit("a checkpoint", store.work("a"))
    assert store.refused.wait(300)
    store.away = 0
    background.close()
    assert store.taken == ["a"]
