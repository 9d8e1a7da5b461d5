"""The queue beside a cluster that is played: jobs that hang, wait, refuse, or do not leave."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.core.checkpoint import Checkpoints
from atoll.core.errors import ExitCode, Failed, Interrupted, Refused
from atoll.core.places import Island
from atoll.core.storage import Storage
from atoll.islands import queue
from atoll.islands.curves import Curves
from atoll.islands.queue import Queue
from atoll.islands.signs import leave_request, process_heartbeat
from atoll.islands.sites import Site
from atoll.islands.submit import Unreachable
from atoll.islands.work import Choice, Work
from tests.islands.conftest import CONTROLLER, TRAIN, journal
from tests.outages import Away, When, said


class Jobs:
    """A cluster whose jobs run for ever."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    def submit(self, *_given: Any, **_options: Any) -> None:
        return None

    def status(self, _submission_id: str) -> str:
        return "STOPPED" if self.stopped else "RUNNING"

    def details(self, _submission_id: str) -> dict[str, str]:
        return {"message": "Job has not started yet."}

    def logs(self, _submission_id: str) -> str:
        return "said"

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


def queue_of(run: Storage, jobs: Any) -> Queue:
    island = Island(name="there", address="http://127.0.0.1:1")
    site = Site(island, jobs, at_once=1, cpus=1, gpus=0)
    return Queue(run, TRAIN, [site], lambda shard: None, Curves(run, ["a"]))


def test_an_island_that_answers_and_takes_no_job_leaves_the_shard_to_another(
    tmp_path: Path, jobs: Jobs
) -> None:
    class Unwilling(Jobs):
        def submit(self, *_given: Any, **_options: Any) -> None:
            raise Unreachable("No available agent to submit job, please try again later")

        def check(self) -> None:
            return None

    run = Storage(tmp_path)
    at_work = queue_of(run, Unwilling())
    at_work._waiting = [Work("a", Choice(run, "a", TRAIN, at_work._sites))]
    (waiting,) = at_work._waiting
    with said() as lines:
        for times in range(1, 4):
            for _ in range(3):  # more often than it is asked
                at_work._turn(lambda *_given, **_options: None)
                at_work._sites[0].heard()
            assert waiting.turned_away == times
            waiting.not_before = 0.0
    words = "could not be given to island there: No available"
    assert len([line for line in lines if words in line]) == 1

    other = Site(Island(name="other", address="http://127.0.0.1:2"), jobs, 1, cpus=1, gpus=0)
    at_work._sites = [*at_work._sites, other]  # as one that comes back
    waiting.choice = Choice(run, "a", TRAIN, at_work._sites)
    waiting.not_before = 0.0
    at_work._turn(lambda *_given, **_options: None)
    (work,) = at_work._running
    assert work.submission is not None
    assert work.submission.site is other
    assert waiting.turned_away == 0


def test_a_head_that_does_not_come_back_is_one_that_does_not_answer(jobs: Jobs) -> None:
    class Ended:
        def alive(self) -> bool:
            return False

        def last_words(self) -> str:
            return "none"

        def restart(self) -> None:
            raise Failed("The Ray head did not start within 90 s")

    site = Site(Island(name="local", local=True), jobs, 1, cpus=1, gpus=0, head=Ended())
    assert [site.revive() for _ in range(3)] == [True, True, False]
    assert "did not start" in site.trouble


