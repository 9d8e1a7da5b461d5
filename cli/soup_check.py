"""What `atoll soup create --check` says: a line for every expert, and tables of their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atoll.cli.output import Result, aligned

if TYPE_CHECKING:
    from atoll.merge.preflight import Check


def checked(check: Check) -> Result:
    """The check as an object and as text."""
    compared, barrier = check.comparison, check.barrier
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(check.opened):
        rows.append(
            {
                "name": one.ingredient.name,
                "weight": one.ingredient.weight,
                "shard": one.ingredient.shard,
                "base_sha256": one.base_sha256,
                "family": None if one.card is None else one.card.family,
                "dtypes": one.model.dtypes,
                "move": None if compared.moves is None else compared.moves[number],
                "loss": None if barrier is None else barrier.losses[number],
            }
        )
    names = [row["name"] for row in rows]
    table = [["expert", "weight", "base", "family", "dtypes", "move", "loss"]]
    for row in rows:
        shown = [row["name"], row["weight"], (row["base_sha256"] or "unknown")[:12]]
        shown += [row["family"] or "unknown", ", ".join(row["dtypes"])]
        table.append([*map(str, shown), _figure(row["move"]), _figure(row["loss"])])
    told = aligned(table)
    pairs: dict[str, Sequence[Sequence[float | None]] | None] = {
        "cosines of moves": compared.cosines,
        "distances": compared.distances,
        "loss barriers": None if barrier is None else barrier.barriers,
    }
    for title, matrix in pairs.items():
        if matrix is not None and len(names) > 1:
            lines = [
                [name, *map(_figure, values)] for name, values in zip(names, matrix, strict=True)
            ]
            told += ["", *aligned([[title, *names], *lines])]
    if barrier is not None:
        told += ["", f"loss of the soup with equal weights: {barrier.soup:.4f}"]
    return {
        "experts": rows,
        "elements": compared.elements,
        "base_norm": compared.base_norm,
        "cosines": compared.cosines,
        "distances": compared.distances,
        "barriers": None if barrier is None else barrier.barriers,
        "soup_loss": None if barrier is None else barrier.soup,
        "text": "\n".join(told),
    }


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
