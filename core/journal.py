"""What a command says while it works: progress on stderr, one JSON object on stdout.

On a terminal a progress bar, otherwise a line per interval, so that a log file stays readable.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0
log = logging.getLogger("atoll")
console = Console(stderr=True)

Advance = Callable[..., None]
"""`advance(n, note="loss 0.12")`: n more units are done."""


def set_verbosity(verbose: int) -> None:
    """-1 says only warnings, 0 the usual, 1 everything that the libraries say."""
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbose, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


@contextmanager
def progress(what: str, total: int, *, done: int = 0, in_bytes: bool = False) -> Iterator[Advance]:
    """Count `total` units of work, or bytes, some of which may be `done` already."""
    if log.level > logging.INFO:
        yield lambda n=1, note="": None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(),
            DownloadColumn() if in_bytes else MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(what, total=total, completed=done, note="")
            yield lambda n=1, note="": bars.update(bar, advance=n, note=note)
        log.info("%s: done", what)
    else:
        yield _throttled(what, total, done, filesize.decimal if in_bytes else str)


def _throttled(what: str, total: int, done: int, shown: Callable[[int], str]) -> Advance:
    count, said = done, time.monotonic()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal count, said
        count += n
        if count >= total or time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            log.info("%s: %s/%s %s", what, shown(count), shown(total), note)

    return advance
