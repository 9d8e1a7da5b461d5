"""What an island and its controller leave in storage for each other and for whoever watches.

Below `islands/SHARD`: `process-heartbeat.json` (the job lives), `heartbeat.json` (training goes
on), `stop.json` (somebody asks the job to commit and leave), `leave.json` (one submission of it is
to, by Ctrl-C or a signal to the launcher of its workers), `controller-journal.jsonl` (where and
when it was submitted) and `log-journal.jsonl` (what it said). All of it is observation: nothing
that is trained follows from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atoll.core.checkpoint import newest_commit, newest_generation
from atoll.core.errors import ExitCode, Fenced, Refused
from atoll.core.journal import log
from atoll.core.outage import at_once, unless_away
from atoll.core.storage import Storage

SCHEMA_VERSION = 1
# How a job learns which submission it is, to write it down beside its process id.
SUBMISSION_VARIABLE = "ATOLL_SUBMISSION_ID"
SIGN_SECONDS = 2.0
HEAD_TRAINING = "gate_head_training"
_LOG_LINES = 2000  # kept of one attempt


def island_folder(shard: str) -> str:
    """Where an island writes, relative to the run."""
    return f"islands/{shard}"


def process_heartbeat(shard: str) -> str:
    return f"{island_folder(shard)}/process-heartbeat.json"


def stop_request(shard: str) -> str:
    return f"{island_folder(shard)}/stop.json"


def controller_journal(shard: str) -> str:
    return f"{island_folder(shard)}/controller-journal.jsonl"


def log_journal(shard: str) -> str:
    return f"{island_folder(shard)}/log-journal.jsonl"


def leave_request(shard: str) -> str:
    return f"{island_folder(shard)}/leave.json"


def sigterm() -> None:
    """Ask this process to leave."""
    os.kill(os.getpid(), signal.SIGTERM)


def submission() -> str | None:
    """Which submission this process belongs to."""
    return os.environ.get(SUBMISSION_VARIABLE)


def ask_to_leave(run: Storage, shard: str, submission_id: str | None) -> None:
    """Ask one submission to commit and leave; another one may start again."""
    request = {"schema_version": SCHEMA_VERSION, "submission_id": submission_id}
    run.write_json(leave_request(shard), request)


def ask_to_stop(run: Storage, shard: str) -> None:
    """Ask a shard's job, and the controller that may start it again, to leave it alone."""
    request = {"schema_version": SCHEMA_VERSION, "unix_seconds": round(time.time(), 3)}
    run.write_json(stop_request(shard), request)


def read_object(run: Storage, name: str) -> dict[str, Any]:
    """A small JSON file that another process replaces; empty where it is not there."""
    try:
        found = run.read_json(name)
    except (FileNotFoundError, NotADirectoryError, Refused):
        return {}
    return found if isinstance(found, dict) else {}


def exit_code(run: Storage, shard: str, *, of: str | None = None) -> ExitCode | None:
    """How an island's last attempt ended, if it did: its own word.

    Of one submission alone it is that all is done, whoever says so, or how that one failed: one
    that was taken for dead may wake up and speak before its heir has claimed the place.
    """
    said = read_object(run, f"{island_folder(shard)}/exit.json")
    if "code" not in said:
        return None
    code = ExitCode(int(said["code"]))
    others = of is not None and said.get("submission_id") != of
    return None if others and code is not ExitCode.DONE else code


def trainings(shard: str) -> tuple[str, str]:
    """Where the expert's training writes, and the gate head's."""
    here = island_folder(shard)
    return here, f"{here}/{HEAD_TRAINING}"


def committed(run: Storage, shard: str) -> int:
    """Images of the newest commits, of the expert's and of the gate head's training together."""
    return sum(newest_commit(run, place) or 0 for place in trainings(shard))


def signs_of_life(run: Storage, shard: str) -> list[dict[str, Any]]:
    """What changes while a job lives; compared with an earlier look, so that no clock matters."""
    beats = [f"{place}/heartbeat.json" for place in trainings(shard)]
    return [read_object(run, name) for name in (process_heartbeat(shard), *beats)]


def write_journal(run: Storage, shard: str, event: str, submission_id: str, **facts: Any) -> None:
    """A line of the controller's journal, by its own clock."""
    line = {"event": event, "submission_id": submission_id, **facts}
    line["unix_seconds"] = round(time.time(), 3)
    run.append_line(controller_journal(shard), json.dumps(line))


def write_log(
    run: Storage, shard: str, submission_id: str, island: str, lines: Sequence[str]
) -> None:
    """The last lines of one attempt in place of those that were written of it before."""
    name = log_journal(shard)
    kept = [line for line in run.read_lines(name) if line.get("submission_id") != submission_id]
    facts = {"submission_id": submission_id, "island": island}
    kept += [{**facts, "line": line} for line in lines[-_LOG_LINES:]]
    run.write_bytes(name, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


class Claim:
    """Whether this process is still the one that writes an island, as of when this was made.

    A training claims one generation when it starts; when there are more than that, another writer
    has taken over.
    """

    def __init__(self, run: Storage, shard: str) -> None:
        self._run = run
        self._found = {place: newest_generation(run, place) for place in trainings(shard)}

    def overtaken(self) -> bool:
        """Whether a later writer has claimed one of the places of this one."""
        return any(newest_generation(self._run, p) > n + 1 for p, n in self._found.items())

    def check(self) -> None:
        """Raise `Fenced` where one has."""
        if self.overtaken():
            raise Fenced(
                f"Another process has taken over {', '.join(self._found)}",
                cure="let it work; this one has changed nothing since",
            )


class Process:
    """A job's sign of life, and its ear for a request to stop, beside the training.

    Once overtaken it says nothing more. `leave` is what a request comes to. No sign of life waits
    for storage, whatever the handle.
    """

    def __init__(self, run: Storage, shard: str, *, leave: Callable[[], None] = sigterm) -> None:
        self._leave = leave
        self._run = run
        self._shard = shard
        self._claim = Claim(run, shard)
        self._stage = "starting"
        self._ended = threading.Event()

    def enter(self, stage: str) -> None:
        """Say what is being worked on."""
        self._stage = stage
        with unless_away("a sign of life"):
            self.speak()

    def check(self) -> None:
        """Raise `Fenced` once overtaken."""
        self._claim.check()

    def speak(self) -> None:
        """Give a sign of life now: what storage says next is known to be of this submission."""
        sign = {
            "schema_version": SCHEMA_VERSION,
            "submission_id": submission(),
            "process": os.getpid(),
            "name": self._stage,
            "unix_seconds": round(time.time(), 3),
        }
        with contextlib.suppress(Fenced):
            self._run.write_json(process_heartbeat(self._shard), sign, check=self.check)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Beat and listen in a thread until the block ends."""
        with unless_away("a sign of life"):
            self.speak()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(timeout=30)

    def _watch(self) -> None:
        silent = False
        while not self._ended.wait(SIGN_SECONDS):
            # Whatever goes wrong here costs a sign of life, and neither the training nor the next
            # sign: without this thread a job looks dead, and hears no request.
            try:
                with at_once():
                    if self._claim.overtaken():
                        return
                    self._listen()  # first: from a full disk requests can be read
                    self.speak()
            except Exception as error:
                if not silent:
                    log.warning("no sign of life, tried again until there is one: %s", error)
                silent = True
            else:
                silent = False

    def _listen(self) -> None:
        asked = read_object(self._run, leave_request(self._shard))
        if self._run.exists(stop_request(self._shard)) or (
            asked and asked["submission_id"] == submission()
        ):
            self._leave()
