"""Real deaths: of a head, of its parts, and of a machine that its cloud takes back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from atoll.core.checkpoint import newest_commit
from atoll.core.errors import ExitCode
from atoll.islands.heads import Head, HeadOrder, local_heads
from atoll.islands.settings import DenoiserTraining
from atoll.islands.supervise import train
from tests.islands.clouds import playing
from tests.islands.conftest import CONTROLLER, TRAIN, copied, finding, journal
from tests.islands.kills import attempt, beside, expect_gone, expect_none_left, kill_in_head
from tests.islands.test_job import finish_here, order, results
from tests.waiting import until

SHARD = "shard-01"
LONG = TRAIN.model_copy(update={"training": DenoiserTraining(passes=8, checkpoints=8)})


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One head, which these tests end and `train` starts again."""
    with local_heads([HeadOrder("local", 1)]) as (started,):
        yield started


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the shard comes to when nothing dies."""
    run, manifest = copied(made, tmp_path_factory.mktemp("undisturbed") / "run")
    order(run, manifest, SHARD, LONG)
    return finish_here(run, SHARD)


@pytest.mark.parametrize("name", [None, "raylet", "gcs_server"])
def test_the_only_head_is_started_again_when_it_or_a_part_of_it_dies(
    fresh, head: Head, undisturbed: dict[str, str], name: str | None
) -> None:
    """Killed with all that it started, or one part; the next generation goes on, bitwise."""
    run, manifest = fresh()
    before: list[psutil.Process] = []
    with finding([head]), beside(lambda: before.extend(kill_in_head(run, SHARD, name))):
        assert train(run, manifest, LONG, shards=[SHARD]) == [SHARD]
    expect_gone(before)
    expect_none_left(run.uri)
    assert results(run, SHARD) == undisturbed
    submitted = journal(run, SHARD, "submitted", CONTROLLER)
    assert [line["generation"] for line in submitted] == [1, 2]
    (resumed,) = journal(run, SHARD, "trained")
    assert resumed["from_images_seen"] > 0


# The job as it is, but for where its cloud's metadata are and how often it asks.
ON_A_SPOT_MACHINE = """#!{python} -P
import os
import sys
from functools import partial

os.environ |= {environment}
from atoll.islands import island, job, spot

island.heeding = partial(spot.heeding, poll_seconds=0.02)
os._exit(job.main(sys.argv[4:]))
"""


def test_a_notice_to_a_job_is_a_commit_and_the_next_machine_goes_on_from_there(
    fresh, head: Head, undisturbed: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    run, manifest = fresh()
    here, left_at = f"islands/{SHARD}", []
    with playing() as (cloud, environment), finding([head]):
        cloud.once = True
        program = tmp_path / "python"
        program.write_text(ON_A_SPOT_MACHINE.format(python=sys.executable, environment=environment))
        program.chmod(0o755)
        monkeypatch.setattr(head, "cluster", replace(head.cluster, python=str(program)))

        def take_back() -> None:
            attempt(run, SHARD, 1)
            cloud.notice = True
            until(lambda: run.exists(f"{here}/exit.json"))
            left_at.append(newest_commit(run, here))

        with beside(take_back):
            told = LONG.model_copy(update={"spot": "aws"})
            assert train(run, manifest, told, shards=[SHARD]) == [SHARD]
    assert results(run, SHARD) == undisturbed
    ended = journal(run, SHARD, "ended", CONTROLLER)
    assert [line["code"] for line in ended] == [ExitCode.INTERRUPTED, ExitCode.DONE]
    (resumed,) = journal(run, SHARD, "trained")
    assert (resumed["generation"], [resumed["from_images_seen"]]) == (2, left_at)
    expect_none_left(run.uri)
