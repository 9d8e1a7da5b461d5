"""The process of an island's job, as Ray starts it.

    python -P -m atoll.islands.job RUN SHARD [--workers N --worker-cpus N --worker-gpus N]

Runs `island.py` and ends with `exit.json`. Ray is not imported, unless several workers are to be
launched (`workers.py`).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from atoll.core.collector import look_rarely
from atoll.core.errors import AtollError, ExitCode, Failed, Fenced, Interrupted
from atoll.core.journal import log, set_verbosity
from atoll.core.outage import GRACE_SECONDS, PATIENCE_SECONDS, ride_out
from atoll.core.storage import Storage
from atoll.islands.island import run_island
from atoll.islands.signs import Process, island_folder, submission
from atoll.islands.state import NotBitwise

SCHEMA_VERSION = 1  # of `exit.json`


def main(arguments: list[str] | None = None) -> int:
    """Run one island and say in `exit.json` how it ended; the exit code is the same number."""
    parser = argparse.ArgumentParser(description="Train one island of a run.")
    parser.add_argument("run")
    parser.add_argument("shard")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker-cpus", type=int, default=1)
    parser.add_argument("--worker-gpus", type=int, default=0)
    parser.add_argument("--worker-memory", type=int, default=0, help="bytes; 0 asks for none")
    given = parser.parse_args(arguments)
    set_verbosity(0)
    here = island_folder(given.shard)
    own = Storage(given.run).scoped(read=[], write=[here]).patient()
    code, reason, more = ExitCode.DONE, "", {}
    process: Process | None = None
    try:
        with _leaving_on_sigterm():
            process = Process(own, given.shard)
            if given.workers > 1:
                # Imported here: an island of one process has no use for Ray.
                from atoll.islands.workers import Each, launch

                each = Each(given.worker_cpus, given.worker_gpus, given.worker_memory)
                launch(given.run, given.shard, given.workers, each)
            else:
                with process.watching():
                    run_island(given.run, given.shard, enter=process.enter)
    except AtollError as error:
        code, reason = error.exit_code, str(error)
        if isinstance(error, NotBitwise):  # for the controller, which knows of other islands
            more = {"differing": error.differing}
    except Exception as error:  # the controller must learn of a bug too
        traceback.print_exc()
        code, reason = ExitCode.FAILED, f"{type(error).__name__}: {error}"
    if reason:
        log.error(reason)
    if process is not None:
        _say_the_end(own, process, given.shard, code, {"reason": reason, **more})
    return int(code)


def _say_the_end(
    own: Storage, process: Process, shard: str, code: ExitCode, facts: Mapping[str, Any]
) -> None:
    """Write `exit.json`, in time for a heir that an outage may have brought in."""

    # That all is there is true whoever says so, and then a run has no trace of who did.
    whose = {} if code is ExitCode.DONE else {"submission_id": submission()}

    said = {"schema_version": SCHEMA_VERSION, "code": int(code), **whose, **facts}

    def say() -> None:
        # Whose word it is: of a launcher whose workers never began there is no sign yet.
        process.speak()
        own.write_json(f"{island_folder(shard)}/exit.json", said, check=process.check)

    if code is ExitCode.FENCED:
        return  # everything is left to its successor
    # Who was asked to leave leaves soon, and a failure is known by the death of its process too.
    soon = code in (ExitCode.INTERRUPTED, ExitCode.FAILED)
    patience = GRACE_SECONDS if soon else PATIENCE_SECONDS
    try:
        ride_out("writing exit.json", say, patience=lambda: patience)
    except Fenced:
        return
    except (Failed, OSError) as error:
        log.error(str(error))


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Where no training is there to commit, SIGTERM leaves at once; only the first one counts."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted("Stopped between two trainings", cure="run the same command again")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    look_rarely()
    sys.stdout.flush()
    # Straight out: a library's thread must not hold a finished job's process.
    status = main()
    sys.stderr.flush()
    os._exit(status)
