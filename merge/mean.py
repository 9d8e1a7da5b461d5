"""The rule of a soup: a tensor's mean where it holds floats, itself where integers all agree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.ingredients import Opened, tensor_name
from atoll.merge.recipe import Dtype
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


def mean_rule(opened: Sequence[Opened], file: str, *, without_one: bool = False) -> Rule:
    """The exact mean of a file's tensors by the ingredients' weights, or all of those without one.

    Errors name tensor and ingredient.
    """
    names = [one.ingredient.name for one in opened]
    weights = [one.ingredient.weight for one in opened]

    def rule(name: str, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        if values[0].dtype not in exact.DTYPES:
            _same(tensor_name(file, name), values, names)
            for out in outs:
                out.copy_(values[0])
            return
        try:
            if without_one:
                exact.leave_one_out(values, weights, outs)
            else:
                exact.mean(values, weights, out=outs[0])
        except exact.NotFiniteError as error:
            if error.index is None:
                dtype = str(outs[0].dtype)[6:]
                raise Refused(
                    f"The mean of {tensor_name(file, name)} does not fit into {dtype}",
                    cure="leave out --dtype, or choose bfloat16 or float32",
                ) from error
            raise Refused(
                f"'{names[error.index]}' holds NaN or infinity in {tensor_name(file, name)}",
                cure="leave this expert out, and look into its training",
            ) from error

    return rule


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
