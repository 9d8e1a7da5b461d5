"""What the ledger says about a soup: its digest, and the shards whose experts are in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.core.storage import sha256_folder
from atoll.merge.recipe import Recipe


@dataclass(frozen=True)
class SoupEntry:
    """The fields of a ledger entry; `parents` are the names of the experts averaged."""

    kind: str
    name: str
    sha256: str  # of the whole folder
    parents: tuple[str, ...]
    shards: tuple[str, ...]
    note: dict[str, Any]


def ledger_entry(soup: Path, name: str) -> SoupEntry:
    """The entry for the soup in folder `soup`, which the run calls `name`.

    The controller turns `parents` into the ledger's entries of these experts: an island's parents
    (base, encoder) carry their own shards along.
    """
    recipe = Recipe.load(soup)
    return SoupEntry(
        kind="soup",
        name=name,
        sha256=sha256_folder(soup),
        parents=tuple(ingredient.name for ingredient in recipe.ingredients),
        shards=tuple(recipe.shards),
        note={
            "soup": recipe.name,
            "weights": {i.name: i.weight for i in recipe.ingredients},
            "weights_sha256": recipe.sha256,
        },
    )
