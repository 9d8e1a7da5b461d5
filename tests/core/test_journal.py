"""Progress: a throttled line per interval where nobody watches, silence where that is asked."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from atoll.core import journal


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    before = journal.log.handlers[:], journal.log.level, journal.log.propagate
    yield
    journal.log.handlers[:], journal.log.propagate = before[0], before[2]
    journal.log.setLevel(before[1])


def test_lines_are_throttled_and_the_last_is_always_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    journal.set_verbosity(0)
    with journal.progress("steps", 100, done=10) as advance:
        for _ in range(90):
            now[0] += 0.3
            advance(1, note="loss 0.5")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines == ["steps: 44/100 loss 0.5", "steps: 78/100 loss 0.5", "steps: 100/100 loss 0.5"]


@pytest.mark.parametrize(
    ("verbose", "level"), [(-1, logging.WARNING), (0, logging.INFO), (1, logging.DEBUG), (2, 10)]
)
def test_verbosity(verbose: int, level: int, capsys: pytest.CaptureFixture[str]) -> None:
    journal.set_verbosity(verbose)
    assert journal.log.level == level
    with journal.progress("steps", 1) as advance:
        advance(1)
    assert (capsys.readouterr().err == "") == (verbose < 0)
    journal.log.warning("careful")
    assert capsys.readouterr().err == "careful\n"


def test_setting_verbosity_again_does_not_double_the_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal.set_verbosity(0)
    journal.set_verbosity(0)
    journal.log.info("once")
    assert capsys.readouterr().err == "once\n"


@pytest.mark.parametrize(("in_bytes", "shown"), [(True, "2.0/5.0 GB"), (False, "2000000000/5000")])
def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, in_bytes: bool, shown: str) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(journal, "console", Console(file=screen, force_terminal=True, width=120))
    journal.set_verbosity(0)
    with journal.progress("averaging", 5_000_000_000, in_bytes=in_bytes) as advance:
        advance(2_000_000_000, note="well")
    assert shown in screen.getvalue()
    assert "well" in screen.getvalue()


def test_bytes_are_said_as_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    journal.set_verbosity(0)
    with journal.progress("averaging", 1_730_000_000, in_bytes=True) as advance:
        advance(1_730_000_000)
    assert capsys.readouterr().err == "averaging: 1.7 GB/1.7 GB \n"
