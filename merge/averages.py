"""Writes the weights of soups, all that are asked for in one reading of the ingredients.

In: recipes, and what was opened for them. Out: the weights' files, or their digests alone, and the
recipes with the digests of all that was read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from atoll.core.errors import Refused
from atoll.merge.bake import bake_rule, tensors_of_layers
from atoll.merge.home import Home
from atoll.merge.ingredients import Opened, body, by_name, check_alike
from atoll.merge.lora import FILE_NAME as ADAPTER_NAME
from atoll.merge.lora import (
    Adapter,
    distance_from_made,
    layouts_of,
    mean_adapter,
    read_adapter,
)
from atoll.merge.mean import mean_layouts, mean_rule
from atoll.merge.model import sha256_weights
from atoll.merge.moves import moves_rule, trim_limits
from atoll.merge.recipe import BAKE, MOVES, RECIPE_NAME, STATE, Ingredient, Recipe
from atoll.merge.state import Rests, rest_name, state_layouts, state_name, state_rule
from atoll.merge.stream import Out, save, stream
from atoll.merge.weights import Layout, Weights


@dataclass
class Digests:
    """Of what was written: sha256 by file, of the weights and of the running state."""

    weights: dict[str, str] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)
    error: float | None = None  # of adapters that were cut off


Made = tuple[Recipe, dict[str, str]]
"""A soup's recipe with the digests of all that was read and written, and those by file."""


@dataclass(frozen=True)
class Change:
    """An ingredient that came, or with `sign` -1 one that leaves, and what it counts."""

    opened: Opened
    sign: int
    recipe: Recipe  # that has its weights

    def weight(self, tensor: str) -> int:
        """What is added of it."""
        names = [part.name for part in self.recipe.ingredients]
        return self.sign * self.recipe.weights(tensor)[names.index(self.opened.ingredient.name)]


def mean_files(recipe: Recipe, opened: Sequence[Opened]) -> Made:
    """The soup's weights computed and written nowhere.

    Of every tensor only a piece of each ingredient is in memory.
    """
    opened = by_name(opened)
    with ExitStack() as closing:
        (digests,) = _streamed(recipe, [recipe], opened, [None], closing)
        return _read(recipe, opened, digests)


def averaged(
    whole: Recipe,
    recipes: Sequence[Recipe],
    parts: Sequence[Sequence[Opened]],
    opened: Sequence[Opened],
    partials: Sequence[Path],
) -> list[Made]:
    """Write the weights of every soup, each of its `parts`."""
    with ExitStack() as closing:
        digests = _streamed(whole, recipes, opened, partials, closing)
        return [_read(*each) for each in zip(recipes, parts, digests, strict=True)]


def updated(
    recipe: Recipe,
    opened: Sequence[Opened],
    changes: Sequence[Change],
    partial: Path,
    *,
    home: Home,
    state_sha256: str,
) -> Made:
    """Write a soup's weights and state from the state of the one at `home`, and what changed.

    Raises whatever a state, an ingredient or its store that is not as it was leads to; from those
    that stay the soup can be made all the same.
    """
    digests, before = Digests(), Digests()
    with ExitStack() as closing:
        check_alike([*opened, *(change.opened for change in changes)])
        models = [closing.enter_context(change.opened.model) for change in changes]
        for file, layouts in mean_layouts(opened, recipe.dtype).items():
            sums = closing.enter_context(home.weights(state_name(file)))
            if sums.layout != state_layouts(layouts):
                raise Refused(f"{state_name(file)} has other tensors")
            _stream_with_state(
                recipe, file, layouts, [sums, *(model.weights[file] for model in models)],
                [change.opened.ingredient.name for change in changes],
                lambda tensor: [change.weight(tensor) for change in changes],
                partial, digests, before=Rests.load(home, file),
            )  # fmt: skip
            before.state |= {state_name(file): next(iter(sums.sha256().values()))}
            left = home.sha256(rest_name(file))
            before.state |= {rest_name(file): left} if left else {}
        if sha256_weights(before.state) != state_sha256:
            raise Refused(f"{home.place}/{STATE} is not what {RECIPE_NAME} says")
        read = {change.opened.ingredient.name: change.opened.read() for change in changes}
    ingredients = tuple(read.get(part.name, part) for part in recipe.ingredients)
    return _with_digests(recipe, ingredients, digests)


