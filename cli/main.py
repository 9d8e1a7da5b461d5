"""The `atoll` command: the list of its commands, and how each ends.

Importing this module loads typer and little else, so that `atoll --help` answers at once; a
command's packages are imported when it runs.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from atoll import __version__
from atoll.cli import corpora, demonstration, models, recipes, removal, soups, training, watching
from atoll.cli.output import fail, interrupted
from atoll.core.collector import look_rarely
from atoll.core.errors import AtollError, Failed, Refused, UsageError

log = logging.getLogger("atoll")

app = typer.Typer(
    name="atoll",
    help="Train a diffusion model on small, separate GPU islands, and forget exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atoll {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a diffusion model on small, separate GPU islands, and forget exactly."""


demonstration.register(app)
corpora.register(app)
recipes.register(app)
training.register(app)
watching.register(app)
models.register(app)
soups.register(app)
removal.register(app)


def run(arguments: list[str] | None = None) -> None:
    """The console script: every way a command can end, as an exit code of the table."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    look_rarely()
    try:
        if sys.platform == "win32":
            raise Refused("Atoll does not run on Windows", allowed="Linux", cure="use WSL 2")
        ended = app(given, prog_name="atoll", standalone_mode=False)
    except AtollError as error:
        fail(error, as_json=as_json)
    except typer.TyperException as error:
        code = getattr(error, "exit_code", 2)
        message = error.format_message()
        if not message:  # a bare `atoll` has printed its help
            raise SystemExit(code) from None
        context = getattr(error, "ctx", None)
        hint = f"`{context.command_path} --help` lists what is allowed" if context else ""
        fail(UsageError(message, cure=hint), as_json=as_json)
    except OSError as error:  # a place that cannot be read or written
        log.debug("where it happened", exc_info=True)
        named = f"{error.filename}: " if error.filename else ""
        fail(Failed(f"{named}{error.strerror or error}"), as_json=as_json)
    except KeyboardInterrupt:
        fail(interrupted(), as_json=as_json)
    if ended == 130:  # how typer hands on Ctrl-C
        fail(interrupted(), as_json=as_json)
    raise SystemExit(ended if isinstance(ended, int) else 0)
