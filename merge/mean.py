"""The rule of a soup: a tensor's mean where it holds floats, itself where integers all agree."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.ingredients import Opened, block_name, tensor_name
from atoll.merge.recipe import Dtype, Recipe
from atoll.merge.stream import Rule
from atoll.merge.weights import DTYPES, FORMAT_NAMES, Layout

_AVERAGED = {name for name, dtype in DTYPES.items() if dtype in exact.DTYPES}


def mean_layouts(opened: Sequence[Opened], dtype: Dtype) -> dict[str, dict[str, Layout]]:
    """What the mean of ingredients that are alike looks like: tensors by file and name."""
    found = {}
    for file, weights in opened[0].model.weights.items():
        layouts = [one.model.weights[file].layout for one in opened]
        found[file] = {
            name: _mean_layout([layout[name] for layout in layouts], dtype)
            for name in weights.layout
        }
    return found


def mean_rule(recipe: Recipe, file: str, without_one: Sequence[Recipe] | None = None) -> Rule:
    """The exact mean of a file's tensors, by a recipe or by those of its soups without one each.

    Errors name tensor and ingredient.
    """
    names = [part.name for part in recipe.ingredients]

    def rule(name: str, _: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        called = block_name(file, name)
        weights = recipe.weights(called)
        every = [weights] if without_one is None else _of_others(without_one, called, weights)
        if values[0].dtype not in exact.DTYPES:
            for each, out in zip(every, outs, strict=True):
                heard = [index for index, weight in enumerate(each) if weight]
                copy_same(file, name, [values[i] for i in heard], [names[i] for i in heard], out)
            return
        # Each weighs as in the whole, but for the one left out: then one sum does for all.
        left_out = [[*weights[:i], 0, *weights[i + 1 :]] for i in range(len(weights))]
        if without_one is not None and min(weights) > 0 and every == left_out:
            with named(file, name, outs[0].dtype, names):
                exact.leave_one_out(values, weights, outs)
            return
        for each, out in zip(every, outs, strict=True):
            heard = [index for index, weight in enumerate(each) if weight]
            with named(file, name, out.dtype, [names[i] for i in heard]):
                exact.mean([values[i] for i in heard], [each[i] for i in heard], out=out)

    return rule


def _of_others(recipes: Sequence[Recipe], tensor: str, whole: Sequence[int]) -> list[list[int]]:
    """The weights of every soup without one, 0 for the one."""
    found = []
    for left, recipe in enumerate(recipes):
        weights = recipe.weights(tensor)
        assert len(weights) == len(whole) - 1
        found.append([*weights[:left], 0, *weights[left:]])
    return found


@contextmanager
def named(file: str, name: str, dtype: torch.dtype, names: Sequence[str]) -> Iterator[None]:
    """What cannot be averaged, by the names of tensor and ingredient."""
    try:
        yield
    except exact.NotFiniteError as error:
        if error.index is None:
            raise Refused(
                f"The mean of {tensor_name(file, name)} does not fit into {str(dtype)[6:]}",
                cure="leave out --dtype, or choose bfloat16 or float32",
            ) from error
        raise Refused(
            f"'{names[error.index]}' holds NaN or infinity in {tensor_name(file, name)}",
            cure="leave this expert out, and look into its training",
        ) from error


def _mean_layout(layouts: Sequence[Layout], dtype: Dtype) -> Layout:
    if layouts[0].dtype not in _AVERAGED:
        return layouts[0]
    widest = functools.reduce(torch.promote_types, (DTYPES[each.dtype] for each in layouts))
    chosen = widest if dtype == "same" else getattr(torch, dtype)
    return replace(layouts[0], dtype=FORMAT_NAMES[chosen])


def copy_same(
    file: str, name: str, values: Sequence[Tensor], names: Sequence[str], out: Tensor
) -> None:
    """What is no float is in a soup as all have it, or there is none."""
    for value, other in zip(values, names, strict=True):
        if not torch.equal(value.view(torch.uint8), values[0].view(torch.uint8)):
            raise Refused(
                f"The {FORMAT_NAMES[value.dtype]} {tensor_name(file, name)} differs between "
                f"'{names[0]}' and '{other}'",
                allowed="integer tensors that are equal in all ingredients",
                cure="leave one of them out",
            )
    out.copy_(values[0])
