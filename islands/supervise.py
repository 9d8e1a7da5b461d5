"""`atoll train`: plan every shard, write it down, run the islands as Ray jobs and collect them.

The plan is in the manifest before the first job starts. A job's word is its `exit.json`; Ray's is a
hint. An island that dies is started again at the next generation and resumes; one that refuses is
not, unless another can take its shard. Only this process writes manifest and ledger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from atoll.core import recipes
from atoll.core.config import differences, remembering, saved_config
from atoll.core.denoiser import read_card
from atoll.core.errors import ConfigError, DataError, ExitCode, Refused, UsageError
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.manifest import Artefact, Expert, Manifest, Plan, check_artefact, require
from atoll.core.outage import unless_away
from atoll.core.places import check_islands
from atoll.core.storage import Storage
from atoll.islands.curves import Curves
from atoll.islands.island import PARTS, IslandOrder
from atoll.islands.queue import Queue
from atoll.islands.settings import TrainConfig, WatchConfig, plan_for
from atoll.islands.signs import exit_code, island_folder, stop_request
from atoll.islands.sites import open_sites
from atoll.islands.train_trunk import load_trunk

_NOT_TOLD = {
    "workers": 1,  # said with every submission: it is the island's
    "slots": None,
    "planned_by_all": False,
    "islands": (),
    "watch": WatchConfig(),
}


def plan_islands(run: Storage, manifest: Manifest, config: TrainConfig) -> None:
    """Fix batch and images_seen of every shard in the manifest; a plan that stands is not moved."""
    for name, plan in _plans(manifest, config).items():
        manifest.shards[name].plan = plan
    manifest.save(run)


def _plans(manifest: Manifest, config: TrainConfig) -> dict[str, Plan]:
    """Every shard's plan; `Refused` where another one stands."""
    require(manifest.base, "base", "train it with `atoll base RUN`")
    recipe, plans = recipes.recipe_of(str(manifest.recipe)), {}
    for name, shard in manifest.shards.items():
        asked = config.training.passes is not None or config.training.batch is not None
        if shard.plan is not None and not asked:
            plans[name] = shard.plan  # nothing else was asked for than what stands
            continue
        plan = plan_for(config.training, recipe, shard.records, base=False)
        if shard.plan is not None and shard.plan != plan:
            raise Refused(
                f"{name} is planned for {shard.plan.images_seen} images in batches of "
                f"{shard.plan.batch}; this command asks for {plan.images_seen} in {plan.batch}",
                cure="leave out --passes and --minutes to go on as planned, or start a new run",
            )
        plans[name] = plan
    return plans


def train(
    run: Storage,
    manifest: Manifest,
    config: TrainConfig,
    *,
    shards: Sequence[str] = (),
) -> list[str]:
    """Train the islands that are wanted and not done yet; the names of those trained now.

    To train is to withdraw earlier requests to stop. Outages of storage are ridden out. Raises
    `Interrupted` on Ctrl-C and after a request to stop, when every job has committed, and `Failed`
    when an island cannot be brought to its end; the others are finished and collected first.
    """
    if run.uri.startswith("memory:"):
        raise UsageError(
            "memory:// lives in one process and islands are processes of their own",
            allowed="a local path, or a URI of an object store",
        )
    run = run.patient()
    wanted = list(shards) or list(manifest.shards)
    for name in wanted:
        manifest.shard(name)
    check_islands(config.islands)
    base = require(manifest.base, "base", "train it with `atoll base RUN`")
    check_artefact(run, base)
    load_trunk(run, require(manifest.trunk, "trunk of its gate", "`atoll base RUN` trains it"))
    _check_path(run, base, config)
    _plans(manifest, config)
    _check_exclusive_create(run)
    todo = [name for name in wanted if name not in manifest.experts]
    _check_unchanged(run, config, done=[name for name in wanted if name not in todo], todo=todo)
    for name in todo:
        run.remove(stop_request(name))
    # Finished by an earlier command that died before it could write that down.
    for name in [name for name in todo if exit_code(run, name) is ExitCode.DONE]:
        _collect(run, manifest, name)
        todo.remove(name)
    if not todo:
        return []
    with _asked(run, manifest, config) as begun:
        plans = {name: plan.images_seen for name in todo if (plan := manifest.shards[name].plan)}
        curves = Curves(run, todo, config.watch.tracker)
        with open_sites(config, len(todo)) as sites:
            for name in todo:
                write_order(run, manifest, config, name)
            places = ", ".join(f"{site.island.name} ({site.at_once} at a time)" for site in sites)
            log.info("%d shards on %s, %d thread(s) each", len(todo), places, config.threads)
            queue = Queue(
                run, config, sites, lambda shard: _collect(run, manifest, shard), curves, begun
            )
            try:
                queue.work(plans)
            except BaseException:
                with unless_away("the end of the curves"):
                    curves.close()
                raise
            curves.close()
    return todo


