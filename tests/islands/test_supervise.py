"""Real Ray: isolated jobs, restarts, tokens, interruption, and what is refused before any of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from atoll.core.errors import ExitCode, Failed, Refused, UsageError
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest, check_artefact
from atoll.core.places import Island
from atoll.core.storage import Storage
from atoll.islands import heads
from atoll.islands.heads import Head, HeadOrder, local_heads, remove_dead_folders
from atoll.islands.settings import DenoiserTraining, WatchConfig
from atoll.islands.submit import shipped_code
from atoll.islands.supervise import plan_islands, train
from tests.islands.conftest import (
    CONTROLLER,
    TRAIN,
    answer,
    copied,
    ended_job,
    finding,
    journal,
    local_head,
)
from tests.islands.kills import (
    beside,
    command_lines,
    expect_none_left,
    kill_attempts,
)
from tests.islands.test_job import RESULTS, finish_here, order, results
from tests.waiting import PATIENCE_SECONDS, until

CLOCKS = ("heartbeat.json", "journal.jsonl")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that the tests of what goes on upon one share."""
    with local_heads([HeadOrder("local", 2)]) as (started,):
        yield started


@pytest.fixture
def on_head(head: Head) -> Iterator[None]:
    with finding([head]):
        yield


@pytest.fixture(scope="module")
def whole(
    made: Path, head: Head, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, Manifest]:
    """The run with all its islands, undisturbed."""
    run, manifest = copied(made, tmp_path_factory.mktemp("together") / "run")
    with finding([head]):
        assert train(run, manifest, TRAIN) == list(manifest.shards)
    return run, manifest


def test_an_expert_is_bitwise_the_same_alone_or_beside_others(
    fresh, whole: tuple[Storage, Manifest], on_head: None
) -> None:
    together, manifest = whole
    shard = "shard-01"
    alone, single = fresh("alone")
    assert train(alone, single, TRAIN, shards=[shard]) == [shard]
    assert list(single.experts) == [shard]
    for name in RESULTS:
        here = f"islands/{shard}/{name}"
        assert alone.sha256(here) == together.sha256(here), name
    same = [n for n in alone.list(f"islands/{shard}") if not n.endswith(CLOCKS)]
    assert same == [n for n in together.list(f"islands/{shard}") if not n.endswith(CLOCKS)]
    assert all(alone.read_bytes(n) == together.read_bytes(n) for n in same)

    started = [journal(together, each, "started")[0] for each in manifest.shards]
    assert len({entry["process"] for entry in started}) == len(manifest.shards)
    assert len({entry["submission_id"] for entry in started}) == len(manifest.shards)
    assert os.getpid() not in {entry["process"] for entry in started}

    for each, expert in manifest.experts.items():
        check_artefact(together, expert)
        check_artefact(together, expert.gate_head)
        entry = Ledger(together).latest("expert", each)
        assert entry is not None
        assert entry.shards == [each]
    assert Manifest.load(together) == manifest
    assert train(together, manifest, TRAIN) == []  # nothing is left to do, and no head is started


def test_an_island_that_is_lost_for_good_changes_no_bit_of_the_others(
    fresh, whole: tuple[Storage, Manifest], on_head: None
) -> None:
    run, manifest = fresh()
    lost, *others = manifest.shards

    def lose() -> None:
        until(lambda: run.list(f"islands/{lost}/commits"), every=0.002)
        psutil.Process(journal(run, lost, "started")[0]["process"]).kill()

    with beside(lose), pytest.raises(Failed, match=rf"1 of 3 islands.*{lost}: its process died"):
        train(run, manifest, TRAIN.model_copy(update={"retries": 0}))
    expect_none_left(run.uri)
    undisturbed, together = whole
    left = Manifest.load(run).experts
    assert left == {each: together.experts[each] for each in others}
    for each in others:
        assert results(run, each) == results(undisturbed, each)