def test_time_without_storage_is_no_silence(
    away: type[Away], jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that could not be heard is given some looks before it is taken for dead."""
    at_work, clock = running(Storage("away://run"), jobs, monkeypatch)
    (work,) = at_work._running
    looks = 0
    at_work._turn(lambda *_given, **_options: None)
    while at_work._running:
        clock[0] += 3600.0
        looks += 1
        at_work._turn(lambda *_given, **_options: None)
    assert looks > queue._LOOKS
    assert "no sign of life" in work.reasons[0]


def running(run: Storage, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> tuple[Queue, list[float]]:
    """A queue whose one job has given a first sign of life in its expert's training; its clock."""
    clock = [0.0]
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    at_work = queue_of(run, jobs)
    at_work._waiting = [Work("a", Choice(run, "a", TRAIN, at_work._sites))]
    at_work._turn(lambda *_given, **_options: None)
    (work,) = at_work._running
    beat(run, work)
    return at_work, clock


def beat(run: Storage, work: Work, *, number: int = 0, stage: str = "expert") -> None:
    assert work.submission is not None
    sign = {"submission_id": work.submission.name, "name": stage, "unix_seconds": number}
    run.write_json(process_heartbeat("a"), sign)


def test_a_job_that_lives_and_takes_no_step_is_given_up_for_dead(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(tmp_path)
    at_work, clock = running(run, jobs, monkeypatch)
    (work,) = at_work._running
    assert work.submission is not None
    submission, number = work.submission.name, 0

    def hours(count: float, *, stage: str, steps: bool) -> None:
        nonlocal number
        for _ in range(round(count * 3600 / 10)):
            number += 1
            clock[0] += 10.0
            beat(run, work, number=number, stage=stage)
            if steps:
                run.write_json("islands/a/heartbeat.json", {"images_seen": number})
            at_work._turn(lambda *_given, **_options: None)

    hours(0.9, stage="expert", steps=False)
    hours(0.1, stage="expert", steps=True)
    hours(0.9, stage="expert", steps=False)
    hours(2, stage="preview", steps=False)  # which has none
    assert at_work._running == [work]
    hours(0.5, stage="gate_head", steps=False)
    assert at_work._running == [work]
    hours(0.6, stage="gate_head", steps=False)
    assert "it lives, and has taken no step for 36" in work.reasons[0]
    assert jobs.stopped[0] == submission


def test_what_a_job_waits_for_that_does_not_begin_is_said_once(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, clock = running(Storage(tmp_path), jobs, monkeypatch)
    monkeypatch.setattr(jobs, "status", lambda _submission: "PENDING")
    with said() as lines:
        for _ in range(100):
            clock[0] += 10.0
            at_work._turn(lambda *_given, **_options: None)
    assert len(at_work._running) == 1  # however long it is
    (line,) = (line for line in lines if "is not begun" in line)
    assert "on island there, which was asked for 1 CPUs and 0 GPUs: Job has not started" in line
    (waiting,) = journal(Storage(tmp_path), "a", "pending", CONTROLLER)
    assert "Job has not started" in waiting["reason"]


def test_what_cannot_be_collected_is_given_up_and_the_others_go_on(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(tmp_path)
    at_work, _ = running(run, jobs, monkeypatch)
    (work,) = at_work._running

    def collect(_shard: str) -> None:
        raise Refused("It is not what its card says")

    at_work._collect = collect
    run.write_json("islands/a/exit.json", {"submission_id": "another's", "code": 6})
    at_work._turn(lambda *_given, **_options: None)
    assert at_work._running == [work]  # one that woke up, and spoke before this one had claimed
    run.write_json("islands/a/exit.json", {"code": 0, "reason": ""})
    at_work._turn(lambda *_given, **_options: None)
    assert at_work._given_up == [work]
    assert work.reasons == ["It is not what its card says."]
    assert work.code is ExitCode.REFUSED


def test_a_shard_has_begun_once_a_training_of_this_job_gives_a_sign_of_life(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then its options may yet be refused; an earlier job that lives on says nothing."""
    run = Storage(tmp_path)
    Checkpoints(run, "islands/a").claim()
    at_work, _ = running(run, jobs, monkeypatch)
    begun: list[bool] = []
    at_work._begun = lambda: begun.append(True)
    (work,) = at_work._running
    for stage, seen in (("starting", 8), ("expert", 16)):
        beat(run, work, stage=stage)
        run.write_json("islands/a/heartbeat.json", {"images_seen": seen, "generation": 1})
        at_work._turn(lambda *_given, **_options: None)
    assert not begun
    run.write_json("islands/a/heartbeat.json", {"images_seen": 8, "generation": 2})
    at_work._turn(lambda *_given, **_options: None)
    assert begun


@pytest.mark.parametrize("commits", [True, False])
def test_ctrl_c_asks_in_storage_and_claims_no_commit_that_nobody_spoke_of(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    run = Storage(tmp_path)
    at_work, clock = running(run, jobs, monkeypatch)
    (work,) = at_work._running
    assert work.submission is not None
    name = work.submission.name

    def sleep(_seconds: float) -> None:
        clock[0] += 1.0
        asked = run.read_json(leave_request("a"))
        assert asked["submission_id"] == name
        if commits and clock[0] > 60:  # longer than Ray would have waited
            said = {"submission_id": name, "code": int(ExitCode.INTERRUPTED)}
            run.write_json("islands/a/exit.json", said)

    monkeypatch.setattr(queue.time, "sleep", sleep, raising=False)
    told = str(at_work._interrupted())
    if commits:
        assert "Stopped; the islands have committed" in told
        assert jobs.stopped == []
    else:
        assert "a did not say so, and will go on from their last commits" in told
        assert jobs.stopped == [name]


def test_ctrl_c_while_storage_is_away_stops_the_jobs_and_waits_for_nothing(
    away: type[Away], jobs: Jobs
) -> None:
    run = Storage("away://run").patient()
    requests: list[str] = []

    def rule(_request: str, _path: str) -> When:
        requests.append(_path)
        if len(requests) == 4:
            raise KeyboardInterrupt
        return "before"

    def submit(*_given: Any, **_options: Any) -> None:
        away.rule = rule  # from now on

    jobs.submit = submit  # type: ignore[method-assign]
    began = time.monotonic()
    with said() as lines, pytest.raises(Interrupted, match="a did not say so"):
        queue_of(run, jobs).work({"a": 8})
    assert len(jobs.stopped) == 1
    assert time.monotonic() - began < 60
    assert any("how the islands ended is left out" in line for line in lines)


def test_ctrl_c_while_a_job_is_being_submitted_stops_it_too(tmp_path: Path, jobs: Jobs) -> None:
    """The island may have it already, and nobody would know its name."""
    given: list[str] = []

    def submit(*_given: Any, submission_id: str, **_options: Any) -> None:
        given.append(submission_id)
        raise KeyboardInterrupt

    jobs.submit = submit  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        queue_of(Storage(tmp_path), jobs).work({"a": 8})
    assert jobs.stopped == given != []
