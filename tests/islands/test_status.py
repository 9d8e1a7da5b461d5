"""What status says of a run, from files alone: every state, speeds beside others, and cost."""

from __future__ import annotations

import json
import struct

import pytest

from atoll.core.storage import Storage
from atoll.islands.signs import ask_to_stop
from atoll.islands.status import ShardStatus, read_status
from atoll.islands.supervise import plan_islands
from tests.islands.conftest import TRAIN

NOW = 1_000_000.0


@pytest.fixture
def run(fresh):
    storage, manifest = fresh()
    plan_islands(storage, manifest, TRAIN)
    return storage, manifest


def beat(run: Storage, shard: str, *, speed: float, ago: float, process_ago: float = 1) -> None:
    here = f"islands/{shard}"
    line = {"images_seen": 16, "images_per_second": speed, "unix_seconds": NOW - ago}
    run.write_json(f"{here}/heartbeat.json", line)
    sign = {"name": "expert", "submission_id": "1", "unix_seconds": NOW - process_ago}
    run.write_json(f"{here}/process-heartbeat.json", sign)


def controller(run: Storage, shard: str, *lines: dict[str, object]) -> None:
    for line in lines:
        run.append_line(f"islands/{shard}/controller-journal.jsonl", json.dumps(line))


def submitted(ago: float, identity: str = "1", price: float | None = None) -> dict[str, object]:
    return {
        "event": "submitted", "submission_id": identity, "island": "a", "price": price,
        "unix_seconds": NOW - ago,
    }  # fmt: skip


def ended(ago: float, identity: str = "1", **more: object) -> dict[str, object]:
    return {"event": "ended", "submission_id": identity, "unix_seconds": NOW - ago, **more}


def row(run, shard: str = "shard-00") -> ShardStatus:
    storage, manifest = run
    return next(r for r in read_status(storage, manifest, now=NOW).shards if r.shard == shard)


def test_from_planned_to_done(run) -> None:
    storage, manifest = run
    assert row(run).state == "planned"
    controller(storage, "shard-00", submitted(100))
    assert (row(run).state, row(run).island) == ("planned", "a")  # in its island's queue
    beat(storage, "shard-00", speed=8, ago=1)
    now = row(run)
    assert (now.state, now.stage, now.images_seen) == ("running", "expert", 16)
    assert now.of is not None
    assert now.eta_seconds == pytest.approx((now.of - 16) / 8, abs=0.1)
    beat(storage, "shard-00", speed=8, ago=61, process_ago=61)
    assert (row(run).state, row(run).silent_seconds) == ("dead", 61.0)
    storage.write_json(
        "islands/shard-00/exit.json", {"submission_id": "1", "code": 7, "reason": "a changed shard"}
    )
    assert (row(run).state, row(run).reason) == ("failed", "a changed shard")
    storage.write_json(
        "islands/shard-00/exit.json", {"submission_id": "1", "code": 6, "reason": "Stopped"}
    )
    assert row(run).state == "stopped"
    storage.write_json(
        "islands/shard-00/exit.json", {"submission_id": "1", "code": 0, "reason": ""}
    )
    assert row(run).state == "done"
    assert not read_status(storage, manifest, now=NOW).ended


def test_one_that_waits_for_an_island_is_planned_until_none_is_left(run) -> None:
    storage, _ = run
    refused = ended(40, code=7, reason="made otherwise")
    waiting = {"event": "waiting", "submission_id": "1", "reason": "cannot go on on island a"}
    controller(storage, "shard-00", submitted(50), refused, waiting)
    beat(storage, "shard-00", speed=8, ago=45, process_ago=45)
    storage.write_json(
        "islands/shard-00/exit.json", {"submission_id": "1", "code": 7, "reason": "made otherwise"}
    )
    assert (row(run).state, row(run).reason) == ("planned", "cannot go on on island a")
    ask_to_stop(storage, "shard-00")
    assert row(run).state == "stopped"
    storage.remove("islands/shard-00/stop.json")
    controller(storage, "shard-00", {**waiting, "event": "given_up", "reason": "no island is left"})
    assert (row(run).state, row(run).reason) == ("failed", "no island is left")


