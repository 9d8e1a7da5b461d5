"""What the ledger says about a soup: its digest, and the shards whose experts are in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atoll.core.digest import sha256_named
from atoll.merge.home import Home
from atoll.merge.soup import Soup


@dataclass(frozen=True)
class SoupEntry:
    """The fields of a ledger entry; `parents` are the names of the experts averaged."""

    kind: str
    name: str
    sha256: str  # of the whole folder
    parents: tuple[str, ...]
    shards: tuple[str, ...]
    note: dict[str, Any]


def ledger_entry(soup: Soup, name: str) -> SoupEntry:
    """The entry for a soup, which the run calls `name`.

    The controller turns `parents` into the ledger's entries of these experts: an island's parents
    (base, encoder) carry their own shards along.
    """
    recipe, digests = soup.recipe, soup.digests
    return SoupEntry(
        kind="soup",
        name=name,
        sha256=sha256_named(digests) if digests else Home(soup.place).sha256_folder(),
        parents=tuple(ingredient.name for ingredient in recipe.ingredients),
        shards=tuple(recipe.shards),
        note={
            "soup": recipe.name,
            "weights": {i.name: i.weight for i in recipe.ingredients},
            "weights_sha256": recipe.sha256,
        },
    )
