"""Opens what goes into a soup, finds the ingredients of an old one again, and refuses strangers.

Averaging is only meaningful among copies of one base that stayed in its linear region (Diffusion
Soup, arXiv 2406.08431), so ingredients must agree in everything but their weights. Experts say in
their card what they are; of what has none, the path gives the name, and the user the base.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.core.denoiser import CARD_NAME, Card, read_card
from atoll.core.digest import sha256_folder
from atoll.core.errors import AtollError, Refused, UsageError
from atoll.core.storage import Storage
from atoll.merge import exact
from atoll.merge.far import Far, Place, is_uri, place_of
from atoll.merge.model import (
    CONFIG_NAME,
    PIPELINE_NAME,
    WEIGHTS_SUFFIX,
    Model,
    model_name,
    open_model,
)
from atoll.merge.recipe import BAKE, RECIPE_NAME, Ingredient, Recipe, check_weight
from atoll.merge.weights import DTYPES, Layout

log = logging.getLogger(__name__)

_CARD_FIELDS = ("family", "prediction", "schedule", "latent_space")


@dataclass(frozen=True)
class Opened:
    """An ingredient, its card if it has one, the base it is a copy of if that is known, its parts.

    The weights are not yet read.
    """

    place: Place
    ingredient: Ingredient
    card: Card | None
    base_sha256: str | None
    model: Model
    far: Far | None = None  # stays as long as this does

    def seen_from(self, soup: Place) -> Opened:
        """The same as an ingredient of a soup that lies elsewhere."""
        path = _relative(self.place, soup)
        return replace(self, ingredient=self.ingredient.model_copy(update={"path": path}))

    def read(self) -> Ingredient:
        """The ingredient with its digest, of an open model; refused if it was another."""
        found = self.model.sha256()
        if self.ingredient.sha256 not in ("", found):
            raise Refused(
                f"The weights of '{self.ingredient.name}' in {self.place} are not those that are "
                f"in the soup, sha256 {self.ingredient.sha256[:16]}...",
                cure="restore the expert from a copy, or name the folder that holds it",
            )
        return self.ingredient.model_copy(update={"sha256": found})


def open_experts(
    experts: Mapping[Place, int],
    soup: Place,
    *,
    base_sha256: str | None = None,
    variant: str | None = None,
    negative: bool = False,
    names: Mapping[Place, str] | None = None,
) -> list[Opened]:
    """Experts by path and integer weight, as ingredients of a soup that lies at `soup`.

    Weights may be `negative` only if that is said. Those without a card are copies of the base of
    that digest, or of an unknown one, and may be given `names` other than their paths'.
    """
    names = names or {}
    for place, name in names.items():
        if place not in experts:
            raise UsageError(f"{place} is named '{name}', and is no expert here")
        if not name or "/" in name or not name.isprintable():
            raise UsageError(f"'{name}' is no name", allowed="such as style-a")
    checked = {
        place: check_weight(weight, str(place), negative=negative)
        for place, weight in experts.items()
    }
    opened = [
        _named(_open(place, weight, soup, base_sha256, variant), names.get(place))
        for place, weight in checked.items()
    ]
    for one in opened:
        if one.card is None:
            told = "its base is unknown" if base_sha256 is None else "its base is as you say"
            log.warning(
                "%s has no %s: it is called %s, and %s",
                one.place, CARD_NAME, one.ingredient.name, told,
            )  # fmt: skip
    return opened


def _named(one: Opened, name: str | None) -> Opened:
    if name is None:
        return one
    if one.card is not None:
        raise UsageError(
            f"{one.place} is called {one.ingredient.name} by its {CARD_NAME}",
            cure="leave out --name for it",
        )
    return replace(one, ingredient=one.ingredient.model_copy(update={"name": name}))


def open_base(place: Place, copy: Opened, variant: str | None = None) -> Opened:
    """The base of an ingredient, refused if it is not like it."""
    opened = replace(_open(place, 1, Path(), None, variant), base_sha256=copy.base_sha256)
    check_alike([opened, copy])
    return opened


def sha256_base(place: Place, variant: str | None = None) -> str:
    """The digest of a base by which its copies are known: of the folder as runs record it.

    Of one without a card only what is averaged and configured counts: a folder from a hub may hold
    the same weights several times over.
    """
    far = Far(str(place)) if is_uri(place) else None
    path = Path(place) if far is None else far.path
    card = _card_of(path)
    with open_model(path, variant, None if far is None else far.read) as model:
        kind = "soup" if model.is_soup else "base" if card is None else card.kind
        if kind != "base":
            raise Refused(
                f"{place} is of kind {kind}, and a base that descends from shards would hide them",
                allowed="what the experts were made from",
            )
        if card is None:
            return model.sha256()
    return sha256_folder(path) if far is None else Storage(str(place)).sha256("")


def find_ingredients(
    recipe: Recipe, soup: Place, *, search: Sequence[Path] = (), leave: Collection[str] = ()
) -> list[Opened]:
    """A soup's ingredients, all but those that `leave`, where the recipe has them or in `search`.

    The digest decides among several of the right name; one alone is refused when it is `read` and
    has other weights. The recorded path stays, wherever the expert was found, so that a soup's
    bytes do not tell of its travels.
    """
    found = []
    for ingredient in recipe.ingredients:
        if ingredient.name in leave:
            continue
        opened = _find(ingredient, recipe, soup, search)
        shard = None if opened.card is None else opened.card.shard
        if shard != ingredient.shard:
            raise Refused(
                f"The recipe of {soup} has '{ingredient.name}' from shard {ingredient.shard}, "
                f"its card says {shard}",
                cure="restore soup.json or the expert from a copy",
            )
        found.append(opened)
    return found


def by_name(opened: Iterable[Opened]) -> list[Opened]:
    """In the order of a recipe."""
    return sorted(opened, key=lambda one: one.ingredient.name)


def check_alike(opened: Sequence[Opened]) -> None:
    """Refuse ingredients that are not all copies of one base with one layout."""
    first = by_name(opened)[0]
    for other in opened:
        pair = f"'{first.ingredient.name}' and '{other.ingredient.name}'"
        if first.base_sha256 != other.base_sha256:
            raise _strangers(pair, "base_sha256", first.base_sha256, other.base_sha256)
        if first.card is not None and other.card is not None:
            for field in _CARD_FIELDS:
                ours, theirs = getattr(first.card, field), getattr(other.card, field)
                if ours != theirs:
                    shown = ["our linear path" if each is None else each for each in (ours, theirs)]
                    raise _strangers(pair, field, *shown)
        if first.model.is_adapter is not other.model.is_adapter:
            raise Refused(
                f"{pair} cannot be averaged, one is of LoRA adapters and the other a model",
                cure="add adapters to their base: --method bake --base BASE",
            )
        _check_texts(pair, first.model, other.model)
        if first.model.is_adapter:
            continue  # of any rank, for any layers; what has to fit shows where they are averaged
        for file in sorted(first.model.weights.keys() | other.model.weights.keys()):
            parts = [model.weights.get(file) for model in (first.model, other.model)]
            layouts = [{} if part is None else part.layout for part in parts]
            for name in sorted(layouts[0].keys() | layouts[1].keys()):
                ours, theirs = (layout.get(name) for layout in layouts)
                if not _alike(ours, theirs):
                    raise _strangers(pair, tensor_name(file, name), ours, theirs)


def body(recipe: Recipe, opened: Sequence[Opened]) -> Opened:
    """The one that the soup is like in all but weights: of adapters that are baked, their base."""
    if recipe.method == BAKE:
        (base,) = (one for one in opened if one.ingredient.name == recipe.base)
        return base
    return by_name(opened)[0]


def check_together(recipe: Recipe, opened: Sequence[Opened]) -> None:
    """Refuse what does not go into one soup by this method."""
    if recipe.method != BAKE:
        check_alike(opened)
        return
    base = body(recipe, opened)
    adapters = [one for one in opened if one is not base]
    for one in opened:
        if one.model.is_adapter is (one is base):
            a = "a" if one is base else "no"
            raise Refused(
                f"'{one.ingredient.name}' is {a} LoRA adapter",
                allowed="LoRA adapters, and a model as their base",
            )
    check_alike(adapters)


def tensor_name(file: str, name: str) -> str:
    """A tensor as messages name it: of a pipeline with its component."""
    component, _, _ = file.rpartition("/")
    return f"tensor '{name}'" + (f" of {component}" if component else "")


def block_name(file: str, name: str) -> str:
    """A tensor as blocks name it: of a pipeline with its component before."""
    component, _, _ = file.rpartition("/")
    return f"{component}.{name}" if component else name


def _check_texts(pair: str, first: Model, other: Model) -> None:
    for name in sorted(first.texts.keys() | other.texts.keys()):
        if name not in first.texts or name not in other.texts:
            there = [name if name in model.texts else None for model in (first, other)]
            raise _strangers(pair, "files", *there)
        ours, theirs = first.config(name), other.config(name)
        if ours is None or theirs is None:
            if first.texts[name] != other.texts[name]:
                raise _strangers(pair, "the content of", name, name)
            continue
        differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if differing:
            key = differing[0]
            raise _strangers(pair, f"{name}: {key}", ours.get(key), theirs.get(key))


def _alike(ours: Layout | None, theirs: Layout | None) -> bool:
    """Of one shape and dtype, or both of dtypes that are averaged."""
    if ours is None or theirs is None:
        return False
    floats = DTYPES[ours.dtype] in exact.DTYPES and DTYPES[theirs.dtype] in exact.DTYPES
    return ours.shape == theirs.shape and (floats or ours.dtype == theirs.dtype)


def _open(
    place: Place, weight: int, soup: Place, base_sha256: str | None, variant: str | None
) -> Opened:
    if "\0" in str(place):
        raise UsageError("A path holds a NUL byte")
    far = Far(str(place)) if is_uri(place) else None
    path = Path(place) if far is None else far.path
    if (path / RECIPE_NAME).is_file():
        raise _soup_of_soups(place)
    card = _card_of(path)
    if card is not None:
        # The base is its own: with it the others' distance from it can be made shorter or longer.
        own = sha256_base(place) if card.kind == "base" else card.base_sha256
        _check_card(card, place, own, base_sha256)
        base_sha256 = own
    model = open_model(path, variant, None if far is None else far.read)
    if model.is_soup:
        raise _soup_of_soups(place)
    ingredient = Ingredient(
        name=model.name if card is None else card.name,
        shard=None if card is None else card.shard,
        weight=weight,
        sha256="",
        path=_relative(place, soup),
    )
    return Opened(place, ingredient, card, base_sha256, model, far)


def _soup_of_soups(place: Place) -> Refused:
    return Refused(
        f"{place} is a soup, and a soup of soups would hide what is in it",
        allowed="experts",
        cure="name its ingredients (`atoll soup show` lists them)",
    )


def _card_of(path: Path) -> Card | None:
    """The card of a folder, or of the expert that a file lies in: its shard stays known."""
    folder = path if path.is_dir() else path.parent
    return read_card(folder) if (folder / CARD_NAME).is_file() else None


def _check_card(card: Card, place: Place, own: str | None, base_sha256: str | None) -> None:
    if own is None:
        raise Refused(
            f"The expert {place} names no base, so nothing says that its weights can be averaged",
            allowed="experts trained from one base",
        )
    if base_sha256 not in (None, own):
        raise Refused(
            f"{place} was trained from another base, sha256 {own[:16]}...",
            allowed="experts trained from one base",
            cure="name its own base, or leave it out",
        )


def _relative(place: Place, soup: Place) -> str:
    """A place from a soup's folder, if both are here or on one store; else itself."""
    if is_uri(soup):
        here, there = _on_store(str(soup)), _on_store(str(place))
        if not is_uri(place):
            return _real(Path(place))
        return posixpath.relpath(there[1], here[1]) if here[0] == there[0] else str(place)
    if is_uri(place):
        return str(place)
    return Path(os.path.relpath(_real(Path(place)), os.path.realpath(soup))).as_posix()


