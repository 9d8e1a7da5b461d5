"""A soup: the correctly rounded integer-weighted mean of experts, and a recipe to redo it.

Reads experts, which are folders of runs, diffusers components, pipelines or files of others. Writes
a soup's folder: averaged weights, all else as the ingredients have it, `atoll.json` if they have
cards, and `soup.json`. Every change computes the mean anew from the ingredients, or from sums that
are exact and so the same, and replaces the folder whole: nothing of an ingredient that left can
remain, and a soup depends on what is in it and on nothing else.
Diffusion Soup, arXiv 2406.08431; cached sums leak what was deleted, arXiv 2210.08911.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from atoll.core.denoiser import CARD_NAME, NETWORK_CONFIG, Card
from atoll.core.disk import no_space_is_failure
from atoll.core.errors import AtollError, Refused, UsageError
from atoll.merge.averages import Change, Made, averaged, updated
from atoll.merge.far import Place, below
from atoll.merge.home import Claim, Home, recovered, replacing_home
from atoll.merge.ingredients import (
    Opened,
    block_name,
    body,
    by_name,
    check_together,
    find_ingredients,
    open_experts,
    sha256_base,
)
from atoll.merge.mean import mean_layouts
from atoll.merge.plan import Plan, plan_change
from atoll.merge.recipe import (
    BAKE,
    MOVES,
    RECIPE_NAME,
    STATE,
    Block,
    Recipe,
    Settings,
    check_blocks,
    in_order,
)
from atoll.merge.stock import stock_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Soup:
    """A soup: where it lies, its recipe, and its card unless it is of strangers' models."""

    place: Place
    card: Card | None
    recipe: Recipe
    plan: Plan | None = None  # of how it was made just now
    # By file, if it was made just now.
    digests: Mapping[str, str] = field(default_factory=dict, compare=False)


def prepare(
    out: Place,
    experts: Mapping[Place, int],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    base: Place | None = None,
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
) -> tuple[list[Opened], Recipe]:
    """The ingredients of a soup in the order of its recipe, and the recipe, without digests.

    All is checked that can be told from headers and configurations.
    """
    settings, own = settings.resolved(), None
    if settings.method != "mean":
        if base is None:
            raise UsageError(f"{settings.method} needs the base", cure="name it: --base PATH")
        if base in experts:
            raise UsageError(
                f"{base} is the base, which has no weight", cure="leave it out of the experts"
            )
        experts = {**experts, base: 1}
    opened = by_name(
        open_experts(
            experts, out, base_sha256=None if base is None else sha256_base(base, settings.variant),
            variant=settings.variant, negative=negative, names=names,
        )
    )  # fmt: skip
    called = {one.ingredient.name for one in opened}
    check_blocks(settings.blocks, called, negative=negative)
    if settings.method != "mean":
        (own,) = (one.ingredient.name for one in opened if one.place == base)
    return opened, _recipe(opened, settings, base=own)


def create(
    out: Place,
    experts: Mapping[Place, int],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    base: Place | None = None,
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
    claim: Claim | None = None,
) -> Soup:
    """Average experts, given by path and integer weight, into a soup at `out`.

    `base` is what those without a card are copies of, and what methods other than the mean need.
    `negative` weights are refused unless it is said that they are meant (task arithmetic,
    arXiv 2212.04089); `names` are for experts without a card; `claim` is told of a soup elsewhere
    before any of it is put there. The same command again makes the same
    soup again; anything else that lies at `out` is refused.
    """
    opened, recipe = prepare(out, experts, settings, base=base, negative=negative, names=names)
    with no_space_is_failure(str(out)), replacing_home(out, claim) as (home, partial):
        there = _taken(home)
        # What can be told before all is read, and then the rest.
        _check_same(out, there, recipe, read=False)
        made = _make(recipe, opened, partial, home)
        _check_same(out, there, made.recipe, read=True)
        return made