def _streamed(
    whole: Recipe,
    recipes: Sequence[Recipe],
    opened: Sequence[Opened],
    folders: Sequence[Path | None],
    closing: ExitStack,
) -> list[Digests]:
    """The mean of the `whole`, or of all but one each, into every folder; their digests.

    What was opened stays so until the stack is closed: its digests are still to be asked for.
    """
    limits = {}
    if whole.method == "ties":
        limits = trim_limits(whole, [one.model for one in opened])
    models = [closing.enter_context(one.model) for one in opened]
    if whole.method == BAKE:
        return [_baked(whole, folders[0], opened)]
    if opened[0].model.is_adapter:
        return [_adapters(*each, opened) for each in zip(recipes, folders, strict=True)]
    digests = [Digests() for _ in folders]
    for file, layouts in mean_layouts(opened, whole.dtype).items():
        sources = [model.weights[file] for model in models]
        if whole.state_sha256 is not None:
            names = [part.name for part in whole.ingredients]
            _stream_with_state(
                whole, file, layouts, sources, names, whole.weights, folders[0], digests[0]
            )
            continue
        if whole.method in MOVES:
            rule = moves_rule(whole, file, limits.get(file, []))
        else:
            rule = mean_rule(whole, file, None if len(folders) == 1 else recipes)
        outs = [
            Out(_place(folder, file), recipe.metadata)
            for recipe, folder in zip(recipes, folders, strict=True)
        ]
        found = stream(sources, layouts, rule, outs=outs, what=f"averaging {file}")
        for known, digest in zip(digests, found, strict=True):
            known.weights[file] = digest
    return digests


def _stream_with_state(
    recipe: Recipe,
    file: str,
    layouts: Mapping[str, Layout],
    sources: Sequence[Weights],
    names: Sequence[str],
    signed: Callable[[str], Sequence[int]],
    folder: Path | None,
    digests: Digests,
    *,
    before: Rests | None = None,
) -> None:
    """Write a file of a soup and its sums, and note their digests."""
    rests = Rests()
    rule = state_rule(
        file, names, signed, lambda tensor: sum(recipe.weights(tensor)), rests, before=before
    )
    outs = [
        Out(_place(folder, file), recipe.metadata),
        Out(_place(folder, state_name(file)), recipe.metadata, state_layouts(layouts)),
    ]
    found = stream(sources, layouts, rule, outs=outs, what=f"averaging {file}")
    digests.weights[file], digests.state[state_name(file)] = found
    digests.state |= rests.save(folder, file, recipe.metadata)


def _place(folder: Path | None, file: str) -> Path | None:
    if folder is None:
        return None
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    return folder / file


def _adapters(recipe: Recipe, folder: Path | None, opened: Sequence[Opened]) -> Digests:
    """The mean of the adapters in a recipe; small enough to be in memory."""
    made, error = mean_adapter(recipe, _understood(recipe, opened), _torch_dtype(recipe))
    out = Out(_place(folder, ADAPTER_NAME), recipe.metadata)
    return Digests({ADAPTER_NAME: save(made, layouts_of(made), out)}, error=error)


def _baked(recipe: Recipe, folder: Path | None, opened: Sequence[Opened]) -> Digests:
    """The base with the adapters in it."""
    base = body(recipe, opened)
    adapters = {
        one.ingredient.name: read_adapter(weights, one.ingredient.name)
        for one in opened
        if one is not base
        for weights in one.model.weights.values()
    }
    stems = {stem for adapter in adapters.values() for stem in adapter.modules}
    layouts = {file: weights.layout for file, weights in base.model.weights.items()}
    layers = tensors_of_layers(layouts, stems, base.ingredient.name)
    digests = Digests()
    for file, made in mean_layouts([base], recipe.dtype).items():
        tensors = {name: stem for (home, name), stem in layers.items() if home == file}
        rule = bake_rule(recipe, file, made, adapters, tensors)
        (digests.weights[file],) = stream(
            [base.model.weights[file]], made, rule,
            outs=[Out(_place(folder, file), recipe.metadata)], what=f"baking {file}",
        )  # fmt: skip
    return digests


def adapter_distance(recipe: Recipe, opened: Sequence[Opened], made: Weights) -> float:
    """How far the products of adapters are from those made now, over their norm."""
    opened = by_name(opened)
    with ExitStack() as closing:
        for one in opened:
            closing.enter_context(one.model)
        adapters = _understood(recipe, opened)
        found = closing.enter_context(made)
        return distance_from_made(recipe, adapters, _torch_dtype(recipe), found)


def _understood(recipe: Recipe, opened: Sequence[Opened]) -> list[Adapter]:
    parts = {part.name for part in recipe.ingredients}
    return [
        read_adapter(weights, one.ingredient.name)
        for one in opened
        for weights in one.model.weights.values()
        if one.ingredient.name in parts
    ]


def _torch_dtype(recipe: Recipe) -> torch.dtype | None:
    return None if recipe.dtype == "same" else getattr(torch, recipe.dtype)


def _read(recipe: Recipe, opened: Sequence[Opened], digests: Digests) -> Made:
    """With the digests of what was read for it."""
    return _with_digests(recipe, tuple(one.read() for one in by_name(opened)), digests)


def _with_digests(recipe: Recipe, parts: tuple[Ingredient, ...], digests: Digests) -> Made:
    state = None if recipe.state_sha256 is None else sha256_weights(digests.state)
    made = {
        "ingredients": parts,
        "sha256": sha256_weights(digests.weights),
        "state_sha256": state,
        "error": digests.error,
    }
    return recipe.model_copy(update=made), digests.weights | digests.state
