"""What a benchmark prints: one object of rows, each with its bar and whether that is held."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

Row = dict[str, Any]


def row(
    name: str,
    value: float | None,
    unit: str,
    *,
    against: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    digits: int = 3,
) -> Row:
    """A figure, and whether it holds the one bar it is given; a value of None holds nothing."""
    holds: bool | None = None
    if at_least is not None:
        holds = value is not None and value >= at_least
    elif at_most is not None:
        holds = value is not None and value <= at_most
    return {
        "name": name,
        "value": None if value is None else round(value, digits),
        "unit": unit,
        "against": against,
        "bar": at_least if at_least is not None else at_most,
        "holds": holds,
    }


def unmeasured(made: Row, why: str) -> Row:
    """The same row without a value: neither held nor missed."""
    return {**made, "value": None, "against": f"not measured: {why}", "holds": None}


def show(benchmark: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the object, on one line or for reading."""
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, torch {torch.__version__}, {threads} thread(s)"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    result = {"benchmark": benchmark, "machine": machine, "rows": list(rows)}
    print(json.dumps(result, indent=None if as_json else 2))  # noqa: T201
