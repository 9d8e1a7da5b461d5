"""Writes the weights of soups, all that are asked for in one reading of the ingredients.

In: recipes, and what was opened for them. Out: the weights' files, or their digests alone, and the
recipes with the digests of all that was read and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from atoll.merge.ingredients import Opened, by_name
from atoll.merge.lora import FILE_NAME as ADAPTER_NAME
from atoll.merge.lora import layouts_of, mean_adapter, read_adapter
from atoll.merge.mean import mean_layouts, mean_rule
from atoll.merge.model import sha256_weights
from atoll.merge.moves import moves_rule, trim_limits
from atoll.merge.recipe import MOVES, Recipe
from atoll.merge.stream import Out, save, stream


def mean_files(recipe: Recipe, opened: Sequence[Opened]) -> tuple[Recipe, dict[str, str]]:
    """The soup's weights computed and written nowhere: their sha256 by file, and the recipe.

    Of every tensor only a piece of each ingredient is in memory.
    """
    opened = by_name(opened)
    with ExitStack() as closing:
        (digests,) = _streamed(recipe, [recipe], opened, [None], closing)
        return _read(recipe, opened, digests), digests


def averaged(
    whole: Recipe,
    recipes: Sequence[Recipe],
    parts: Sequence[Sequence[Opened]],
    opened: Sequence[Opened],
    partials: Sequence[Path],
) -> list[Recipe]:
    """Write the weights of every soup, each of its `parts`; the recipes with all digests."""
    with ExitStack() as closing:
        digests = _streamed(whole, recipes, opened, partials, closing)
        return [_read(*each) for each in zip(recipes, parts, digests, strict=True)]


def _streamed(
    whole: Recipe,
    recipes: Sequence[Recipe],
    opened: Sequence[Opened],
    folders: Sequence[Path | None],
    closing: ExitStack,
) -> list[dict[str, str]]:
    """The mean of the `whole`, or of all but one each, into every folder; their sha256 by file.

    What was opened stays so until the stack is closed: its digests are still to be asked for.
    """
    models = [closing.enter_context(one.model) for one in opened]
    if opened[0].model.is_adapter:
        return [_adapters(*each, opened) for each in zip(recipes, folders, strict=True)]
    digests: list[dict[str, str]] = [{} for _ in folders]
    limits = trim_limits(whole, models) if whole.method == "ties" else {}
    for file, layouts in mean_layouts(opened, whole.dtype).items():
        outs = []
        for recipe, folder in zip(recipes, folders, strict=True):
            path = None if folder is None else folder / file
            if path is not None:
                path.parent.mkdir(exist_ok=True)
            outs.append(Out(path, recipe.metadata))
        if whole.method in MOVES:
            rule = moves_rule(whole, file, limits.get(file, []))
        else:
            rule = mean_rule(whole, file, None if len(folders) == 1 else recipes)
        sources = [model.weights[file] for model in models]
        found = stream(sources, layouts, rule, outs=outs, what=f"averaging {file}")
        for known, digest in zip(digests, found, strict=True):
            known[file] = digest
    return digests


def _adapters(recipe: Recipe, folder: Path | None, opened: Sequence[Opened]) -> dict[str, str]:
    """The mean of the adapters in a recipe; small enough to be in memory."""
    parts = {part.name for part in recipe.ingredients}
    adapters = [
        read_adapter(weights, one.ingredient.name)
        for one in opened
        for weights in one.model.weights.values()
        if one.ingredient.name in parts
    ]
    made = mean_adapter(
        recipe, adapters, None if recipe.dtype == "same" else getattr(torch, recipe.dtype)
    )
    path = None if folder is None else folder / ADAPTER_NAME
    return {ADAPTER_NAME: save(made, layouts_of(made), Out(path, recipe.metadata))}


def _read(recipe: Recipe, opened: Sequence[Opened], digests: Mapping[str, str]) -> Recipe:
    """The recipe with the digests of what came and of what was read for it."""
    ingredients = tuple(one.read() for one in by_name(opened))
    return recipe.model_copy(update={"ingredients": ingredients, "sha256": sha256_weights(digests)})
