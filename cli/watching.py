"""`atoll status`, `logs`, `stop` and `resume`: what can be done beside a `train` at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.output import Result, RunArgument, aligned, command
from atoll.cli.training import InexactOption

if TYPE_CHECKING:
    from atoll.core.manifest import Manifest
    from atoll.core.storage import Storage
    from atoll.islands.status import RunStatus, ShardStatus

ShardArgument = Annotated[
    str | None, typer.Argument(metavar="[SHARD]", help="Only this one; without it, all.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @command(app, "status", example="atoll status out/run --watch")
    def status(
        run: RunArgument,
        watch: Annotated[
            bool, typer.Option("--watch", help="Look again and again, until all have ended.")
        ] = False,
        every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    ) -> Result | Iterator[Result]:
        """How every shard stands, from storage alone."""
        storage, manifest = opened(run)
        return _looks(run, storage.patient(), every) if watch else _look(run, storage, manifest)

    @command(app, "logs", example="atoll logs out/run shard-00")
    def logs(
        run: RunArgument,
        shard: Annotated[str, typer.Argument(metavar="SHARD", help="The shard.")],
        lines: Annotated[int, typer.Option(min=1, help="At most so many, the last ones.")] = 200,
    ) -> Result:
        """What a shard's jobs said, as far as it has been copied into storage."""
        from atoll.islands.signs import log_journal

        storage, manifest = opened(run)
        manifest.shard(shard)
        found = storage.read_lines(log_journal(shard))[-lines:]
        text = "\n".join(str(line.get("line", "")) for line in found)
        return {"run": run, "shard": shard, "lines": found, "text": text or "nothing yet"}

    @command(app, "stop", example="atoll stop out/run shard-00")
    def stop(run: RunArgument, shard: ShardArgument = None) -> Result:
        """Ask islands to commit and leave; `atoll resume` goes on."""
        from atoll.islands.signs import ask_to_stop

        storage, manifest = opened(run)
        asked = [name for name in wanted(manifest, shard) if name not in manifest.experts]
        for name in asked:
            ask_to_stop(storage, name)
        said = f"asked to stop: {', '.join(asked)}; `atoll status {run}` shows when they have left"
        return {"run": run, "asked": asked, "text": said if asked else "all are done already"}

    @command(app, "resume", example="atoll resume out/run")
    def resume(
        run: RunArgument, shard: ShardArgument = None, allow_inexact_resume: InexactOption = False
    ) -> Result:
        """Withdraw what `stop` asked for, and go on as `train` was told."""
        from atoll.cli.training import trained_now
        from atoll.cli.working import working_on
        from atoll.core.config import saved_config
        from atoll.core.errors import UsageError
        from atoll.core.lock import InUse
        from atoll.islands import supervise
        from atoll.islands.settings import TrainConfig
        from atoll.islands.signs import island_folder, stop_request

        storage, manifest = opened(run)
        settings = saved_config(TrainConfig, storage, "islands")
        if settings is None:
            raise UsageError(
                f"Nothing was ever trained in {run}", cure=f"begin with `atoll train {run}`"
            )
        told = [
            name
            for name in wanted(manifest, shard)
            if shard is not None or storage.exists(f"{island_folder(name)}/island.json")
        ]
        # Asked for anew every time: what one command allowed is not allowed for ever.
        settings = settings.model_copy(update={"bitwise_resume": not allow_inexact_resume})
        if not allow_inexact_resume:
            for name in told:
                storage.remove(stop_request(name))
        try:
            with working_on(run) as (storage, manifest):
                return trained_now(
                    run, manifest, supervise.train(storage, manifest, settings, shards=told)
                )
        except InUse:  # a `train` is at work: it looks for these requests and goes on by itself
            if allow_inexact_resume:
                raise  # and was told otherwise
            said = f"{', '.join(told)}: taken up by the command that is at work on {run}"
            return {"run": run, "trained": [], "experts": {}, "text": said}


def opened(run: str) -> tuple[Storage, Manifest]:
    """A run beside whatever is at work on it, after any removal."""
    from atoll.cli.working import check_no_removal
    from atoll.core.manifest import Manifest
    from atoll.core.storage import Storage

    storage = Storage(run)
    manifest = Manifest.load(storage)
    check_no_removal(storage)
    return storage, manifest


def wanted(manifest: Manifest, shard: str | None) -> list[str]:
    """One shard, checked, or all of them."""
    if shard is None:
        return list(manifest.shards)
    manifest.shard(shard)
    return [shard]


def _look(run: str, storage: Storage, manifest: Manifest) -> Result:
    from atoll.islands.status import read_status

    seen = read_status(storage, manifest)
    return {
        "run": run,
        "unix_seconds": round(seen.unix_seconds, 3),
        "ended": seen.ended,
        "cost": seen.cost,
        "shards": [row.as_dict() for row in seen.shards],
        "text": table(seen),
    }


def _looks(run: str, storage: Storage, every: float) -> Iterator[Result]:
    from atoll.core.manifest import Manifest

    while True:
        look = _look(run, storage, Manifest.load(storage))
        yield look
        if look["ended"]:
            return
        time.sleep(every)


_COLUMNS = (
    "shard",
    "state",
    "island",
    "gen",
    "images",
    "img/s",
    "%",
    "mfu",
    "loss",
    "left",
    "commit",
    "cost",
)


def table(seen: RunStatus) -> str:
    """Aligned columns, a row per shard; what is wrong with one stands below."""
    lines = aligned([_COLUMNS, *(_cells(row) for row in seen.shards)])
    for row in seen.shards:
        if row.state == "dead" and not row.reason:
            lines.append(f"{row.shard}: no sign of life for {_duration(row.silent_seconds)}")
        elif row.reason:
            lines.append(f"{row.shard}: {row.reason}")
    if seen.cost is not None:
        lines.append(f"cost so far: {seen.cost:.2f}")
    return "\n".join(lines)


def _cells(row: ShardStatus) -> tuple[str, ...]:
    def said(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    state = f"{row.state} ({row.stage})" if row.stage not in (None, "expert") else row.state
    images = str(row.images_seen) if row.of is None else f"{row.images_seen}/{row.of}"
    return (
        row.shard, state, row.island or "-", str(row.generation), images,
        said(row.images_per_second, ".1f"), said(row.percent, ".0f"), said(row.mfu, ".0%"),
        said(row.loss, ".4f"),
        _duration(row.eta_seconds), said(row.committed_images_seen, "d"), said(row.cost, ".2f"),
    )  # fmt: skip


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
