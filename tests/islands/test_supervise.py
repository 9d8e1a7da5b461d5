"""Real Ray: isolated jobs, restarts, tokens, interruption, and what is refused before any of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from collections.abc import Callable, Iterator
from logging import LogRecord
from pathlib import Path

import psutil
import pytest

from atoll.core.errors import ExitCode, Failed, Refused, UsageError
from atoll.core.ledger import Ledger
from atoll.core.manifest import Manifest, check_artefact
from atoll.core.places import Island
from atoll.core.storage import Storage
from atoll.islands import heads, sites, submit
from atoll.islands.heads import Head, HeadOrder, local_heads, remove_dead_folders
from atoll.islands.settings import DenoiserTraining, TrainConfig, WatchConfig
from atoll.islands.sites import open_sites
from atoll.islands.status import read_status
from atoll.islands.submit import Cluster, Jobs, NotThere, TokenRefused, shipped_code
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
    on_s3,
)
from tests.islands.kills import (
    beside,
    command_lines,
    expect_none_left,
    kill_attempts,
)
from tests.islands.test_job import RESULTS, finish_here, order, results
from tests.s3 import Gate
from tests.waiting import PATIENCE_SECONDS, until

CLOCKS = ("heartbeat.json", "journal.jsonl")


@pytest.fixture(scope="module")
def head(s3: Gate) -> Iterator[Head]:
    """A head that the tests of what goes on upon one share; its jobs find the same store."""
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
    for name in [n for n in same if "/gen/" not in n]:  # a claim is its writer's own
        assert alone.read_bytes(name) == together.read_bytes(name), name

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


def test_a_job_on_s3_that_is_killed_again_and_again_but_gets_further_is_finished(
    fresh, on_head: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kills and one retry: an attempt that got further does not count."""
    monkeypatch.setattr("atoll.islands.queue._FAR_POLL_SECONDS", 0.5)
    config = TRAIN.model_copy(
        update={
            "training": DenoiserTraining(passes=14, checkpoints=14),
            "retries": 1,
            "watch": WatchConfig(backoff_seconds=0),
            "cache_gib": 0.004,
        }
    )
    near, _ = fresh()
    run = on_s3(near, tmp_path.name)
    manifest = Manifest.load(run)
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
    check_artefact(run, Manifest.load(run).experts[shard])
    (row,) = [row for row in read_status(run, manifest).shards if row.shard == shard]
    assert (row.state, row.generation) == ("done", 3)


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


def nodes(cluster: Cluster) -> list[dict[str, dict[str, float]]]:
    """What Ray says of the machines of a cluster."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    request = urllib.request.Request(f"{cluster.address}/api/v0/nodes?detail=1", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as said:
        found: list[dict[str, dict[str, float]]] = json.load(said)["data"]["result"]["result"]
    return found


def test_a_local_head_asks_for_its_token_and_leaves_nothing_behind() -> None:
    small = Island(name="local", local=True, cpus=1, memory_gib=1.5)
    with open_sites(TrainConfig(islands=(small,)), 1) as (site,):
        assert site.head is not None
        cluster = site.head.cluster
        for token, expected in ((None, 401), ("0" * 64, 403), (cluster.token, 200)):
            assert answer(cluster, token) == expected
        until(lambda: nodes(cluster), every=0.1)  # it answers a moment before it knows itself
        (offered,) = (node["resources_total"] for node in nodes(cluster))
        assert (offered["CPU"], offered["memory"]) == (1, 1.5 * 2**30)
        assert "127.0.0.1" in cluster.address
        port = cluster.address.rsplit(":", 1)[1]
        folder = next(  # ours, whatever other heads there are
            line.split("--temp-dir ")[1].split()[0]
            for line in command_lines(f"--dashboard-port {port} ")
            if "--temp-dir " in line
        )
        token_file = Path(folder).parent / "token"
        assert token_file.stat().st_mode & 0o077 == 0
        with pytest.raises(TokenRefused, match="refuses the token"):
            Jobs(type(cluster)(cluster.address, "0" * 64))
        with pytest.raises(NotThere, match="does not exist"):
            Jobs(cluster).status("nobody-s")
    expect_none_left(str(Path(folder).parent))
    assert not Path(folder).exists()


def test_a_head_that_ends_at_its_start_is_tried_once_more_at_other_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, given = heads.free_ports, []

    def at_first_none(count: int) -> list[int]:
        # As if others had taken one; Ray itself looks for half a minute before it believes that.
        given.append([99_999] * count if not given else free(count))
        return given[-1]

    monkeypatch.setattr(heads, "free_ports", at_first_none)
    with local_head(1) as cluster:
        assert answer(cluster, cluster.token) == 200
    assert len(given) == 2
    monkeypatch.setattr(heads, "free_ports", lambda count: [99_999] * count)
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

    def gone() -> bool:
        # Again and again: a process of Ray that bears no name of the folder may write once more.
        with contextlib.suppress(FileNotFoundError):  # another start was quicker
            for path in [folder, *folder.rglob("*")]:
                if not path.is_symlink():
                    os.utime(path, (0, 0))
        remove_dead_folders()  # which leaves alone what another start is about to remove
        return not folder.exists()

    until(gone)


def test_a_dead_folder_without_a_lock_is_removed_as_well(tmp_path) -> None:
    folder = tmp_path / "atoll-ray-anew"
    (folder / "ray/session_x/logs").mkdir(parents=True)
    remove_dead_folders(tmp_path)
    os.utime(folder / "lock", (0, 0))
    remove_dead_folders(tmp_path)
    assert not folder.exists()


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


@pytest.fixture
def said(monkeypatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The warnings that hold a word; no cluster is too slow to answer meanwhile."""
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", PATIENCE_SECONDS)
    caplog.set_level(logging.WARNING, "atoll")
    return lambda word: [m for m in map(LogRecord.getMessage, caplog.records) if word in m]


