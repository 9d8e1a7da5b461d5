"""Checks a soup as a stranger would: from its recipe and its ingredients alone.

Reads the soup and its ingredients, computes every byte of the soup's folder anew without writing
any, and compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.core.errors import AtollError, Refused
from atoll.merge.averages import adapter_distance, mean_files
from atoll.merge.far import Place
from atoll.merge.home import Home
from atoll.merge.ingredients import Opened, by_name, check_together, find_ingredients
from atoll.merge.lora import FILE_NAME as ADAPTER_NAME
from atoll.merge.model import sha256_weights
from atoll.merge.recipe import STATE, Recipe
from atoll.merge.soup import base_among, small_files, stock_blocks_of

_NEAR = 1e-6  # of the norm: well above float32's rounding of factors, below what anybody could see


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; `problems` is empty when the soup is what its recipe says."""

    place: Place
    ingredients: tuple[str, ...]
    expected_sha256: str  # of the weights as computed now; empty if that was not possible
    found_sha256: str  # of the weights on disk; empty if there are none, or nothing to compare
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.problems


def verify(soup: Place, *, search: Sequence[Path] = ()) -> Verdict:
    """Recompute the soup at `soup`; files that are no part of a soup are not looked at.

    Raises `UsageError` when there is no soup or an ingredient is nowhere to be found, in its
    recorded place or below `search`, and `Refused` when the recipe cannot be read.
    """
    home = Home(soup)
    recipe = home.recipe()
    names = tuple(ingredient.name for ingredient in recipe.ingredients)
    try:
        opened = find_ingredients(recipe, soup, search=search)
        check_together(recipe, opened)
        made, digests = mean_files(recipe, opened)
    except Refused as refused:  # an ingredient that is not what it was
        return Verdict(soup, names, "", "", (str(refused),))

    problems = []
    if recipe.error:
        made, digests, wrong = _near(recipe, opened, home, made, digests)
        problems += wrong
    if opened[0].base_sha256 != recipe.base_sha256:
        problems.append("soup.json names another base than the ingredients")
    if recipe.method == "model-stock" and stock_blocks_of(recipe, opened) != recipe.blocks:
        problems.append(f"soup.json has other weights than {recipe.method} finds")
    if recipe.method == "mean" and base_among(opened) != recipe.base:
        problems.append(f"soup.json has {recipe.base} for the base among the ingredients")
    for one, part in zip(by_name(opened), made.ingredients, strict=True):
        if part.name == recipe.base and one.card is None and part.sha256 != recipe.base_sha256:
            problems.append("soup.json names another base than the ingredient that is it")
    texts = small_files(made, opened)
    wanted = digests | {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    there = {name: digest for name in wanted if (digest := home.sha256(name))}
    for name, expected in wanted.items():
        problems += _differences(name, expected, there.get(name, ""))
    state = [name for name in digests if name.startswith(f"{STATE}/")]
    kept = sorted(set(home.names(STATE)) - wanted.keys())
    problems += [f"{name} is no part of this soup" for name in kept]
    weights = {file: there[file] for file in digests if file in there and file not in state}
    found = sha256_weights(weights) if weights else ""
    return Verdict(soup, names, made.sha256, found, tuple(problems))


def _near(
    recipe: Recipe, opened: Sequence[Opened], home: Home, made: Recipe, digests: dict[str, str]
) -> tuple[Recipe, dict[str, str], list[str]]:
    """Adapters that were cut off: nearly the same products are as good as the same bits.

    Another processor cuts off with other last bits, and with others of what was lost.
    """
    if made.sha256 == recipe.sha256 or ADAPTER_NAME not in home.names():
        return made, digests, []
    try:
        apart = adapter_distance(recipe, opened, home.weights(ADAPTER_NAME))
    except AtollError as refused:
        return made, digests, [f"{ADAPTER_NAME} is no mean of these: {refused}"]
    assert made.error is not None
    assert recipe.error is not None
    if not max(apart, abs(recipe.error - made.error)) <= _NEAR:  # NaN is not near
        return made, digests, []
    taken = {"sha256": recipe.sha256, "error": recipe.error}
    return made.model_copy(update=taken), {ADAPTER_NAME: recipe.sha256}, []


def _differences(name: str, expected: str, found: str) -> list[str]:
    if expected == found:
        return []
    if not found:
        return [f"{name} is missing"]
    return [f"{name} has sha256 {found[:16]}..., computed anew it has {expected[:16]}..."]
