"""How every command talks: shared options, one JSON object or readable lines, exit codes."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer

from atoll.core.errors import AtollError, ExitCode

Result = dict[str, Any]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
VerboseOption = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Say only warnings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one configuration key; repeatable."),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="A configuration that a command has saved."),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder or URI.")]

_SHARED = {
    "json_": (JsonOption, False),
    "verbose": (VerboseOption, 0),
    "quiet": (QuietOption, False),
}


def command(
    app: typer.Typer, name: str, *, example: str
) -> Callable[[Callable[..., Result | Iterator[Result]]], Callable[..., None]]:
    """Register a function that returns its result; adds --json, -v and -q and prints the result.

    The keys of the returned dictionary are the keys of the `--json` object; `text`, when it is
    there, is what a person reads instead. A function that watches returns its results one after
    the other: JSON lines, or on a terminal one page that is drawn anew.
    """

    def register(function: Callable[..., Result | Iterator[Result]]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in _SHARED.items()
        ]

        @functools.wraps(function)
        def wrapped(
            *args: Any, json_: bool = False, verbose: int = 0, quiet: bool = False, **kwargs: Any
        ) -> None:
            from atoll.core.journal import set_verbosity

            set_verbosity(-1 if quiet else verbose)
            found = function(*args, **kwargs)
            for result in [found] if isinstance(found, dict) else found:
                _say(result, as_json=json_, quiet=quiet, clear=not isinstance(found, dict))

        parameters = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()
        ]
        wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, *added], return_annotation=None
        )
        wrapped.__annotations__ = {p.name: p.annotation for p in [*parameters, *added]}
        app.command(name, epilog=f"Example: {example}")(wrapped)
        return wrapped

    return register


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for every row, its cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _say(result: Result, *, as_json: bool, quiet: bool, clear: bool) -> None:
    text = result.pop("text", None)
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)  # noqa: T201
    elif not quiet:
        home = "\x1b[H\x1b[J" if clear and sys.stdout.isatty() else ""
        print(home + (text if text is not None else _lines(result)), flush=True)  # noqa: T201


def _lines(result: Result) -> str:
    return "\n".join(f"{key}: {value}" for key, value in result.items())


def fail(error: AtollError, *, as_json: bool) -> NoReturn:
    """Print an error where its reader looks for it, and leave with its exit code."""
    if as_json:
        print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))  # noqa: T201
    else:
        sys.stderr.write(f"atoll: {error}\n")
    sys.stdout.flush()
    raise SystemExit(int(error.exit_code))


def interrupted() -> AtollError:
    """What Ctrl-C means where a command has nothing more precise to say."""
    error = AtollError("Interrupted", cure="run the same command again, it resumes")
    error.exit_code = ExitCode.INTERRUPTED  # type: ignore[misc]
    return error
