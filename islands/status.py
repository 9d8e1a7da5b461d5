"""`atoll status`: how every shard stands, read from storage alone, beside whatever is at work.

    planned    waits for its turn here or in its island's queue, or for an island that can take it,
               or was never started
    running    a job gives signs of life
    straggler  runs at less than half the median speed of the other shards, or has not moved while
               its process lives, for a minute
    dead       not ended, and no sign of life for a minute: killed, cut off or stopped in its
               tracks; a controller that is at work starts it again elsewhere
    stopped    ended as asked, or interrupted; `atoll resume` goes on
    failed     ended with an error
    done       expert and gate head are there

Signs of life are written by an island's clock and read by ours: clocks that are a minute apart make
a living island look dead here. The controller does not use them so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from atoll.core.checkpoint import newest_commit, newest_generation
from atoll.core.errors import ExitCode
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands.signs import (
    HEAD_TRAINING,
    controller_journal,
    island_folder,
    process_heartbeat,
    read_object,
    stop_request,
)

DEAD_SECONDS = 60.0
STRAGGLER_SHARE = 0.5
ENDED = ("done", "failed", "stopped")
_COMPARABLE = ("running", "straggler", "done")  # the others' speed is of no whole training
_STAGES = {"expert": "", "gate_head": f"/{HEAD_TRAINING}"}


@dataclass(frozen=True)
class ShardStatus:
    """One row. Speeds are images per second; `percent` is of the median of the other shards."""

    shard: str
    state: str
    stage: str | None  # what its process works on: expert, gate_head, preview
    island: str | None
    labels: dict[str, str]
    generation: int
    images_seen: int
    of: int | None
    images_per_second: float | None
    percent: float | None
    mfu: float | None  # share of the device's measured matrix products that is useful training
    loss: float | None
    eta_seconds: float | None  # of the expert; its gate head comes on top
    committed_images_seen: int | None
    silent_seconds: float | None  # since the last sign of life
    cost: float | None  # price times hours since each attempt was submitted
    reason: str | None  # of a failure

    def as_dict(self) -> dict[str, Any]:
        """The row of the `--json` object."""
        return dict(vars(self))


@dataclass(frozen=True)
class RunStatus:
    """All rows of one look, which took place at `unix_seconds`."""

    unix_seconds: float
    shards: list[ShardStatus]

    @property
    def ended(self) -> bool:
        """Whether nothing more is going to happen by itself."""
        return all(row.state in ENDED for row in self.shards)

    @property
    def cost(self) -> float | None:
        known = [row.cost for row in self.shards if row.cost is not None]
        return round(sum(known), 4) if known else None


def read_status(run: Storage, manifest: Manifest, *, now: float | None = None) -> RunStatus:
    """Look once. Nothing is written, no lock is taken, and no island is asked."""
    moment = time.time() if now is None else now
    rows = [_read_shard(run, manifest, shard, moment) for shard in manifest.shards]
    return RunStatus(moment, [_compared(row, rows) for row in rows])


def _read_shard(run: Storage, manifest: Manifest, shard: str, now: float) -> ShardStatus:
    here = island_folder(shard)
    process = read_object(run, process_heartbeat(shard))
    beat = read_object(run, f"{here}/heartbeat.json")
    head_beat = read_object(run, f"{here}/{HEAD_TRAINING}/heartbeat.json")
    ended = read_object(run, f"{here}/exit.json")
    attempts = run.read_lines(controller_journal(shard))
    submitted = [line for line in attempts if line.get("event") == "submitted"]
    latest = submitted[-1] if submitted else {}
    times = [_number(each.get("unix_seconds")) for each in (process, beat, head_beat, latest)]
    known = [value for value in times if value is not None]
    silent = round(max(0.0, now - max(known)), 1) if known else None
    state, reason = _state(run, manifest, shard, ended, attempts, process, silent)

    plan = manifest.shards[shard].plan
    of = plan.images_seen if plan is not None else None
    seen = of if state == "done" and of is not None else int(_number(beat.get("images_seen")) or 0)
    stage = str(process.get("name")) if process and state not in (*ENDED, "planned") else None
    speed = _speed(run, here, beat, done=seen == of)
    moved = _number((head_beat if stage == "gate_head" else beat).get("unix_seconds"))
    stuck = stage in _STAGES and moved is not None and now - moved > DEAD_SECONDS
    if state == "running" and stuck:
        state = "straggler"
    eta = None
    if state in ("running", "straggler") and of is not None and speed:
        eta = round((of - seen) / speed, 1)
    metrics = run.read_lines(f"{here}/metrics.jsonl")
    return ShardStatus(
        shard=shard,
        state=state,
        stage=stage,
        island=latest.get("island"),
        labels=dict(latest.get("labels") or {}),
        generation=newest_generation(run, here),
        images_seen=seen,
        of=of,
        images_per_second=speed,
        percent=None,
        mfu=_mfu(beat, speed),
        loss=_number(metrics[-1].get("loss")) if metrics else None,
        eta_seconds=eta,
        committed_images_seen=newest_commit(run, here),
        silent_seconds=None if state in (*ENDED, "planned") else silent,
        cost=_cost(attempts, process, max(known, default=now), living=state == "running", now=now),
        reason=reason,
    )


def _state(
    run: Storage,
    manifest: Manifest,
    shard: str,
    ended: dict[str, Any],
    attempts: Sequence[dict[str, Any]],
    process: dict[str, Any],
    silent: float | None,
) -> tuple[str, str | None]:
    if shard in manifest.experts or ended.get("code") == ExitCode.DONE:
        return "done", None
    asked = run.exists(stop_request(shard))
    last = attempts[-1] if attempts else {}
    if last.get("event") == "waiting":
        return ("stopped" if asked else "planned"), str(last.get("reason") or "")
    if last.get("event") == "given_up":
        return "failed", str(last.get("reason") or "")
    if ended and _is_last_word(ended, last):
        if ended.get("code") == ExitCode.INTERRUPTED:
            return "stopped", None
        return "failed", str(ended.get("reason") or "")
    if last.get("event") == "ended":
        if asked or last.get("reason") == "interrupted":
            return "stopped", None
        # It left no word: its controller saw it die, and starts it again if it is at work.
        return "dead", str(last.get("reason") or "")
    began = last.get("submission_id") == process.get("submission_id")
    if silent is None or (last and not began):
        why = str(last.get("reason") or "") if last.get("event") == "pending" else None
        return ("stopped" if asked else "planned"), why
    return ("running" if silent <= DEAD_SECONDS else "dead"), None


def _is_last_word(ended: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether it is of the latest attempt, and not of one that was taken for dead and woke up."""
    if last and ended.get("submission_id") != last.get("submission_id"):
        return False
    return last.get("event") != "ended" or last.get("code") == ended.get("code")


