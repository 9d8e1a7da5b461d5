"""A soup: the correctly rounded integer-weighted mean of experts, and a recipe to redo it.

Reads expert folders, writes a soup folder: `config.json`, weights, `atoll.json`, `soup.json`. Every
change computes the mean anew from the ingredients and replaces the folder whole, so nothing of an
ingredient that left can remain, and a soup depends on what is in it and on nothing else.
Diffusion Soup, arXiv 2406.08431; cached sums leak what was deleted, arXiv 2210.08911.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from atoll.core.denoiser import CARD_NAME, Card, read_card
from atoll.core.disk import no_space_is_failure, recover, replacing
from atoll.core.errors import Refused, UsageError
from atoll.core.storage import canonical_json
from atoll.merge import exact
from atoll.merge.ingredients import CONFIG_NAME, Opened, check_alike, find_ingredients, open_experts
from atoll.merge.recipe import RECIPE_NAME, Dtype, Recipe
from atoll.merge.tensors import DTYPES, WEIGHTS_NAME, Layout, write

# Elements in memory at a time, over all ingredients: 16 MiB of float32.
_ELEMENTS = 1 << 22
_AVERAGED = {name for name, dtype in DTYPES.items() if dtype in exact.DTYPES}
_FORMAT_NAME = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Soup:
    """A soup on disk: its folder, card and recipe."""

    path: Path
    card: Card
    recipe: Recipe


def create(out: Path, experts: Mapping[Path, int], *, dtype: Dtype = "same") -> Soup:
    """Average experts, given by folder and integer weight, into a soup at `out`.

    The same command again makes the same soup again; anything else that lies at `out` is refused.
    """
    opened = open_experts(experts, out)
    recipe = _recipe(opened, dtype)
    with no_space_is_failure(out.name), replacing(out, alone=True) as partial:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            _check_same(out, recipe)
        return _make(recipe, opened, partial, out)


def add(soup: Path, experts: Mapping[Path, int], *, search: Sequence[Path] = ()) -> Soup:
    """Make the soup anew with further experts; `search` holds ingredients that have moved."""
    with _changing(soup) as (partial, recipe):
        opened = find_ingredients(recipe, soup, search=search) + open_experts(experts, soup)
        return _make(_recipe(opened, recipe.dtype), opened, partial, soup)


def remove(soup: Path, name: str, *, search: Sequence[Path] = ()) -> Soup:
    """Make the soup anew without the ingredient of that name, or of that shard.

    The ingredient itself need not exist any more. The last one is refused.
    """
    with _changing(soup) as (partial, recipe):
        leave = recipe.named(name).name
        if len(recipe.ingredients) == 1:
            raise Refused(
                f"'{leave}' is the last ingredient of {soup}",
                cure="delete the folder to be rid of the soup",
            )
        opened = find_ingredients(recipe, soup, search=search, leave=leave)
        return _make(_recipe(opened, recipe.dtype), opened, partial, soup)


def show(soup: Path) -> Soup:
    """Read a soup's card and recipe."""
    recipe = Recipe.load(soup)
    return Soup(soup, read_card(soup), recipe)


def mean_file(recipe: Recipe, opened: Sequence[Opened], *, file: BinaryIO | None = None) -> str:
    """Write the soup's weights to `file`, or to nowhere, and return their hex sha256.

    Of every tensor only a piece of each ingredient is in memory.
    """
    opened = sorted(opened, key=lambda one: one.ingredient.name)
    layouts = {
        name: _target(layout, recipe.dtype) for name, layout in opened[0].weights.layout.items()
    }
    pieces = functools.partial(_pieces, opened=opened, layouts=layouts)
    with ExitStack() as stack:
        for one in opened:
            stack.enter_context(one.weights)
        return write(layouts, pieces, file=file)


def small_files(recipe: Recipe, opened: Iterable[Opened]) -> dict[str, bytes]:
    """The content of everything in a soup's folder but the weights, by file name."""
    opened = sorted(opened, key=lambda one: one.ingredient.name)
    first = opened[0]
    card = Card(
        name=recipe.name,
        kind="soup",
        shard=None,
        base_sha256=recipe.base_sha256,
        family=first.card.family,
        prediction=first.card.prediction,
        schedule=first.card.schedule,
        latent_space=first.card.latent_space,
        images_seen=sum(one.card.images_seen for one in opened),
    )
    # Where diffusers loaded an ingredient from is nothing of the soup's.
    config = {key: value for key, value in first.config.items() if key != "_name_or_path"}
    return {
        CONFIG_NAME: canonical_json(config),
        RECIPE_NAME: recipe.to_bytes(),
        CARD_NAME: card.to_bytes(),
    }


