"""`atoll demo`: the whole loop on an embedded data set, ending in a report."""

from __future__ import annotations

from typing import Annotated

import typer

from atoll.cli.output import Result, command


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "demo", example="atoll demo --out out/demo")
    def demo(
        out: Annotated[str, typer.Option(help="Folder of the run and its report.")] = "out/demo",
        corpus: Annotated[
            str | None, typer.Option(help="Another corpus than scikit-learn's digits.")
        ] = None,
        shards: Annotated[int, typer.Option(min=2, help="How many shards.")] = 4,
        minutes: Annotated[
            float | None, typer.Option(min=0.5, help="Training time, for another corpus.")
        ] = None,
        smallest: Annotated[
            bool, typer.Option("--smallest", help="Barely trained, within 90 seconds.")
        ] = False,
    ) -> Result:
        """Partition, train, ensemble, soup, forget a shard, and report, on real pictures."""
        from atoll.cli.demo import run_demo

        return run_demo(out, corpus=corpus, shards=shards, minutes=minutes, smallest=smallest)