def test_a_token_that_is_mended_brings_its_island_back_while_the_others_go_on(
    fresh, on_head: None, said, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sites, "_ASK_AGAIN_SECONDS", 1.0)
    run, manifest = fresh()
    token = tmp_path / "token"
    token.write_text("0" * 64)
    pinned, other = "shard-00", "shard-01"
    with local_head(1) as cluster:
        b = Island(
            name="b", address=cluster.address, token_file=str(token), python=sys.executable,
            ship=False, shards=(pinned,),
        )  # fmt: skip
        places = {"islands": (Island(name="local", local=True), b)}
        refusal = f"Island b at {cluster.address} refuses the token of {token}: 403"

        impatient = TRAIN.model_copy(
            update={**places, "watch": WatchConfig(unreachable_seconds=0.1, give_up_seconds=0.1)}
        )
        with pytest.raises(Failed, match=r"1 of 1 islands.*no island is left for it") as raised:
            train(run, manifest, impatient, shards=[pinned])
        assert refusal in raised.value.what
        assert f"write the cluster's token into {token}" in raised.value.what
        assert len(said(refusal)) == 2  # by the island, and by the shard that was given up

        def mend() -> None:
            until(lambda: other in Manifest.load(run).experts)
            (tmp_path / "new").write_text(cluster.token)
            (tmp_path / "new").replace(token)

        # The other shard may take its time on busy cores, and nothing is said of the wait.
        patient = TRAIN.model_copy(update={**places, "watch": WatchConfig(unreachable_seconds=600)})
        with beside(mend):
            assert train(run, manifest, patient, shards=[pinned, other]) == [pinned, other]
        assert len(said(refusal)) == 3  # and once by the second command
        assert said("answer") == ["Island b answers again"]
        assert not said("0" * 64)
        assert not said(cluster.token)
    (ended,) = journal(run, other, "ended", CONTROLLER)
    (began,) = journal(run, pinned, "submitted", CONTROLLER)
    assert began["island"] == "b"
    assert began["unix_seconds"] >= ended["unix_seconds"]


def test_a_cluster_that_knows_a_job_no_more_still_answers(
    fresh, on_head: None, said, monkeypatch
) -> None:
    def unknown(_self: Jobs, submission_id: str) -> str:
        raise NotThere(f"404 Job {submission_id} does not exist")

    monkeypatch.setattr(Jobs, "status", unknown)
    run, manifest = fresh()
    assert train(run, manifest, TRAIN, shards=["shard-01"]) == ["shard-01"]
    assert not said("answer")


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