def test_one_that_its_island_has_not_begun_says_why_until_it_runs(run) -> None:
    storage, _ = run
    pending = {"event": "pending", "submission_id": "1", "reason": "is not begun on island a"}
    controller(storage, "shard-00", submitted(400), pending)
    assert (row(run).state, row(run).reason) == ("planned", "is not begun on island a")
    beat(storage, "shard-00", speed=8, ago=1)
    assert (row(run).state, row(run).reason) == ("running", None)


def test_a_killed_one_is_dead_until_it_is_started_again(run) -> None:
    storage, _ = run
    controller(storage, "shard-00", submitted(50), ended(40, reason="its process died"))
    beat(storage, "shard-00", speed=8, ago=45, process_ago=45)
    assert (row(run).state, row(run).reason) == ("dead", "its process died")
    controller(storage, "shard-00", submitted(30, "2"))
    assert row(run).state == "planned"
    ask_to_stop(storage, "shard-00")
    assert row(run).state == "stopped"


def test_a_last_word_counts_for_the_attempt_that_spoke_it(run) -> None:
    storage, _ = run
    frozen = "no sign of life from island a for 17 s"
    controller(storage, "shard-00", submitted(50), ended(30, code=None, reason=frozen))
    beat(storage, "shard-00", speed=8, ago=47, process_ago=20)
    # It woke up, was stopped and said so; to be started again it is all the same.
    storage.write_json(
        "islands/shard-00/exit.json", {"submission_id": "1", "code": 6, "reason": "Stopped"}
    )
    assert (row(run).state, row(run).reason) == ("dead", frozen)
    controller(storage, "shard-00", submitted(10, "2"))
    assert row(run).state == "planned"
    sign = {"name": "expert", "submission_id": "2", "unix_seconds": NOW - 1}
    storage.write_json("islands/shard-00/process-heartbeat.json", sign)
    assert row(run).state == "running"  # whatever the one before it said
    storage.write_json("islands/shard-00/exit.json", {"submission_id": "2", "code": 6})
    controller(storage, "shard-00", ended(5, "2", code=6, reason="Stopped"))
    assert row(run).state == "stopped"


def test_speeds_are_compared_with_what_is_at_work_or_done(run) -> None:
    storage, _ = run
    for shard, speed in (("shard-00", 600.0), ("shard-01", 80.0), ("shard-02", 500.0)):
        beat(storage, shard, speed=speed, ago=1)
    controller(storage, "shard-01", submitted(50), ended(30, code=None, reason="its process died"))
    assert row(run).percent == 120.0
    controller(storage, "shard-02", submitted(50), ended(30, code=7, reason="a changed shard"))
    storage.write_json(
        "islands/shard-02/exit.json", {"submission_id": "1", "code": 7, "reason": "a changed shard"}
    )
    assert row(run).percent is None


def test_stragglers_are_slow_beside_the_others_or_stand_still(run) -> None:
    storage, _ = run
    for shard, speed in (("shard-00", 49.0), ("shard-01", 100.0), ("shard-02", 96.0)):
        beat(storage, shard, speed=speed, ago=1)
    slow, fast = row(run), row(run, "shard-01")
    assert (slow.state, slow.percent) == ("running", 50.0)
    assert (fast.state, fast.percent) == ("running", 137.9)
    beat(storage, "shard-00", speed=48.0, ago=1)
    assert row(run).state == "straggler"
    beat(storage, "shard-01", speed=100.0, ago=90)  # its process lives and nothing moves
    assert row(run, "shard-01").state == "straggler"


def test_mfu_is_the_useful_share_of_the_measured_rate(run) -> None:
    storage, _ = run
    beat(storage, "shard-00", speed=50, ago=1)
    assert row(run).mfu is None  # by a version that did not measure
    line = storage.read_json("islands/shard-00/heartbeat.json")
    line |= {"flops_per_image": 3 * 2e8, "matmul_flops_per_second": 1e11}
    storage.write_json("islands/shard-00/heartbeat.json", line)
    assert row(run).mfu == pytest.approx(3 * 2e8 * 50 / 1e11)