def _speed(run: Storage, here: str, beat: dict[str, Any], *, done: bool) -> float | None:
    """Of the training that goes on, or of the last one that ended."""
    if done:
        lines = run.read_lines(f"{here}/journal.jsonl")
        trained = [
            ln for ln in lines if ln.get("event") == "trained" and ln.get("images_per_second")
        ]
        if trained:
            return _number(trained[-1]["images_per_second"])
    return _number(beat.get("images_per_second")) or None


def _mfu(beat: dict[str, Any], speed: float | None) -> float | None:
    """Operations that training needs, over those that its device does in matrix products."""
    flops = _number(beat.get("flops_per_image"))
    rate = _number(beat.get("matmul_flops_per_second"))
    return round(flops * speed / rate, 4) if flops and rate and speed else None


def _compared(row: ShardStatus, rows: list[ShardStatus]) -> ShardStatus:
    """The row beside the others: its share of their median speed, and whether it is too little."""
    others = [
        other.images_per_second
        for other in rows
        if other.shard != row.shard and other.images_per_second and other.state in _COMPARABLE
    ]
    if row.images_per_second is None or not others:
        return row
    share = row.images_per_second / statistics.median(others)
    slow = row.state == "running" and row.stage == "expert" and share < STRAGGLER_SHARE
    return replace(row, percent=round(100 * share, 1), state="straggler" if slow else row.state)


def _cost(
    attempts: Sequence[dict[str, Any]],
    process: dict[str, Any],
    last_sign: float,
    *,
    living: bool,
    now: float,
) -> float | None:
    """Price times hours, over all attempts, by the controller's clock.

    An attempt whose end nobody wrote down, because the controller was killed, ends with its last
    sign of life, or where the next one begins.
    """
    total, priced = 0.0, False
    begun = [n for n, line in enumerate(attempts) if line.get("event") == "submitted"]
    for n in begun:
        line = attempts[n]
        price, start = _number(line.get("price")), _number(line.get("unix_seconds"))
        if price is None or start is None:
            continue
        priced = True
        identity = line.get("submission_id")
        ends = [
            _number(other.get("unix_seconds"))
            for other in attempts
            if other.get("event") == "ended" and other.get("submission_id") == identity
        ]
        if ends and ends[0] is not None:
            end = ends[0]
        elif n == begun[-1]:
            end = now if living else last_sign
        else:
            later = _number(attempts[n + 1].get("unix_seconds"))
            sign = process if process.get("submission_id") == identity else {}
            end = _number(sign.get("unix_seconds")) or later or start
        total += price * max(0.0, end - start) / 3600
    return round(total, 6) if priced else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
