"""An island as a process: resumed bitwise after kill -9, and reading nothing but its own."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from atoll.core.checkpoint import Checkpoints
from atoll.core.digest import canonical_json
from atoll.core.errors import ConfigError, ExitCode, Fenced, Refused
from atoll.core.manifest import Manifest
from atoll.core.pack import Pack
from atoll.core.storage import Storage
from atoll.islands.island import PARTS, run_island
from atoll.islands.settings import DenoiserTraining, TrainConfig
from atoll.islands.signs import HEAD_TRAINING
from atoll.islands.supervise import plan_islands, write_order
from tests.islands.asked import asked, noting
from tests.islands.conftest import TRAIN, journal
from tests.waiting import PATIENCE_SECONDS, until

TRAINED = ("expert", "gate_head", "metrics.jsonl")
RESULTS = (*TRAINED, "preview.png")


def order(run: Storage, manifest: Manifest, shard: str, config: TrainConfig = TRAIN) -> None:
    """What the controller does before it submits a job."""
    plan_islands(run, manifest, config)
    write_order(run, manifest, config, shard)


def start(run: Storage, shard: str, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The job as Ray starts it, or by another command."""
    return subprocess.Popen(
        [*within, sys.executable, "-P", "-m", "atoll.islands.job", run.uri, shard],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(run: Storage, shard: str, within: Sequence[str] = ()) -> dict[str, str]:
    """Run the job to its end; the digests of what it made."""
    assert start(run, shard, within).wait(timeout=PATIENCE_SECONDS) == 0
    return results(run, shard)


def finish_here(run: Storage, shard: str) -> dict[str, str]:
    """The same in this process, undisturbed."""
    run_island(run.uri, shard)
    return results(run, shard)


def results(run: Storage, shard: str) -> dict[str, str]:
    """The digests of what a job made, and of the states in which it left its trainings."""
    here = f"islands/{shard}"
    shown = [n.removeprefix(f"{here}/") for n in run.list(here) if "/preview" in n]
    made = {name: run.sha256(f"{here}/{name}") for name in (*TRAINED, *shown)}
    return made | state(run, here) | state(run, f"{here}/{HEAD_TRAINING}")


def state(run: Storage, folder: str) -> dict[str, str]:
    """The last commit of a training: its tensors, weights, optimiser and averages, and facts."""
    latest = Checkpoints(run, folder).latest()
    assert latest is not None
    found = {"images_seen": str(latest.images_seen), "facts": canonical_json(latest.facts).decode()}
    for name, value in latest.tensors.items():
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        form = f"{value.dtype} {tuple(value.shape)} "
        found[name] = form + hashlib.sha256(data).hexdigest()
    return {f"{folder}/{name}": value for name, value in found.items()}


def seen(run: Storage, folder: str) -> int:
    """The images that the last line of a training's metrics tells of."""
    name = f"{folder}/metrics.jsonl"
    lines = run.read_bytes(name).decode().splitlines() if run.exists(name) else []
    return int(json.loads(lines[-1])["images_seen"]) if lines else 0


def kill_when(run: Storage, shard: str, moment: Callable[[], bool]) -> None:
    """Run the job until the moment has come, and not one step longer."""
    job = start(run, shard)
    until(moment, by=job, every=0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL


def test_resume_is_bitwise_after_kill_9_at_five_random_moments(fresh) -> None:
    longer = TRAIN.model_copy(
        update={
            "training": DenoiserTraining(passes=15, checkpoints=12),
            "head": TRAIN.head.model_copy(update={"images": 4096, "checkpoints": 10}),
        }
    )
    straight, manifest = fresh("straight")
    shard = next(iter(manifest.shards))
    order(straight, manifest, shard, longer)
    expected = finish_here(straight, shard)
    for kept in ("weights", "average-0", "optimizer/step", "optimizer/exp_avg_sq"):
        assert any(name.startswith(f"islands/{shard}/{kept}/") for name in expected)
    grids = sorted(name for name in expected if name.startswith("preview-"))
    assert len(grids) == 4
    assert len({expected[name] for name in grids}) == 4
    assert expected[grids[-1]] == expected["preview.png"]

    killed, manifest = fresh("killed")
    order(killed, manifest, shard, longer)
    draw = random.Random(2026)
    imports = time.monotonic() + draw.uniform(0.1, 2)
    kill_when(killed, shard, lambda: time.monotonic() > imports)
    expert, head = f"islands/{shard}", f"islands/{shard}/gate_head_training"
    total = seen(straight, expert)
    for moment in sorted(draw.randrange(total * 9 // 10) for _ in range(3)):
        kill_when(killed, shard, lambda moment=moment: seen(killed, expert) > moment)
    moment = draw.randrange(seen(straight, head) // 2)
    kill_when(killed, shard, lambda: seen(killed, head) > moment)
    assert finish(killed, shard) == expected


def test_the_next_batch_after_a_kill_9_is_the_next_of_the_straight_run(
    fresh, tmp_path: Path
) -> None:
    config = TRAIN.model_copy(
        update={"training": DenoiserTraining(passes=6, checkpoints=9), "preview": 0}
    )
    straight, manifest = fresh("straight")
    shard = next(iter(manifest.shards))
    order(straight, manifest, shard, config)
    with noting(tmp_path / "straight.ids"):
        expected = finish_here(straight, shard)
    ids = asked(tmp_path / "straight.ids")

    run, manifest = fresh("run")
    order(run, manifest, shard, config)
    plan = manifest.shards[shard].plan
    assert plan is not None
    steps = plan.images_seen // plan.batch
    command = [sys.executable, "-m", "tests.islands.asked", run.uri, shard]
    before = tmp_path / "before.ids"
    killed = subprocess.run([*command, before, str(steps * 2 // 3)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    with noting(tmp_path / "after.ids"):
        assert finish_here(run, shard) == expected
    kept = journal(run, shard, "trained")[0]["from_images_seen"]
    assert 0 < kept <= len(asked(before)) < plan.images_seen
    assert asked(before)[:kept] + asked(tmp_path / "after.ids") == ids

    pack = Pack(run.local(f"shards/{shard}"))
    records = len(pack.train)
    for first in range(0, plan.images_seen - records + 1, records):
        epoch = [row % len(pack) for row in ids[first : first + records]]
        assert sorted(epoch) == list(pack.train)  # none missing, none twice
    assert plan.images_seen > 2 * records


def test_without_a_preview_there_is_none_and_all_else_is_the_same(fresh) -> None:
    with_one, manifest = fresh("with-one")
    shard = next(iter(manifest.shards))
    order(with_one, manifest, shard)
    expected = finish_here(with_one, shard)
    without, manifest = fresh("without")
    order(without, manifest, shard, TRAIN.model_copy(update={"preview": 0}))
    shown = {name for name in expected if name.startswith("preview")}
    assert len(shown) > 1
    assert finish_here(without, shard) == {n: v for n, v in expected.items() if n not in shown}


def test_an_island_keeps_no_larger_cache_than_it_is_told(fresh) -> None:
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(run, manifest, shard, TRAIN.model_copy(update={"cache_gib": 0.001}))
    with pytest.raises(ConfigError, match=r"cache of 0\.001 GiB.*cache_gib"):
        run_island(run.uri, shard)


@pytest.mark.parametrize("part", PARTS)
def test_a_torn_upload_is_made_again(fresh, part: str) -> None:
    """On object stores a folder is there when its marker is; what lies there before is torn."""
    local, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(local, manifest, shard)
    run = Storage(f"memory://torn-{part}")
    for name in local.list():
        run.write_bytes(name, local.read_bytes(name))
    run_island(run.uri, shard)
    whole = run.sha256(f"islands/{shard}/{part}")
    run.remove(f"islands/{shard}/{part}/{PARTS[part]}")
    assert run.exists(f"islands/{shard}/{part}")
    run_island(run.uri, shard)
    assert run.sha256(f"islands/{shard}/{part}") == whole


def test_a_far_run_is_read_in_parts_and_gives_the_same_bits(fresh, monkeypatch) -> None:
    near, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(near, manifest, shard)
    far = Storage("memory://far-run")
    for name in near.list():
        far.write_bytes(name, near.read_bytes(name))
    read: set[str] = set()
    cat_file = MemoryFileSystem.cat_file

    def noted(self: MemoryFileSystem, path: str, *range_: Any, **options: Any) -> bytes:
        read.add(path.removeprefix("/far-run/"))
        return cat_file(self, path, *range_, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    run_island(far.uri, shard)
    run_island(near.uri, shard)
    assert [far.sha256(f"islands/{shard}/{name}") for name in RESULTS] == [
        near.sha256(f"islands/{shard}/{name}") for name in RESULTS
    ]
    mine = {name for name in read if name.startswith(("shards/", "commons/"))}
    assert {name.rpartition("/")[0] for name in mine} == {f"shards/{shard}", "commons"}
    assert not any(name.endswith(".parquet") for name in mine)
    far.remove("")


def test_killed_in_the_middle_of_training_it_loses_at_most_one_interval(fresh) -> None:
    config = TRAIN.model_copy(update={"training": DenoiserTraining(passes=200, checkpoints=100)})
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(run, manifest, shard, config)
    kill_when(run, shard, lambda: len(run.list(f"islands/{shard}/commits")) >= 2)
    at_kill = json.loads(
        run.read_bytes(f"islands/{shard}/metrics.jsonl").decode().splitlines()[-1]
    )["images_seen"]
    latest = Checkpoints(run, f"islands/{shard}").latest()
    plan = manifest.shards[shard].plan
    assert latest is not None
    assert plan is not None
    # An interval, and another where the commit at its end was still on its way to the disk.
    assert at_kill - latest.images_seen <= 2 * plan.images_seen / 100 + plan.batch


def test_sigterm_commits_and_ends_as_interrupted(fresh) -> None:
    config = TRAIN.model_copy(update={"training": DenoiserTraining(passes=500, checkpoints=1)})
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(run, manifest, shard, config)
    job = start(run, shard)
    until(lambda: run.exists(f"islands/{shard}/heartbeat.json"), by=job)
    job.terminate()
    assert job.wait(timeout=PATIENCE_SECONDS) == ExitCode.INTERRUPTED
    assert run.read_json(f"islands/{shard}/exit.json")["code"] == ExitCode.INTERRUPTED
    latest = Checkpoints(run, f"islands/{shard}").latest()
    assert latest is not None
    assert latest.images_seen > 0


def test_a_changed_shard_is_refused(fresh) -> None:
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(run, manifest, shard)
    pack = run.local(f"shards/{shard}/pack-00000.safetensors")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert start(run, shard).wait(timeout=PATIENCE_SECONDS) == ExitCode.REFUSED
    assert "sha256" in run.read_json(f"islands/{shard}/exit.json")["reason"]


def test_an_order_of_another_version_is_refused(fresh) -> None:
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    order(run, manifest, shard)
    name = f"islands/{shard}/island.json"
    run.write_json(name, {**run.read_json(name), "schema_version": 99})
    with pytest.raises(Refused, match="schema version 99"):
        run_island(run.uri, shard)


def test_an_island_opens_nothing_of_another_shard(fresh, tmp_path: Path) -> None:
    run, manifest = fresh()
    shard, *others = manifest.shards
    order(run, manifest, shard)
    for other in others:
        order(run, manifest, other)
    script = tmp_path / "audited.py"
    script.write_text(
        "import sys, json\n"
        "seen = []\n"
        "def hook(event, given):\n"
        "    if event in ('open', 'os.listdir', 'os.scandir') and given:\n"
        "        seen.append(str(given[0]))\n"
        "sys.addaudithook(hook)\n"
        "from atoll.islands.island import run_island\n"
        f"run_island({run.uri!r}, {shard!r})\n"
        f"open({str(tmp_path / 'seen.json')!r}, 'w').write(json.dumps(seen))\n"
    )
    subprocess.run([sys.executable, "-P", str(script)], check=True, capture_output=True)
    inside = {
        name.removeprefix(run.uri).strip("/")
        for name in json.loads((tmp_path / "seen.json").read_text())
        if name.startswith(run.uri)
    }
    assert any(name.startswith(f"shards/{shard}") for name in inside)
    allowed = (f"shards/{shard}", "commons", "base", "trunk", f"islands/{shard}")
    stray = [name for name in inside if name and not name.startswith(allowed)]
    assert stray == []


def test_a_scoped_handle_refuses_another_shard(fresh) -> None:
    run, manifest = fresh()
    shard, other, *_ = manifest.shards
    scoped = run.scoped(read=[f"shards/{shard}", "commons"], write=[f"islands/{shard}"])
    scoped.read_bytes(f"shards/{shard}/shard.json")
    with pytest.raises(PermissionError):
        scoped.read_bytes(f"shards/{other}/shard.json")
    with pytest.raises(PermissionError):
        scoped.write_bytes(f"shards/{shard}/shard.json", b"")


@pytest.mark.parametrize(("claimed", "part"), [("", "expert"), (f"/{HEAD_TRAINING}", "gate_head")])
def test_who_is_overtaken_before_it_publishes_leaves_its_heir_s_alone(
    fresh, monkeypatch: pytest.MonkeyPatch, claimed: str, part: str
) -> None:
    run, manifest = fresh()
    shard = next(iter(manifest.shards))
    here = f"islands/{shard}"
    order(run, manifest, shard)
    write_folder = Storage.write_folder

    def late(self: Storage, name: str, save: Any, **options: Any) -> None:
        if name == f"{here}/{part}":
            Checkpoints(run, f"{here}{claimed}").claim()
            run.write_bytes(f"{name}/{PARTS[part]}", b"heir")
        write_folder(self, name, save, **options)

    monkeypatch.setattr(Storage, "write_folder", late)
    with pytest.raises(Fenced):
        run_island(run.uri, shard)
    assert run.list(f"{here}/{part}") == [f"{here}/{part}/{PARTS[part]}"]
