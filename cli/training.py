"""`atoll base`, `atoll train` and `atoll assemble`: shards become experts, experts an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from atoll.cli.output import ConfigOption, Result, RunArgument, SetOption, command

if TYPE_CHECKING:
    from atoll.core.manifest import Manifest
    from atoll.core.storage import Storage
    from atoll.islands.settings import BaseConfig, TrainConfig

    C = TypeVar("C", BaseConfig, TrainConfig)

MinutesOption = Annotated[
    float | None,
    typer.Option(min=0.01, help="Turned into images_seen once, by a short probe."),
]
InexactOption = Annotated[
    bool,
    typer.Option(
        "--allow-inexact-resume",
        help="Go on where hardware, threads or versions are others; journalled as not bitwise.",
    ),
]
PassesOption = Annotated[
    float | None, typer.Option(min=0, help="images_seen as a multiple of the records.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @command(app, "base", example="atoll base out/run --minutes 5")
    def base(
        run: RunArgument,
        recipe: Annotated[str | None, typer.Option(help="A named size of a family.")] = None,
        start: Annotated[
            str | None,
            typer.Option(
                help="Weights to start from: a folder of ours or of diffusers, a pipeline's "
                "folder, or hf-hub:ORG/NAME."
            ),
        ] = None,
        minutes: MinutesOption = None,
        passes: PassesOption = None,
        allow_inexact_resume: InexactOption = False,
        set_: SetOption = None,
        config: ConfigOption = None,
    ) -> Result:
        """Train the common start of all experts on the commons."""
        from atoll.cli.resolve import resolve
        from atoll.cli.working import working_on
        from atoll.core.config import saved_config
        from atoll.islands.base import WORK, train_base
        from atoll.islands.settings import BaseConfig

        _check_one_length(minutes, passes)
        with working_on(run) as (storage, manifest):
            earlier = saved_config(BaseConfig, storage, WORK)
            settings = resolve(
                BaseConfig, config, set_, earlier=earlier, recipe=recipe, start=start,
                training__passes=passes, bitwise_resume=not allow_inexact_resume,
            )  # fmt: skip
            if minutes is not None:
                settings = base_within(storage, manifest, settings, minutes)
            made = train_base(storage, manifest, settings)
        return {"run": run, "base": made.path, "sha256": made.sha256, "recipe": manifest.recipe}

    @command(app, "train", example="atoll train out/run --minutes 15")
    def train(
        run: RunArgument,
        shard: Annotated[
            list[str] | None, typer.Option(help="Only this shard; repeatable.")
        ] = None,
        recipe: Annotated[
            str | None, typer.Option(help="The base's recipe, to be sure of it.")
        ] = None,
        minutes: MinutesOption = None,
        passes: PassesOption = None,
        islands: Annotated[
            str | None,
            typer.Option(metavar="FILE", help="The islands to train on, as docs/islands.yaml."),
        ] = None,
        address: Annotated[
            str | None,
            typer.Option(
                help="Instead, the Jobs API of one Ray cluster; its token comes from "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Without either a local head is started."
            ),
        ] = None,
        allow_inexact_resume: InexactOption = False,
        set_: SetOption = None,
        config: ConfigOption = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Plan, and start nothing.")
        ] = False,
    ) -> Result:
        """Train one expert and one gate head per shard, each an isolated Ray job."""
        from atoll.cli.resolve import resolve
        from atoll.cli.working import working_on
        from atoll.core.config import saved_config
        from atoll.core.errors import ConfigError
        from atoll.core.manifest import check_artefact, require
        from atoll.core.recipes import recipe_of
        from atoll.islands import supervise
        from atoll.islands.settings import TrainConfig, plan_for

        _check_one_length(minutes, passes)
        with working_on(run) as (storage, manifest):
            earlier = saved_config(TrainConfig, storage, "islands")
            settings = resolve(
                TrainConfig, config, set_, earlier=earlier, training__passes=passes,
                bitwise_resume=not allow_inexact_resume,
                islands=islands_told(islands, address, manifest),
            )  # fmt: skip
            # Before the plan is written, which would move a manifest that is then refused.
            check_artefact(storage, require(manifest.base, "base", f"train it: `atoll base {run}`"))
            if recipe is not None and recipe_of(recipe) and recipe != manifest.recipe:
                raise ConfigError(
                    f"The experts start from the base, whose recipe is {manifest.recipe}",
                    cure="leave out --recipe, or start a new run with `atoll base --recipe`",
                )
            wanted = {name: manifest.shard(name) for name in shard or manifest.shards}
            if minutes is not None:
                settings = experts_within(storage, manifest, settings, minutes)
            if dry_run:
                chosen = recipe_of(str(manifest.recipe))
                planned = {
                    name: plan_for(settings.training, chosen, entry.records, base=False)
                    for name, entry in wanted.items()
                }
                plans = {name: plan.model_dump() for name, plan in planned.items()}
                return {"run": run, "plan": plans}
            trained = supervise.train(storage, manifest, settings, shards=shard or ())
        return trained_now(run, manifest, trained)

    @command(app, "assemble", example="atoll assemble out/run")
    def assemble(
        run: RunArgument,
        out: Annotated[
            str | None, typer.Argument(metavar="[OUT]", help="Also write a copy here, an export.")
        ] = None,
        gate: Annotated[
            Literal["per-shard", "joint"],
            typer.Option(help="The islands' own heads, or one classifier of all shards' records."),
        ] = "per-shard",
        with_base: Annotated[
            bool,
            typer.Option(
                "--with-base", help="The base as one expert more, for what no shard has seen."
            ),
        ] = False,
    ) -> Result:
        """Experts and a gate become an ensemble folder that diffusers loads."""
        from atoll.cli.working import working_on
        from atoll.core.config import saved_config
        from atoll.islands.base import WORK
        from atoll.islands.settings import BaseConfig
        from atoll.islands.train_joint import train_joint
        from atoll.router.assemble import assemble as do_assemble

        with working_on(run) as (storage, manifest):
            # What is refused below is not trained for first.
            if gate == "joint" and manifest.experts and not with_base:
                config = saved_config(BaseConfig, storage, WORK) or BaseConfig()
                train_joint(storage, manifest, config)
            made = do_assemble(storage, manifest, out, gate=gate, with_base=with_base)
        missing = [name for name in manifest.shards if name not in manifest.experts]
        return {"run": run, "ensemble": made.path, "sha256": made.sha256, "missing": missing}


def islands_told(
    file: str | None, address: str | None, manifest: Manifest
) -> list[dict[str, Any]] | None:
    """The islands that options name; None where they name none."""
    from atoll.core.errors import UsageError
    from atoll.core.places import Island, check_islands, read_islands

    if file is not None and address is not None:
        raise UsageError(
            "--islands and --address are two ways to say where", allowed="one of the two"
        )
    if file is not None:
        told = read_islands(file)
    elif address is not None:
        told = (Island(name="cluster", address=address),)
    else:
        return None
    check_islands(told, manifest.shards)
    for island in told:
        if island.address is not None:
            island.token()  # what is missing is known before anything is saved or started
    return [island.model_dump(mode="json") for island in told]


def trained_now(run: str, manifest: Manifest, trained: list[str]) -> Result:
    """What `train` and `resume` say."""
    return {
        "run": run,
        "trained": trained,
        "experts": {name: expert.sha256 for name, expert in manifest.experts.items()},
        "text": f"{len(trained)} islands trained now, {len(manifest.experts)} of "
        f"{len(manifest.shards)} experts are there",
    }


def base_within(run: Storage, manifest: Manifest, config: BaseConfig, minutes: float) -> BaseConfig:
    """The configuration whose passes fill the minutes on this machine; asked until it has begun."""
    from atoll.core import recipes
    from atoll.core.cache import BlockCache
    from atoll.core.config import saved_config
    from atoll.core.pack import open_pack
    from atoll.islands.base import WORK, new_base
    from atoll.islands.probe import images_per_second, passes_in
    from atoll.islands.settings import BaseConfig

    if (earlier := saved_config(BaseConfig, run, WORK)) is not None:
        _check_by_minutes(earlier.training.passes)
        return _with_passes(config, earlier.training.passes)
    commons = open_pack(run, manifest.commons, BlockCache(config.cache_gib))
    base = new_base(manifest, commons, config)
    batch = config.training.batch or recipes.recipe_of(base.recipe).batch
    speed = images_per_second(
        base.denoiser, commons, config.training,
        batch=batch, threads=config.threads, device=config.device,
    )  # fmt: skip
    passes = passes_in(minutes, speed=speed, islands_at_once=1, records=commons.card.records)
    return _with_passes(config, passes)


def experts_within(
    run: Storage, manifest: Manifest, config: TrainConfig, minutes: float
) -> TrainConfig:
    """Likewise for all islands together.

    The probe sees the commons alone. Where the commons is a fraction F of the corpus, so is the
    number of private records that the minutes are divided by: n (1 - F) / F, and no shard has had a
    say. Else they are counted, and the configuration says so.
    """
    from atoll.core import recipes
    from atoll.core.cache import BlockCache
    from atoll.core.config import saved_config
    from atoll.core.denoiser import Denoiser
    from atoll.core.journal import log
    from atoll.core.manifest import require
    from atoll.core.pack import open_pack
    from atoll.islands.probe import images_per_second, passes_in
    from atoll.islands.settings import TrainConfig
    from atoll.islands.sites import slots_here

    if (earlier := saved_config(TrainConfig, run, "islands")) is not None:
        _check_by_minutes(earlier.training.passes)
        config = config.model_copy(update={"planned_by_all": earlier.planned_by_all})
        return _with_passes(config, earlier.training.passes)
    base = require(manifest.base, "base", "train it with `atoll base RUN`")
    recipe = recipes.recipe_of(str(manifest.recipe))
    commons = open_pack(run, manifest.commons, BlockCache(config.cache_gib))
    speed = images_per_second(
        Denoiser.load(run.local(base.path)), commons, config.training,
        batch=config.training.batch or recipe.batch, threads=config.threads, device=config.device,
    )  # fmt: skip
    try:
        fraction = float(manifest.commons.declared)
        records = round(manifest.commons.records * (1 - fraction) / fraction)
    except ValueError:
        config = config.model_copy(update={"planned_by_all": True})
        records = sum(shard.records for shard in manifest.shards.values())
    at_once = config.workers * slots_here(config)
    if config.islands:
        at_once = sum(
            (i.jobs or 1) * (i.resources.workers or config.workers) for i in config.islands
        )
    of_shards = config.workers * len(manifest.shards)
    if at_once > of_shards and not config.islands:
        log.warning(
            "The minutes are divided by what %d processors could train at once, so that no shard's "
            "plan depends on how many there are; with %d shards it takes %.2g times as long",
            at_once, len(manifest.shards), at_once / of_shards,
        )  # fmt: skip
    return _with_passes(
        config, passes_in(minutes, speed=speed, islands_at_once=at_once, records=max(1, records))
    )


def _check_by_minutes(passes: float | None) -> None:
    """Refuse minutes for what is planned already without them."""
    from atoll.core.errors import ConfigError

    if passes is None:
        raise ConfigError(
            "This is planned already, by the recipe's passes",
            cure="leave out --minutes to go on as planned, or start a new run",
        )


def _check_one_length(minutes: float | None, passes: float | None) -> None:
    """Refuse two lengths of one training."""
    from atoll.core.errors import UsageError

    if minutes is not None and passes is not None:
        raise UsageError(
            "--minutes and --passes are two ways to say how long", allowed="one of the two"
        )


def _with_passes(config: C, passes: float | None) -> C:
    training = config.training.model_copy(update={"passes": passes})
    return config.model_copy(update={"training": training})
