"""Which rows a training asks of its packs, in a file, as `python -m tests.islands.asked`.

    python -m tests.islands.asked RUN SHARD FILE AT

An island's job, as Ray starts it, that gets SIGKILL when it asks for the AT-th time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from atoll.core.pack import Pack
from atoll.islands.job import main


@contextlib.contextmanager
def noting(file: Path, *, dies_at: int | None = None) -> Iterator[None]:
    """A line per request for pictures; the process ends in the middle of one of them."""
    x_data, numbers = Pack.x_data, itertools.count()

    def noted(pack: Pack, rows: Tensor) -> Tensor:
        if next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with file.open("a") as out:
            out.write(json.dumps(rows.tolist()) + "\n")
        return x_data(pack, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pack, "x_data", noted)
        yield


def asked(file: Path) -> list[int]:
    """All rows that were asked for, one after another."""
    return [row for line in file.read_text().splitlines() for row in json.loads(line)]


if __name__ == "__main__":
    _, run, shard, file, at = sys.argv
    with noting(Path(file), dies_at=int(at)):
        main([run, shard])
