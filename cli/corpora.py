"""`atoll partition`: a corpus becomes shards."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from atoll.cli.output import ConfigOption, Result, RunArgument, SetOption, command


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "partition", example="atoll partition pictures.parquet out/run --shards 6")
    def partition(
        corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Parquet or image folder.")],
        run: RunArgument,
        shards: Annotated[int | None, typer.Option(help="How many shards.")] = None,
        encoder: Annotated[
            str | None,
            typer.Option(
                help="fit, hf-hub:ORG/NAME, local-dir:FOLDER or an open_clip tag [default: fit]"
            ),
        ] = None,
        vae: Annotated[
            str | None,
            typer.Option(
                help="Train on the latents of this autoencoder: its folder, a pipeline's, or "
                "hf-hub:ORG/NAME."
            ),
        ] = None,
        by: Annotated[
            str | None, typer.Option(help="clusters, or the column that names owners.")
        ] = None,
        commons: Annotated[
            str | None,
            typer.Option(help="A fraction, owners or a URI: what is public [default: 0.1]"),
        ] = None,
        holdout: Annotated[
            float | None, typer.Option(help="Fraction held out of every shard [default: 0.05]")
        ] = None,
        fit_on: Annotated[
            Literal["commons", "all"] | None,
            typer.Option(help="Whose records move the centroids."),
        ] = None,
        seed: Annotated[int | None, typer.Option(help="Seed of the whole run [default: 0]")] = None,
        set_: SetOption = None,
        config: ConfigOption = None,
    ) -> Result:
        """Embed a corpus, cluster it, and write one folder per shard."""
        from atoll.cli.resolve import resolve
        from atoll.cli.working import check_no_removal
        from atoll.core.lock import exclusive
        from atoll.core.storage import Storage
        from atoll.partitioner.pipeline import partition as do_partition
        from atoll.partitioner.settings import PartitionConfig

        resolved = resolve(
            PartitionConfig, config, set_,
            shards=shards, encoder=encoder, vae=vae, by=by, commons=commons, holdout=holdout,
            fit_on=fit_on, seed=seed,
        )  # fmt: skip
        storage = Storage(run)
        with exclusive(storage):
            check_no_removal(storage)
            manifest = do_partition(corpus, storage, resolved)
        sizes = {name: shard.records for name, shard in manifest.shards.items()}
        lines = [f"{name}: {count} records" for name, count in sizes.items()]
        return {
            "run": run,
            "shards": sizes,
            "held_out": {name: shard.held_out for name, shard in manifest.shards.items()},
            "commons": manifest.commons.records,
            "report": f"{run}/partition/report.html",
            "text": "\n".join([*lines, f"Look at {run}/partition/report.html"]),
        }
