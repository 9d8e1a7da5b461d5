"""How a soup that keeps its running state is changed: from the state, or anew; what moves less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.core.errors import AtollError
from atoll.merge import exact
from atoll.merge.averages import Change
from atoll.merge.home import Home
from atoll.merge.ingredients import Opened, block_name
from atoll.merge.mean import mean_layouts
from atoll.merge.recipe import Recipe
from atoll.merge.state import state_layouts
from atoll.merge.weights import Layout


@dataclass(frozen=True)
class Plan:
    """What is read and written of weights and state, in bytes, on the way that is taken."""

    from_state: bool
    read_bytes: int
    written_bytes: int


def plan_change(
    home: Home,
    before: Recipe | None,
    recipe: Recipe,
    opened: Sequence[Opened],
    changes: Sequence[Change] | None,
) -> Plan:
    """Choose for a soup of all that was `opened`; None of what is not known or not there.

    The state of the one at `home` is of use where all others count as they did. Both ways write the
    same.
    """
    files = mean_layouts(opened, recipe.dtype).values()
    made, state = sum(map(_bytes, files)), 0
    if recipe.state_sha256 is not None:
        state = sum(_bytes(state_layouts(layouts)) for layouts in files)
    anew = Plan(False, _of(opened), made + state)
    if before is None or before.state_sha256 is None or not changes:
        return anew
    if not _count_as_before(before, recipe, opened[0]):
        return anew
    if recipe.dtype == "same" and not _dtypes_stay(home, opened, changes):
        return anew
    read = state + _of([change.opened for change in changes])
    return Plan(True, read, anew.written_bytes) if read < anew.read_bytes else anew


def _count_as_before(before: Recipe, recipe: Recipe, one: Opened) -> bool:
    """Whether those that are in both soups have the same weights in every tensor."""
    stay = {part.name for part in before.ingredients} & {part.name for part in recipe.ingredients}

    def told(soup: Recipe, tensor: str) -> dict[str, int]:
        parts = zip(soup.ingredients, soup.weights(tensor), strict=True)
        return {part.name: weight for part, weight in parts if part.name in stay}

    if before.blocks or recipe.blocks:
        tensors = [
            block_name(file, name)
            for file, weights in one.model.weights.items()
            for name, layout in weights.layout.items()
            if layout.torch_dtype in exact.DTYPES
        ]
    else:
        tensors = [""]
    return all(told(before, tensor) == told(recipe, tensor) for tensor in tensors)


def _dtypes_stay(home: Home, opened: Sequence[Opened], changes: Sequence[Change]) -> bool:
    """Whether all that stay have the soup's dtypes.

    They are not read, so that nothing says that their headers are those of before; a soup in the
    ingredients' dtype must not follow another.
    """
    changed = [change.opened for change in changes]
    for file in opened[0].model.weights:
        try:
            made = home.weights(file).layout
        except (AtollError, OSError):
            return False
        if any(one.model.weights[file].layout != made for one in opened if one not in changed):
            return False
    return True


def _of(opened: Sequence[Opened]) -> int:
    return sum(_bytes(weights.layout) for one in opened for weights in one.model.weights.values())


def _bytes(layouts: Mapping[str, Layout]) -> int:
    return sum(layout.bytes for layout in layouts.values())
