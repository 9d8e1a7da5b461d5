"""Waiting for what another process or thread does, on a fast machine as on a busy one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

# Half of what a test may take. Nobody waits so long, unless the test is about to fail.
PATIENCE_SECONDS = 300.0


def until(
    moment: Callable[[], object],
    *,
    by: subprocess.Popen[Any] | None = None,
    every: float = 0.02,
) -> None:
    """Return as soon as it is so; `by` is the process whose doing it is, alive until then."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        ended = by is not None and by.poll() is not None  # first: it may do it and end
        if moment():
            return
        assert by is None or not ended, by.communicate()
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s"
        time.sleep(every)