def test_a_job_that_is_killed_again_and_again_but_gets_further_is_finished(
    fresh, on_head: None
) -> None:
    """Two kills and one retry: an attempt that got further does not count."""
    config = TRAIN.model_copy(
        update={
            "training": DenoiserTraining(passes=60, checkpoints=30),
            "retries": 1,
            "watch": WatchConfig(backoff_seconds=0),
        }
    )
    run, manifest = fresh()
    shard = "shard-00"
    with beside(lambda: kill_attempts(run, shard, (1, 2))):
        assert train(run, manifest, config, shards=[shard]) == [shard]
    started = journal(run, shard, "started")
    assert len(started) == 3
    assert len({entry["submission_id"] for entry in started}) == 3
    resumed = journal(run, shard, "trained")[0]
    assert resumed["generation"] == 3
    assert resumed["from_images_seen"] > 0
    expect_none_left(run.uri)

    undisturbed, manifest = fresh("undisturbed")
    order(undisturbed, manifest, shard, config)
    assert finish_here(undisturbed, shard) == results(run, shard)


def test_ctrl_c_commits_every_island_and_leaves_no_process(fresh) -> None:
    run, manifest = fresh()
    script = (
        "import sys\n"
        "from atoll.core.errors import AtollError\n"
        "from atoll.core.manifest import Manifest\n"
        "from atoll.core.storage import Storage\n"
        "from atoll.islands.settings import DenoiserTraining, TrainConfig\n"
        "from atoll.islands.supervise import train\n"
        "run = Storage(sys.argv[1])\n"
        "config = TrainConfig(slots=2, training=DenoiserTraining(passes=5000, checkpoints=1))\n"
        "try:\n"
        "    train(run, Manifest.load(run), config)\n"
        "except AtollError as error:\n"
        "    sys.exit(int(error.exit_code))\n"
    )
    controller = subprocess.Popen([sys.executable, "-c", script, run.uri])

    def begun() -> list[str]:
        return [s for s in manifest.shards if run.exists(f"islands/{s}/heartbeat.json")]

    try:
        until(lambda: len(begun()) >= 2, by=controller)
        controller.send_signal(signal.SIGINT)
        assert controller.wait(timeout=PATIENCE_SECONDS) == ExitCode.INTERRUPTED
    finally:
        controller.kill()
    for shard in begun():
        assert run.read_json(f"islands/{shard}/exit.json")["code"] == ExitCode.INTERRUPTED
        assert run.list(f"islands/{shard}/commits")
    expect_none_left(run.uri)


def test_a_head_that_ends_at_its_start_is_tried_once_more_at_other_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, given = heads._free_ports, []

    def at_first_none(count: int) -> list[int]:
        # As if others had taken one; Ray itself looks for half a minute before it believes that.
        given.append([99_999] * count if not given else free(count))
        return given[-1]

    monkeypatch.setattr(heads, "_free_ports", at_first_none)
    with local_head(1) as cluster:
        assert answer(cluster, cluster.token) == 200
    assert len(given) == 2
    monkeypatch.setattr(heads, "_free_ports", lambda count: [99_999] * count)
    with pytest.raises(Failed, match="did not start and ended"), local_head(1):
        pass


