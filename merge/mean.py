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
from atoll.merge.weights import DTYPES, Layout

_AVERAGED = {name for name, dtype in DTYPES.items() if dtype in exact.DTYPES}
_FORMAT_NAME = {dtype: name for name, dtype in DTYPES.items()}


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


def mean_rule(recipe: Recipe, file: str, *, without_one: bool = False) -> Rule:
    """The exact mean of a file's tensors, of all ingredients or of all without one.

    Errors name tensor and ingredient.
    """
    names = [part.name for part in recipe.ingredients]

    def rule(name: str, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        weights = recipe.weights(block_name(file, name))
        heard = [index for index, weight in enumerate(weights) if weight]
        if values[0].dtype not in exact.DTYPES:
            _same(tensor_name(file, name), [values[i] for i in heard], [names[i] for i in heard])
            for out in outs:
                out.copy_(values[heard[0]])
            return
        if not without_one:
            _mean(file, name, heard, values, weights, outs[0])
        elif min(weights) > 0:
            with _named(file, name, outs[0].dtype, names):
                exact.leave_one_out(values, weights, outs)
        else:
            for left, out in enumerate(outs):
                others = [index for index in heard if index != left]
                _mean(file, name, others, values, weights, out)

    def _mean(
        file: str,
        name: str,
        heard: Sequence[int],
        values: Sequence[Tensor],
        weights: Sequence[int],
        out: Tensor,
    ) -> None:
        with _named(file, name, out.dtype, [names[i] for i in heard]):
            exact.mean([values[i] for i in heard], [weights[i] for i in heard], out=out)

    return rule


@contextmanager
def _named(file: str, name: str, dtype: torch.dtype, names: Sequence[str]) -> Iterator[None]:
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
    return replace(layouts[0], dtype=_FORMAT_NAME[chosen])


def _same(tensor: str, values: Sequence[Tensor], names: Sequence[str]) -> None:
    for value, other in zip(values, names, strict=True):
        if not torch.equal(value.view(torch.uint8), values[0].view(torch.uint8)):
            raise Refused(
                f"The {_FORMAT_NAME[value.dtype]} {tensor} differs between '{names[0]}' and "
                f"'{other}'",
                allowed="integer tensors that are equal in all ingredients",
                cure="leave one of them out",
            )