def test_cost_is_price_times_hours_of_every_attempt(run) -> None:
    storage, manifest = run
    controller(storage, "shard-00", submitted(7200, price=2.0), ended(3600))
    assert row(run).cost == pytest.approx(2.0)
    controller(storage, "shard-00", submitted(1800, "2", price=4.0))
    beat(storage, "shard-00", speed=8, ago=1)
    storage.write_json(
        "islands/shard-00/process-heartbeat.json",
        {"name": "expert", "submission_id": "2", "unix_seconds": NOW - 1},
    )
    assert row(run).cost == pytest.approx(2.0 + 2.0)
    # Its controller was killed: no longer than it gave signs of life.
    for name, key in (("process-heartbeat.json", "2"), ("heartbeat.json", "")):
        place = f"islands/shard-00/{name}"
        line = {"name": "expert", "submission_id": key, "unix_seconds": NOW - 900}
        storage.write_json(place, line)
    assert row(run).state == "dead"
    assert row(run).cost == pytest.approx(2.0 + 1.0)
    controller(storage, "shard-01", submitted(3600))
    assert row(run, "shard-01").cost is None
    assert read_status(storage, manifest, now=NOW).cost == pytest.approx(3.0)


def test_torn_and_foreign_files_are_passed_over(run) -> None:
    storage, _ = run
    storage.write_bytes("islands/shard-00/heartbeat.json", b'{"images_')
    storage.write_bytes("islands/shard-00/process-heartbeat.json", b"[1]")
    storage.write_bytes("islands/shard-00/metrics.jsonl", b'{"loss": 1.5, "images_seen": 8}\n{"lo')
    storage.write_bytes("islands/shard-00/controller-journal.jsonl", b'7\n{"event"\n')
    assert (row(run).state, row(run).loss) == ("planned", 1.5)


def test_curves_are_tensorboard_s(run) -> None:
    from atoll.islands.curves import EVENTS, Curves, _masked

    storage, _ = run
    lines = [
        {"images_seen": 8 * n, "loss": 1 / n, "gradient_norm": 2.0 * n, "error_by_t": [None, 3 / n]}
        for n in (1, 2, 300)
    ]
    for line in lines:
        storage.append_line("islands/shard-00/metrics.jsonl", json.dumps(line))
    curves = Curves(storage, ["shard-00"])
    curves.update()
    written = storage.read_bytes(f"islands/shard-00/{EVENTS}")
    assert written[:8] == struct.pack("<Q", 15)  # a record's length, then its checksum
    assert written[12:27] == b"\x1a\x0dbrain.Event:2"
    crc = 0xE3069283  # CRC-32C's check value, of "123456789"
    rotated = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
    assert _masked(b"123456789") == struct.pack("<I", rotated)
    storage.append_line(
        "islands/shard-00/gate_head_training/metrics.jsonl", '{"images_seen": 4, "loss": 0.5}'
    )
    curves.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(storage.local("islands/shard-00/tensorboard")))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {
        "expert/loss", "expert/gradient_norm", "expert/error_by_t/1", "gate_head/loss",
    }  # fmt: skip
    said = [(event.step, event.value) for event in found.Scalars("expert/loss")]
    assert said == [(n["images_seen"], pytest.approx(n["loss"])) for n in lines]


def test_a_tracker_is_told_when_it_is_asked_for_and_no_training_ends_with_it(
    run, monkeypatch
) -> None:
    import sys
    import types

    from atoll.core.errors import MissingError
    from atoll.islands.curves import Curves

    storage, _ = run
    storage.append_line("islands/shard-00/metrics.jsonl", '{"images_seen": 8, "loss": 0.5}')
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingError, match="pip install trackio"):
        Curves(storage, ["shard-00"], "trackio")

    told: list[object] = []
    one = types.SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    stub = types.SimpleNamespace(init=lambda **given: told.append(given) or one)
    monkeypatch.setitem(sys.modules, "trackio", stub)
    curves = Curves(storage, ["shard-00", "shard-01"], "trackio")
    curves.close()
    assert told == [
        {"project": "atoll", "name": "shard-00"}, {"expert/loss": 0.5, "images_seen": 8},
        "finished",
    ]  # fmt: skip

    def fails(**_given: object) -> object:
        raise RuntimeError("no network")

    stub.init = fails
    Curves(storage, ["shard-00"], "trackio").close()
