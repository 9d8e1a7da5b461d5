"""Inner products of how models differ from the first of them, tensor by tensor, in one reading."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.ingredients import block_name, tensor_name
from atoll.merge.model import Model
from atoll.merge.stream import stream

_CHUNK = 1 << 16  # elements at a time, in float64


@dataclass(frozen=True)
class Gram:
    """Of one tensor; float64."""

    elements: int
    moves: Tensor  # (models - 1, models - 1), of the differences to the first
    squares: Tensor  # (models,), of the tensors themselves


def grams(models: Sequence[Model]) -> dict[str, Gram]:
    """Of every tensor of floats, by the name that blocks have for it, of models that are alike."""
    moves: defaultdict[str, list[Tensor]] = defaultdict(list)
    squares: defaultdict[str, list[Tensor]] = defaultdict(list)
    found = {}
    adding = threading.Lock()
    with ExitStack() as closing:
        for model in models:
            closing.enter_context(model)
        for file in models[0].weights:
            sources = [model.weights[file] for model in models]
            layouts = {
                name: layout
                for name, layout in sources[0].layout.items()
                if layout.torch_dtype in exact.DTYPES
            }

            def look(
                name: str,
                _: int,
                values: Sequence[Tensor],
                __: Sequence[Tensor],
                file: str = file,
            ) -> None:
                called = block_name(file, name)
                # Of differences: inner products of the weights themselves would lose them.
                for start in range(0, len(values[0]), _CHUNK):
                    wide = torch.stack([value[start : start + _CHUNK].double() for value in values])
                    moved = wide[1:] - wide[0]
                    with adding:
                        moves[called].append(moved @ moved.T)
                        squares[called].append(wide.square().sum(dim=1))

            stream(sources, layouts, look, outs=[], what=f"comparing {file}")
            for name, layout in layouts.items():
                called = block_name(file, name)
                sides = len(models) - 1, len(models)
                found[called] = Gram(
                    layout.count,
                    _total(moves.pop(called, [torch.zeros(sides[0], sides[0])])),
                    _total(squares.pop(called, [torch.zeros(sides[1])])),
                )
                for model, square in zip(models, found[called].squares.tolist(), strict=True):
                    if not math.isfinite(square):
                        raise Refused(
                            f"'{model.name}' holds NaN or infinity in {tensor_name(file, name)}",
                            cure="leave this expert out, and look into its training",
                        )
        for model in models:
            model.sha256()  # what is read again later has to be the same
    return found


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum, rounded once, so that it is the same whichever thread was the faster one."""
    flat = torch.stack(list(parts)).flatten(1).T.tolist()
    sums = [math.fsum(each) if all(map(math.isfinite, each)) else math.nan for each in flat]
    return torch.tensor(sums, dtype=torch.float64).view_as(parts[0])