@contextmanager
def _changing(soup: Path) -> Iterator[tuple[Path, Recipe]]:
    """The folder to fill, and the recipe as it stands while nobody else may change it."""
    recover(soup)
    Recipe.load(soup)  # before anything is written beside it
    with no_space_is_failure(soup.name), replacing(soup, alone=True) as partial:
        yield partial, Recipe.load(soup)


def _recipe(opened: Sequence[Opened], dtype: Dtype) -> Recipe:
    if not opened:
        raise UsageError("A soup needs at least one expert", cure="name one: EXPERT[=WEIGHT]")
    ingredients = [one.ingredient for one in opened]
    recipe = Recipe.of(ingredients, base_sha256=str(opened[0].card.base_sha256), dtype=dtype)
    check_alike(opened)
    return recipe


def _check_same(out: Path, recipe: Recipe) -> None:
    """Refuse to write over anything but the same soup."""
    if (out / RECIPE_NAME).is_file():
        there = Recipe.load(out)
        if there.model_copy(update={"sha256": ""}) == recipe:
            return
        raise Refused(
            f"There is another soup at {out}",
            cure="change it with `atoll soup add` and `atoll soup remove`, or name another OUT",
        )
    raise Refused(f"{out} is not empty and holds no soup", cure="name another OUT")


def _make(recipe: Recipe, opened: Sequence[Opened], partial: Path, soup: Path) -> Soup:
    """Fill the folder `partial`, which will lie at `soup`."""
    with (partial / WEIGHTS_NAME).open("wb") as file:
        digest = mean_file(recipe, opened, file=file)
    recipe = recipe.model_copy(update={"sha256": digest})
    for name, content in small_files(recipe, opened).items():
        (partial / name).write_bytes(content)
    return Soup(soup, read_card(partial), recipe)


def _target(layout: Layout, dtype: Dtype) -> Layout:
    if dtype == "same" or layout.dtype not in _AVERAGED:
        return layout
    return replace(layout, dtype=_FORMAT_NAME[getattr(torch, dtype)])


def _pieces(
    name: str, *, opened: Sequence[Opened], layouts: Mapping[str, Layout]
) -> Iterator[Tensor]:
    """The soup's tensor in pieces: the mean of floats; integers, if all agree, as they are."""
    layout = opened[0].weights.layout[name]
    target = DTYPES[layouts[name].dtype]
    step = max(_ELEMENTS // len(opened), exact.CHUNK)
    for first in range(0, layout.count, step):
        count = min(step, layout.count - first)
        values = [one.weights.read(name, first, count) for one in opened]
        if layout.dtype in _AVERAGED:
            yield _mean(values, opened, name=name, target=target)
            continue
        for value, one in zip(values, opened, strict=True):
            if not torch.equal(value.view(torch.uint8), values[0].view(torch.uint8)):
                raise Refused(
                    f"The {layout.dtype} tensor '{name}' differs between "
                    f"'{opened[0].ingredient.name}' and '{one.ingredient.name}'",
                    allowed="integer tensors that are equal in all ingredients",
                    cure="leave one of them out",
                )
        yield values[0]


def _mean(
    values: list[Tensor], opened: Sequence[Opened], *, name: str, target: torch.dtype
) -> Tensor:
    weights = [one.ingredient.weight for one in opened]
    try:
        return exact.mean(values, weights, dtype=target)
    except exact.NotFiniteError as error:
        if error.index is None:
            raise Refused(
                f"The mean of tensor '{name}' does not fit into {str(target)[6:]}",
                cure="leave out --dtype, or choose bfloat16 or float32",
            ) from error
        raise Refused(
            f"Tensor '{name}' of '{opened[error.index].ingredient.name}' holds NaN or infinity",
            cure="leave this expert out, and look into its training",
        ) from error