@contextlib.contextmanager
def _asked(run: Storage, manifest: Manifest, config: TrainConfig) -> Iterator[Callable[[], None]]:
    """Plan and configuration, saved before the first job starts and forgotten where refused."""
    stood = {name: shard.plan for name, shard in manifest.shards.items()}

    def forget() -> None:
        for name, plan in stood.items():
            manifest.shards[name].plan = plan
        manifest.save(run)

    with remembering(config, run, "islands", forget=forget) as begun:
        plan_islands(run, manifest, config)
        yield begun


def _check_path(run: Storage, base: Artefact, config: TrainConfig) -> None:
    """The base that all experts start from decides what they predict, and on which path."""
    card = read_card(run.local(base.path))
    path = card.schedule or "our linear one"
    for key, what, decided, asked in (
        ("prediction", "prediction", card.prediction, config.training.prediction),
        ("schedule", "path", path, config.training.schedule),
    ):
        if asked not in (None, decided):
            raise ConfigError(
                f"The {what} of the base, as of its experts, is {decided}; training.{key} is "
                f"{asked}",
                cure="leave it out, or train the base of a new run with it",
            )


def _check_unchanged(
    run: Storage, config: TrainConfig, *, done: list[str], todo: list[str]
) -> None:
    """An expert that is done stays as it was trained: say so where something else is asked for."""
    earlier = saved_config(TrainConfig, run, "islands")
    if earlier is None or not done:
        return
    changed = [
        f"{part}.{line}"
        for part in ("training", "head")
        for line in differences(getattr(earlier, part), getattr(config, part))
    ]
    if changed and not todo:
        raise ConfigError(
            f"All of {', '.join(done)} are trained already, and otherwise: {'; '.join(changed)}",
            cure="leave the options out to keep them, or start a new run",
        )
    if changed:
        log.warning("%s were trained otherwise and stay: %s", ", ".join(done), "; ".join(changed))


def _check_exclusive_create(run: Storage) -> None:
    """Refuse a store whose exclusive create is not: fencing would be a pretence there."""
    name = "islands/.probe"
    run.remove(name)
    run.create(name, b"1")
    try:
        run.create(name, b"2")
    except FileExistsError:
        return
    finally:
        run.remove(name)
    raise Refused(
        f"{run.uri} lets two writers create one file",
        allowed="a file system or object store with exclusive create",
    )


def write_order(run: Storage, manifest: Manifest, config: TrainConfig, name: str) -> None:
    shard = manifest.shard(name)
    assert shard.plan is not None
    assert manifest.base is not None
    assert manifest.trunk is not None
    order = IslandOrder(
        name=name,
        shard=Artefact(path=shard.path, sha256=shard.sha256),
        commons=Artefact(path=manifest.commons.path, sha256=manifest.commons.sha256),
        base=manifest.base,
        trunk=manifest.trunk,
        vae=manifest.vae and Artefact(path=manifest.vae.path, sha256=manifest.vae.sha256),
        recipe=str(manifest.recipe),
        plan=shard.plan,
        seed=manifest.seed,
        # What islands there are, and how they are watched, is no business of one.
        config=config.model_copy(update=_NOT_TOLD),
    )
    run.write_json(f"{island_folder(name)}/island.json", order.model_dump(mode="json"))


def _collect(run: Storage, manifest: Manifest, shard: str) -> None:
    """Record what an island published: digests in the manifest, two lines in the ledger."""
    here = island_folder(shard)
    for part, marker in PARTS.items():
        if not run.exists(f"{here}/{part}/{marker}"):
            raise DataError(
                f"{shard} says it is done and {here}/{part} is not there",
                cure=f"remove {here}/exit.json and run the same command again",
            )
    expert, head = run.sha256(f"{here}/expert"), run.sha256(f"{here}/gate_head")
    card = read_card(run.local(f"{here}/expert"))
    ledger = Ledger(run)
    parents = [
        entry
        for kind, name in (("base", "base"), ("commons", "commons"), ("shard", shard))
        if (entry := ledger.latest(kind, name)) is not None
    ]
    ledger.append("expert", shard, expert, parents=parents, shards=[shard])
    trunk = ledger.latest("trunk", "trunk")
    parents += [] if trunk is None else [trunk]
    ledger.append("gate_head", shard, head, parents=parents, shards=[shard])
    manifest.experts[shard] = Expert(
        path=f"{here}/expert",
        sha256=expert,
        gate_head=Artefact(path=f"{here}/gate_head", sha256=head),
        images_seen=card.images_seen,
    )
    manifest.experts = dict(sorted(manifest.experts.items()))
    manifest.save(run)
