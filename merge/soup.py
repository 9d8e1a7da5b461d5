"""A soup: the correctly rounded integer-weighted mean of experts, and a recipe to redo it.

Reads expert folders, writes a soup folder: `config.json`, weights, `atoll.json`, `soup.json`. Every
change computes the mean anew from the ingredients and replaces the folder whole, so nothing of an
ingredient that left can remain, and a soup depends on what is in it and on nothing else.
Diffusion Soup, arXiv 2406.08431; cached sums leak what was deleted, arXiv 2210.08911.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from atoll.core.denoiser import CARD_NAME, Card, read_card
from atoll.core.disk import no_space_is_failure, recover, replacing
from atoll.core.errors import Refused, UsageError
from atoll.core.storage import canonical_json
from atoll.merge.ingredients import CONFIG_NAME, Opened, check_alike, find_ingredients, open_experts
from atoll.merge.mean import mean_layouts, mean_rule
from atoll.merge.recipe import RECIPE_NAME, Dtype, Recipe
from atoll.merge.stream import Out, stream
from atoll.merge.weights import WEIGHTS_NAME


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
        there = _taken(out)
        # What can be told before all is read, and then the rest.
        _check_same(out, there, recipe, read=False)
        made = _make(recipe, opened, partial, out)
        _check_same(out, there, made.recipe, read=True)
        return made


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


def leave_one_out(
    out: Path, experts: Mapping[Path, int], *, dtype: Dtype = "same"
) -> dict[str, Soup]:
    """Every soup of all experts but one, at `out/without-NAME`, by the name of the one left out.

    Each is bitwise what `create` makes of the others there; the experts are read once for all.
    """
    opened = sorted(open_experts(experts, out), key=lambda one: one.ingredient.name)
    if len(opened) < 2:
        raise UsageError("Without one expert there has to be another", cure="name two or more")
    _recipe(opened, dtype)
    layouts = mean_layouts(opened, dtype)
    if dtype == "same" and any(one.weights.layout != layouts for one in opened):
        raise Refused(
            "The experts are in several dtypes, so that the soups would be",
            cure="choose one for all: --dtype float32, bfloat16 or float16",
        )
    left_out = {one.ingredient.name: out / f"without-{_file_name(one)}" for one in opened}
    with no_space_is_failure(out.name), ExitStack() as closing:
        partials = [closing.enter_context(replacing(s, alone=True)) for s in left_out.values()]
        there = [_taken(soup) for soup in left_out.values()]
        others = [
            [one.seen_from(soup) for one in opened if one.ingredient.name != name]
            for name, soup in left_out.items()
        ]
        recipes = [_recipe(each, dtype) for each in others]
        for soup, earlier, recipe in zip(left_out.values(), there, recipes, strict=True):
            _check_same(soup, earlier, recipe, read=False)
        with ExitStack() as reading:
            weights = [reading.enter_context(one.weights) for one in opened]
            outs = [
                Out(partial / WEIGHTS_NAME, recipe.metadata)
                for partial, recipe in zip(partials, recipes, strict=True)
            ]
            digests = stream(weights, layouts, mean_rule(opened, without_one=True), outs=outs)
            recipes = [
                _read(recipe, each, digest)
                for recipe, each, digest in zip(recipes, others, digests, strict=True)
            ]
        made = {}
        for number, (name, soup) in enumerate(left_out.items()):
            _check_same(soup, there[number], recipes[number], read=True)
            made[name] = _fill(partials[number], recipes[number], others[number], soup)
        return made


def show(soup: Path) -> Soup:
    """Read a soup's card and recipe."""
    recipe = Recipe.load(soup)
    return Soup(soup, read_card(soup), recipe)


def mean_file(recipe: Recipe, opened: Sequence[Opened], *, out: Path | None = None) -> Recipe:
    """Write the soup's weights to `out`, or to nowhere; the recipe with all digests as they are.

    Of every tensor only a piece of each ingredient is in memory.
    """
    opened = sorted(opened, key=lambda one: one.ingredient.name)
    layouts, rule = mean_layouts(opened, recipe.dtype), mean_rule(opened)
    with ExitStack() as closing:
        weights = [closing.enter_context(one.weights) for one in opened]
        (digest,) = stream(weights, layouts, rule, outs=[Out(out, recipe.metadata)])
        return _read(recipe, opened, digest)


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


def _taken(out: Path) -> Recipe | None:
    """The recipe of the soup that lies there; refused where something else does."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECIPE_NAME).is_file():
        raise Refused(f"{out} is not empty and holds no soup", cure="name another OUT")
    return Recipe.load(out)


def _check_same(out: Path, there: Recipe | None, recipe: Recipe, *, read: bool) -> None:
    """Refuse to write over anything but the same soup; before it is `read`, without digests."""
    if there is not None and there.asked(digests=read) != recipe.asked(digests=read):
        raise Refused(
            f"There is another soup at {out}",
            cure="change it with `atoll soup add` and `atoll soup remove`, or name another OUT",
        )


def _make(recipe: Recipe, opened: Sequence[Opened], partial: Path, soup: Path) -> Soup:
    """Fill the folder `partial`, which will lie at `soup`."""
    return _fill(partial, mean_file(recipe, opened, out=partial / WEIGHTS_NAME), opened, soup)


def _read(recipe: Recipe, opened: Sequence[Opened], digest: str) -> Recipe:
    """The recipe with the digests of what came and of what was read for it."""
    ingredients = tuple(one.read() for one in opened)
    return recipe.model_copy(update={"ingredients": ingredients, "sha256": digest})


def _fill(partial: Path, recipe: Recipe, opened: Sequence[Opened], soup: Path) -> Soup:
    """Write what lies beside the weights."""
    for name, content in small_files(recipe, opened).items():
        (partial / name).write_bytes(content)
    return Soup(soup, read_card(partial), recipe)


def _file_name(one: Opened) -> str:
    name = one.ingredient.name
    if "/" in name or "\0" in name:
        raise Refused(
            f"The expert {one.folder} is named {name!r}, and no folder can be",
            cure="rename it in its atoll.json",
        )
    return name