def test_a_head_dies_with_its_controller() -> None:
    script = (
        "import os, sys, time\n"
        "from atoll.islands.heads import HeadOrder, local_heads\n"
        "with local_heads([HeadOrder('a', 1)]) as (head,):\n"
        "    print(head.folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    controller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert controller.stdout is not None
    folder = Path(controller.stdout.readline().decode().strip())
    assert folder.is_absolute()  # it is said only once the head answers
    assert command_lines(str(folder))
    controller.kill()
    controller.wait()
    expect_none_left(str(folder))
    # Its folder is left; the next start removes it, once nothing has moved there for a while.
    assert folder.exists()
    remove_dead_folders()
    assert folder.exists()
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # a start of somebody else's was quicker
                os.utime(path, (0, 0))

    def gone() -> bool:
        remove_dead_folders()  # which leaves alone what another start is about to remove
        return not folder.exists()

    until(gone)


def test_the_plan_is_written_before_the_first_job_and_does_not_move(fresh) -> None:
    run, manifest = fresh()
    plan_islands(run, manifest, TRAIN)
    plans = {name: shard.plan for name, shard in Manifest.load(run).shards.items()}
    assert all(plans.values())
    other = TRAIN.model_copy(update={"training": DenoiserTraining(passes=7)})
    with pytest.raises(Refused, match="is planned for"):
        plan_islands(run, manifest, other)
    # A shard's plan does not know of the others.
    lone, few = fresh("lone")
    few.shards = {"shard-01": few.shards["shard-01"]}
    plan_islands(lone, few, TRAIN)
    assert few.shards["shard-01"].plan == plans["shard-01"]


def test_what_is_refused_before_anything_starts(fresh) -> None:
    run, manifest = fresh()
    with pytest.raises(UsageError, match="Did you mean 'shard-01'"):
        train(run, manifest, TRAIN, shards=["shard-1"])
    with pytest.raises(UsageError, match="processes of their own"):
        train(Storage("memory://run"), manifest, TRAIN)
    with pytest.raises(UsageError, match="not an address"):
        Island(name="cluster", address="my-cluster")
    baseless = manifest.model_copy(update={"base": None})
    with pytest.raises(Exception, match="no base yet"):
        train(run, baseless, TRAIN)
    assert not run.exists("islands")


def without_atoll(folder: Path) -> Path:
    """A python with our dependencies, and not our checkout."""
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    base = {"base": str(folder / "bare"), "platbase": str(folder / "bare")}
    site = Path(sysconfig.get_paths(vars=base)["purelib"])
    # The folders named in a .pth are searched; the .pth files in them are not run.
    places = [place for place in sys.path if place.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{place}\n" for place in places))
    python = folder / "bare/bin/python"
    assert subprocess.run([python, "-P", "-c", "import torch"]).returncode == 0
    assert subprocess.run([python, "-P", "-c", "import atoll"], capture_output=True).returncode
    return python


def test_a_cluster_of_somebody_elses_trains_the_same(fresh, monkeypatch, tmp_path: Path) -> None:
    """By its address and a token from the environment; it is left running, and left as it was."""
    shard = "shard-01"
    here, manifest = fresh("here")
    order(here, manifest, shard)
    expected = finish_here(here, shard)
    # The interpreter there is found on the cluster's own path, and has nothing of ours.
    bare = without_atoll(tmp_path)
    monkeypatch.setenv("PATH", f"{bare.parent}:{os.environ['PATH']}")
    run, manifest = fresh("run")
    with local_head(1) as cluster:
        mounted = tmp_path / "mounted"  # the run as that cluster reaches it
        mounted.symlink_to(run.uri)
        away = Island(name="away", address="http://127.0.0.1:1", token_env="AWAY", jobs=1)
        monkeypatch.setenv("AWAY", "1" * 64)
        there = Island(name="there", address=cluster.address, prefix=str(mounted))
        config = TRAIN.model_copy(update={"islands": (away, there)})
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        with pytest.raises(Failed, match="RAY_AUTH_TOKEN"):
            train(run, manifest, config, shards=[shard])
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        # What would lead the client elsewhere is of no effect.
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        assert train(run, manifest, config, shards=[shard]) == [shard]
        assert results(run, shard) == expected
        (began,) = journal(run, shard, "submitted", CONTROLLER)
        assert began["code_sha256"] == hashlib.sha256(shipped_code()).hexdigest()
        details = ended_job(cluster, began)
        assert details["driver_exit_code"] == 0
        assert details["entrypoint"].endswith(f"{mounted} {shard}")


def test_a_store_without_exclusive_create_is_refused(fresh, monkeypatch) -> None:
    run, manifest = fresh()
    monkeypatch.setattr(Storage, "create", lambda self, name, data: self.write_bytes(name, data))
    with pytest.raises(Refused, match="two writers"):
        train(run, manifest, TRAIN)


def test_an_island_that_refuses_is_not_tried_again_and_the_others_are_kept(
    fresh, on_head: None
) -> None:
    run, manifest = fresh()
    pack = run.local("shards/shard-00/pack-00000.safetensors")
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(Refused, match=r"1 of 2 islands.*shard-00"):
        train(run, manifest, TRAIN, shards=["shard-00", "shard-01"])
    assert list(Manifest.load(run).experts) == ["shard-01"]
    assert len(journal(run, "shard-00", "started")) == 1