def add(
    soup: Place,
    experts: Mapping[Place, int],
    *,
    search: Sequence[Path] = (),
    base: Place | None = None,
    blocks: Sequence[Block] = (),
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
    claim: Claim | None = None,
) -> Soup:
    """Make the soup anew with further experts; `search` holds ingredients that have moved."""
    with _changing(soup, claim) as (home, partial, recipe):
        opened = find_ingredients(recipe, soup, search=search)
        base_sha256 = None if base is None else sha256_base(base, recipe.variant)
        if base is None and recipe.method != "mean":
            base_sha256 = recipe.base_sha256  # what is added is added to the base that is there
        added = open_experts(
            experts, soup, base_sha256=base_sha256, variant=recipe.variant, negative=negative,
            names=names,
        )  # fmt: skip
        check_blocks(blocks, {one.ingredient.name for one in added}, negative=negative)
        opened += added
        made = _again(recipe, opened, [*recipe.blocks_without(()), *blocks])
        changes = [Change(one, 1, made) for one in added]
        return _make(made, opened, partial, home, before=recipe, changes=changes)


def remove(soup: Place, name: str, *, search: Sequence[Path] = ()) -> Soup:
    """Make the soup anew without the ingredient of that name, or of that shard.

    The ingredient itself need not exist any more. The last one is refused.
    """
    recovered(soup)
    return remove_all(soup, [Home(soup).recipe().named(name).name], search=search)


def remove_all(soup: Place, leaving: Collection[str], *, search: Sequence[Path] = ()) -> Soup:
    """Likewise without several, by their names, at once: on the way there may be no mean."""
    with _changing(soup) as (home, partial, recipe):
        (leave, *_) = leaving
        if not {part.name for part in recipe.ingredients} - {*leaving, recipe.base}:
            raise Refused(
                f"'{leave}' is the last ingredient of {soup}",
                cure="delete the folder to be rid of the soup",
            )
        if recipe.method != "mean" and recipe.base in leaving:
            raise Refused(
                f"'{recipe.base}' is the base, without which {recipe.method} is none",
                cure="make another soup of the experts",
            )
        opened = find_ingredients(recipe, soup, search=search, leave=leaving)
        made = _again(recipe, opened, recipe.blocks_without(leaving))
        changes = None
        if recipe.state_sha256 is not None:
            stay = {part.name for part in made.ingredients}
            with suppress(AtollError, OSError):  # which need not be there any more, nor its store
                left = find_ingredients(recipe, soup, search=search, leave=stay)
                changes = [Change(one, -1, recipe) for one in left]
        return _make(made, opened, partial, home, before=recipe, changes=changes)


def leave_one_out(
    out: Place,
    experts: Mapping[Place, int],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    base: Place | None = None,
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
    claim: Claim | None = None,
) -> dict[str, Soup]:
    """Every soup of all experts but one, at `out/without-NAME`, by the name of the one left out.

    Each is bitwise what `create` makes of the others there; the experts are read once for all.
    """
    if settings.method != "mean" or settings.state:
        raise UsageError(
            "Leaving out one at a time is for plain means, and keeps no running state",
            cure="make the soup, and take out one with `atoll soup remove`",
        )
    opened, whole = prepare(out, experts, settings, base=base, negative=negative, names=names)
    if len(opened) < 2:
        raise UsageError("Without one expert there has to be another", cure="name two or more")
    adapters = opened[0].model.is_adapter
    layouts = {} if adapters else mean_layouts(opened, settings.dtype)
    if (
        settings.dtype == "same"
        and not adapters
        and any(
            weights.layout != layouts[file]
            for one in opened
            for file, weights in one.model.weights.items()
        )
    ):
        raise Refused(
            "The experts are in several dtypes, so that the soups would be",
            cure="choose one for all: --dtype float32, bfloat16 or float16",
        )
    left_out = {one.ingredient.name: below(out, f"without-{_file_name(one)}") for one in opened}
    with no_space_is_failure(str(out)), ExitStack() as closing:
        held = [closing.enter_context(replacing_home(soup, claim)) for soup in left_out.values()]
        partials = [partial for _, partial in held]
        there = [_taken(home) for home, _ in held]
        others = [
            [one.seen_from(soup) for one in opened if one.ingredient.name != name]
            for name, soup in left_out.items()
        ]
        recipes = [
            _recipe(each, whole.settings(whole.blocks_without([name])))
            for name, each in zip(left_out, others, strict=True)
        ]
        for soup, earlier, recipe in zip(left_out.values(), there, recipes, strict=True):
            _check_same(soup, earlier, recipe, read=False)
        written = averaged(whole, recipes, others, opened, partials)
        made = {}
        for number, (name, soup) in enumerate(left_out.items()):
            _check_same(soup, there[number], written[number][0], read=True)
            made[name] = _fill(partials[number], written[number], others[number], soup)
        return made