def _on_store(uri: str) -> tuple[str, str]:
    """A URI's store, with its bucket or host, and the path there."""
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{path.partition('/')[0]}", f"/{path.partition('/')[2]}"


def _real(path: Path) -> str:
    """A path that the system walks as its text says; its last part keeps its name."""
    path = Path(os.path.abspath(path))
    return os.path.join(os.path.realpath(path.parent), path.name)


def _find(ingredient: Ingredient, recipe: Recipe, soup: Place, search: Iterable[Path]) -> Opened:
    recorded = located(ingredient, soup)
    candidates = []
    for place in _candidates(ingredient, soup, search):
        try:
            opened = _open(place, ingredient.weight, soup, recipe.base_sha256, recipe.variant)
        except AtollError:
            if not search:
                raise
            continue
        candidates.append(replace(opened, ingredient=ingredient))
    # What a recipe names afar is asked for last, and not at all where it is found here.
    for opened in candidates if is_uri(recorded) else candidates[:-1]:
        with opened.model, suppress(Refused):
            opened.read()
            return opened
    if is_uri(recorded):
        opened = _open(recorded, ingredient.weight, soup, recipe.base_sha256, recipe.variant)
        return replace(opened, ingredient=ingredient)
    if candidates:
        return candidates[-1]
    raise UsageError(
        f"The ingredient '{ingredient.name}' is not at {located(ingredient, soup)}",
        cure="name the folder that holds the experts with --ingredients DIR",
    )


