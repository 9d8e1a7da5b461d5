"""Opens the experts that go into a soup, finds those of an old one again, and refuses strangers.

Averaging is only meaningful among copies of one base that stayed in its linear region (Diffusion
Soup, arXiv 2406.08431), so ingredients must agree in everything but their weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atoll.core.denoiser import CARD_NAME, Card, read_card
from atoll.core.errors import AtollError, MissingError, Refused, UsageError
from atoll.merge import exact
from atoll.merge.recipe import Ingredient, Recipe, check_weight
from atoll.merge.weights import DTYPES, Layout, Weights

CONFIG_NAME = "config.json"
# What diffusers notes about the writer; no part of the network.
_CONFIG_NOTES = ("_diffusers_version", "_name_or_path")
_CARD_FIELDS = ("base_sha256", "family", "prediction", "schedule", "latent_space")


@dataclass(frozen=True)
class Opened:
    """An ingredient, its card, its configuration and its tensors, not yet read."""

    folder: Path
    ingredient: Ingredient
    card: Card
    config: Mapping[str, Any]
    weights: Weights

    def seen_from(self, soup: Path) -> Opened:
        """The same as an ingredient of a soup that lies elsewhere."""
        path = _relative(self.folder, soup)
        return replace(self, ingredient=self.ingredient.model_copy(update={"path": path}))

    def read(self) -> Ingredient:
        """The ingredient with its digest, of open weights; refused if it was another."""
        found = self.weights.sha256()
        if self.ingredient.sha256 not in ("", found):
            raise Refused(
                f"The weights of '{self.ingredient.name}' in {self.folder} are not those that are "
                f"in the soup, sha256 {self.ingredient.sha256[:16]}...",
                cure="restore the expert from a copy, or name the folder that holds it",
            )
        return self.ingredient.model_copy(update={"sha256": found})


def open_experts(experts: Mapping[Path, int], soup: Path) -> list[Opened]:
    """Experts by folder and integer weight, as ingredients of a soup that lies at `soup`."""
    checked = {folder: check_weight(weight, str(folder)) for folder, weight in experts.items()}
    return [_open(folder, weight, soup) for folder, weight in checked.items()]


def find_ingredients(
    recipe: Recipe, soup: Path, *, search: Sequence[Path] = (), leave: str | None = None
) -> list[Opened]:
    """A soup's ingredients, all but `leave`, where the recipe has them or below `search`.

    The digest decides among several of the right name; one alone is refused when it is `read` and
    has other weights. The recorded path stays, wherever the expert was found, so that a soup's
    bytes do not tell of its travels.
    """
    found = []
    for ingredient in recipe.ingredients:
        if ingredient.name == leave:
            continue
        opened = _find(ingredient, soup, search)
        if opened.card.shard != ingredient.shard:
            raise Refused(
                f"The recipe of {soup} has '{ingredient.name}' from shard {ingredient.shard}, "
                f"its card says {opened.card.shard}",
                cure="restore soup.json or the expert from a copy",
            )
        found.append(opened)
    return found


def check_alike(opened: Sequence[Opened]) -> None:
    """Refuse ingredients that are not all copies of one base with one layout."""
    first = min(opened, key=lambda one: one.ingredient.name)
    for other in opened:
        pair = f"'{first.ingredient.name}' and '{other.ingredient.name}'"
        for field in _CARD_FIELDS:
            ours, theirs = getattr(first.card, field), getattr(other.card, field)
            if ours != theirs:
                shown = ["our linear path" if each is None else each for each in (ours, theirs)]
                raise _strangers(pair, field, *shown)
        differing = sorted(
            key
            for key in first.config.keys() | other.config.keys()
            if key not in _CONFIG_NOTES and first.config.get(key) != other.config.get(key)
        )
        if differing:
            key = differing[0]
            ours, theirs = first.config.get(key), other.config.get(key)
            raise _strangers(pair, f"{CONFIG_NAME}: {key}", ours, theirs)
        ours, theirs = first.weights.layout, other.weights.layout
        for name in sorted(ours.keys() | theirs.keys()):
            if not _alike(ours.get(name), theirs.get(name)):
                raise _strangers(pair, f"tensor '{name}'", ours.get(name), theirs.get(name))


def _alike(ours: Layout | None, theirs: Layout | None) -> bool:
    """Of one shape and dtype, or both of dtypes that are averaged."""
    if ours is None or theirs is None:
        return False
    floats = DTYPES[ours.dtype] in exact.DTYPES and DTYPES[theirs.dtype] in exact.DTYPES
    return ours.shape == theirs.shape and (floats or ours.dtype == theirs.dtype)


def _open(folder: Path, weight: int, soup: Path) -> Opened:
    card = read_card(folder)
    if card.kind == "soup":
        raise Refused(
            f"{folder} is a soup, and a soup of soups would hide what is in it",
            allowed="experts",
            cure="name its ingredients (`atoll soup show` lists them)",
        )
    if card.kind != "expert":
        raise Refused(f"{folder} is a {card.kind}", allowed="experts")
    if card.base_sha256 is None:
        raise Refused(
            f"The expert {folder} names no base, so nothing says that its weights can be averaged",
            allowed="experts trained from one base",
        )
    weights = Weights(folder)
    ingredient = Ingredient(
        name=card.name,
        shard=card.shard,
        weight=weight,
        sha256="",
        path=_relative(folder, soup),
    )
    return Opened(folder, ingredient, card, _config(folder), weights)


def _relative(folder: Path, soup: Path) -> str:
    # realpath: a relative path is walked by the system, not by the text of a link.
    return Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(soup))).as_posix()


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
    except FileNotFoundError:
        raise MissingError(f"There is no {CONFIG_NAME} in {folder}") from None
    except ValueError as error:
        raise Refused(f"{folder}/{CONFIG_NAME} is not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise Refused(f"{folder}/{CONFIG_NAME} is not an object")
    return config


def _find(ingredient: Ingredient, soup: Path, search: Iterable[Path]) -> Opened:
    candidates = [
        replace(_open(folder, ingredient.weight, soup), ingredient=ingredient)
        for folder in _candidates(ingredient, soup, search)
    ]
    for opened in candidates[:-1]:
        with opened.weights, contextlib.suppress(Refused):
            opened.read()
            return opened
    if candidates:
        return candidates[-1]
    raise UsageError(
        f"The ingredient '{ingredient.name}' is not at {soup / ingredient.path}",
        cure="name the folder that holds the experts with --ingredients DIR",
    )


def _candidates(ingredient: Ingredient, soup: Path, search: Iterable[Path]) -> Iterator[Path]:
    """Expert folders of the ingredient's name: where it was, then all others below `search`."""
    places = [Path(os.path.realpath(soup)) / ingredient.path]
    for root in search:
        if not root.is_dir():
            raise UsageError(f"There is no folder {root}")
        places += sorted(file.parent for file in root.rglob(CARD_NAME))
    for place in dict.fromkeys(Path(os.path.realpath(place)) for place in places):
        # Others' folders below the search root may be of any kind, ensembles among them.
        try:
            card = read_card(place)
        except AtollError:
            continue
        if (card.name, card.kind) == (ingredient.name, "expert"):
            yield place


def _strangers(pair: str, what: str, ours: object, theirs: object) -> Refused:
    return Refused(
        f"{pair} cannot be averaged, they differ in {what}: {ours} and {theirs}",
        allowed="experts trained from one base, with one configuration",
        cure="leave one of them out",
    )