def show(soup: Place) -> Soup:
    """Read a soup's card and recipe."""
    home = Home(soup)
    return Soup(soup, recipe=home.recipe(), card=home.card())


def small_files(recipe: Recipe, opened: Iterable[Opened]) -> dict[str, bytes]:
    """The content of everything in a soup's folder but the weights, by file name."""
    opened = by_name(opened)
    model = body(recipe, opened).model
    files = {name: model.written(name) for name in model.texts}
    files[RECIPE_NAME] = recipe.to_bytes()
    cards = [one.card for one in opened if one.card is not None]
    whole = NETWORK_CONFIG in files  # and no single file of one
    if whole and len(cards) == len(opened):  # of the base's images nobody learnt anything further
        card = cards[0].model_copy(
            update={
                "name": recipe.name,
                "kind": "soup",
                "shard": None,
                "images_seen": sum(each.images_seen for each in cards if each.kind == "expert"),
            }
        )
        files[CARD_NAME] = card.to_bytes()
    return files


@contextmanager
def _changing(soup: Place, claim: Claim | None = None) -> Iterator[tuple[Home, Path, Recipe]]:
    """The soup as it stands while nobody else may change it, the folder to fill, and the recipe."""
    recovered(soup)
    Home(soup).recipe()  # before anything is written beside it
    with no_space_is_failure(str(soup)), replacing_home(soup, claim) as (home, partial):
        yield home, partial, home.recipe()


def _again(recipe: Recipe, opened: Sequence[Opened], blocks: Iterable[Block]) -> Recipe:
    """The recipe of a soup that has changed."""
    base = None if recipe.method == "mean" else recipe.base
    return _recipe(opened, recipe.settings(blocks), base=base)


def _recipe(opened: Sequence[Opened], settings: Settings, *, base: str | None = None) -> Recipe:
    base = base_among(opened) if base is None else base
    experts = [one for one in opened if one.ingredient.name != base]
    if not experts:
        if opened and settings.method == "mean":
            raise Refused(f"{opened[0].place} is a base", allowed="experts, and a base beside them")
        raise UsageError("A soup needs at least one expert", cure="name one: EXPERT[=WEIGHT]")
    recipe = Recipe.of(
        [one.ingredient for one in opened],
        settings,
        base_sha256=opened[0].base_sha256,
        base=base,
    )
    check_together(recipe, opened)
    model = body(recipe, opened).model
    tensors = [
        block_name(file, name) for file, weights in model.weights.items() for name in weights.layout
    ]
    for block in recipe.blocks:
        if not fnmatch.filter(tensors, block.tensors):
            heads = sorted({name.partition(".")[0] for name in tensors})
            raise UsageError(
                f"No tensor is in the block {block.tensors}",
                allowed=", ".join(f"{head}.*" for head in heads),
            )
    if recipe.rank is not None and not model.is_adapter:
        raise UsageError("A rank is for adapters", cure="leave out --rank")
    if model.is_adapter and (recipe.method in MOVES or settings.state):
        what = "A running state" if settings.state else recipe.method
        raise Refused(f"{what} is not for adapters", allowed="models")
    if recipe.method != "model-stock":
        return recipe
    if recipe.blocks or any(part.weight != 1 for part in recipe.ingredients):
        raise UsageError(
            f"{recipe.method} finds the weights itself",
            cure="leave out weights and blocks, or the method",
        )
    return recipe.model_copy(update={"blocks": stock_blocks_of(recipe, opened)})