def located(ingredient: Ingredient, soup: Place) -> Place:
    """Where the recipe of a soup has an ingredient."""
    if is_uri(ingredient.path):
        return place_of(ingredient.path)
    if is_uri(soup):
        if os.path.isabs(ingredient.path):
            return Path(ingredient.path)
        store, folder = _on_store(str(soup))
        return store + posixpath.normpath(posixpath.join(folder, ingredient.path))
    return Path(os.path.realpath(soup)) / ingredient.path


def _candidates(ingredient: Ingredient, soup: Place, search: Iterable[Path]) -> Iterator[Path]:
    """What is here and has the ingredient's name: where it was, then all others below `search`."""
    recorded = located(ingredient, soup)
    places = [] if is_uri(recorded) else [Path(recorded)]
    for root in search:
        if not root.is_dir():
            raise UsageError(f"There is no folder {root}")
        found = {root} | {
            file.parent for name in (CARD_NAME, CONFIG_NAME, PIPELINE_NAME)
            for file in root.rglob(name)
        } | set(root.rglob(f"*{WEIGHTS_SUFFIX}"))  # fmt: skip
        places += sorted(found)
    for place in dict.fromkeys(Path(_real(place)) for place in places):
        # Others' folders below the search root may be of any kind, ensembles among them.
        with suppress(AtollError):
            if _is_called(place, ingredient):
                yield place


def _is_called(place: Path, ingredient: Ingredient) -> bool:
    card = _card_of(place) if place.exists() else None
    if card is not None:
        return card.name == ingredient.name and card.kind != "soup"
    # One without a card may have been given another name than that of its path.
    names = (ingredient.name, model_name(Path(ingredient.path)))
    return place.exists() and model_name(place) in names


def _strangers(pair: str, what: str, ours: object, theirs: object) -> Refused:
    return Refused(
        f"{pair} cannot be averaged, they differ in {what}: {ours} and {theirs}",
        allowed="experts trained from one base, with one configuration",
        cure="leave one of them out",
    )