def base_among(opened: Sequence[Opened]) -> str | None:
    """The ingredient whose card says that it is the base."""
    bases = [one for one in opened if one.card is not None and one.card.kind == "base"]
    return bases[0].ingredient.name if bases else None


def stock_blocks_of(recipe: Recipe, opened: Sequence[Opened]) -> tuple[Block, ...]:
    """The weights that Model Stock finds for every tensor."""
    if opened[0].model.is_adapter:
        raise Refused(f"{recipe.method} is not for adapters", allowed="models")
    (base,) = (one for one in opened if one.ingredient.name == recipe.base)
    experts = [one for one in by_name(opened) if one is not base]
    return in_order(stock_blocks(experts, base))


def _taken(home: Home) -> Recipe | None:
    """The recipe of the soup that lies there; refused where something else does."""
    if home.is_empty:
        return None
    if not (home.path / RECIPE_NAME).is_file():
        raise Refused(f"{home.place} is not empty and holds no soup", cure="name another OUT")
    return home.recipe()


def _check_same(out: Place, there: Recipe | None, recipe: Recipe, *, read: bool) -> None:
    """Refuse to write over anything but the same soup; before it is `read`, without digests."""
    if there is not None and there.asked(digests=read) != recipe.asked(digests=read):
        raise Refused(
            f"There is another soup at {out}",
            cure="change it with `atoll soup add` and `atoll soup remove`, or name another OUT",
        )


def _make(
    recipe: Recipe,
    opened: Sequence[Opened],
    partial: Path,
    home: Home,
    *,
    before: Recipe | None = None,
    changes: Sequence[Change] | None = None,
) -> Soup:
    """Fill the folder `partial`, which becomes the soup; from its state if that reads less."""
    if opened[0].model.is_adapter or recipe.method == BAKE:
        return _fill(partial, _anew(recipe, opened, partial), opened, home.place)
    plan = plan_change(home, before, recipe, opened, changes)
    if plan.from_state and before is not None and before.state_sha256 and changes:
        try:
            made = updated(
                recipe, opened, changes, partial, home=home, state_sha256=before.state_sha256
            )
            return replace(_fill(partial, made, opened, home.place), plan=plan)
        except Exception as error:
            # Whatever a damaged state or a store that is away makes of it: nothing is lost but
            # time, and if an ingredient that stays is to blame, that is said now.
            log.warning(
                "The running state is of no use (%s: %s); the soup is made anew from its "
                "ingredients", type(error).__name__, error,
            )  # fmt: skip
            shutil.rmtree(partial / STATE, ignore_errors=True)
            plan = plan_change(home, None, recipe, opened, None)
    return replace(_fill(partial, _anew(recipe, opened, partial), opened, home.place), plan=plan)


def _anew(recipe: Recipe, opened: Sequence[Opened], partial: Path) -> Made:
    (made,) = averaged(recipe, [recipe], [opened], by_name(opened), [partial])
    return made


def _fill(partial: Path, made: Made, opened: Sequence[Opened], soup: Place) -> Soup:
    """Write what lies beside the weights."""
    recipe, digests = made
    for name, content in small_files(recipe, opened).items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return Soup(soup, Home(partial).card(), recipe, digests=digests)


def _file_name(one: Opened) -> str:
    name = one.ingredient.name
    if "/" in name or "\0" in name:
        raise Refused(
            f"The expert {one.place} is named {name!r}, and no folder can be",
            cure="rename it in its atoll.json",
        )
    return name
