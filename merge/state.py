"""The running state: the exact sums of a soup, kept beside it, so that a change reads the changed.

A state file has the tensors of a weights file, in its order. Floats are sums `sum(p_i theta_i)`, as
the bits of float64 (I64); the few that one float64 does not hold have what is left in a second
file. Both are the only way to write these sums down, so that a state tells as little of its history
as the soup does: what was subtracted again has never been there. Where two float64 do not hold a
sum, there is no state.
"""

from __future__ import annotations

import math
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.exact import units
from atoll.merge.home import Home
from atoll.merge.ingredients import block_name
from atoll.merge.mean import copy_same, named
from atoll.merge.recipe import STATE
from atoll.merge.stream import Out, Rule, save
from atoll.merge.sums import add, divide
from atoll.merge.weights import FORMAT_NAMES, Layout

_REST_SUFFIX = ".rest.safetensors"
_MOST_RESTS = 1 << 20  # of a file; in memory some 100 MB
_MOST_BYTES = 16 * _MOST_RESTS + (1 << 24)  # with a header


def state_name(file: str) -> str:
    """Where the sums of a weights file lie in a soup's folder."""
    return f"{STATE}/{file}"


def rest_name(file: str) -> str:
    """Likewise what is left of them."""
    return f"{STATE}/{file.removesuffix('.safetensors')}{_REST_SUFFIX}"


def state_layouts(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Of the sums of a weights file."""
    integer = FORMAT_NAMES[torch.int64]
    return {
        name: replace(layout, dtype=integer) if layout.torch_dtype in exact.DTYPES else layout
        for name, layout in layouts.items()
    }


@dataclass
class Rests:
    """What float64 sums of a file leave over: by tensor, of element -> units of 2**-149."""

    of: dict[str, dict[int, int]] = field(default_factory=dict)
    _places: dict[str, list[int]] = field(default_factory=dict)  # of those loaded, sorted
    _adding: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, home: Home, file: str) -> Rests:
        """Those of a soup."""
        path, found = home.path / rest_name(file), cls()
        if not path.is_file():
            return found
        if path.stat().st_size > _MOST_BYTES:
            raise Refused(f"{home.place}/{rest_name(file)} is larger than any")
        for name, told in load(home.read(rest_name(file))).items():
            places, bits = told.tolist()
            found._places[name] = places
            found.of[name] = dict(zip(places, map(_whole, bits), strict=True))
        return found

    def save(self, folder: Path | None, file: str, metadata: Mapping[str, str]) -> dict[str, str]:
        """Write them if there are any; the sha256 by file."""
        if not self.of:
            return {}
        tensors = {
            name: torch.tensor([sorted(rests), [_bits(rests[i], name) for i in sorted(rests)]])
            for name, rests in self.of.items()
        }
        layouts = {name: Layout("I64", tuple(told.shape)) for name, told in tensors.items()}
        name = rest_name(file)
        path = None if folder is None else folder / name
        return {name: save(tensors, layouts, Out(path, metadata))}

    def within(self, name: str, first: int, count: int) -> dict[int, int]:
        """Of the elements from `first` on, numbered from there."""
        places = self._places.get(name, [])
        here = places[bisect_left(places, first) : bisect_left(places, first + count)]
        return {i - first: self.of[name][i] for i in here}

    def add(self, name: str, first: int, rests: Mapping[int, int]) -> None:
        """Note those of the elements from `first` on."""
        if not rests:
            return
        with self._adding:
            self.of.setdefault(name, {}).update({first + i: rest for i, rest in rests.items()})
            if sum(map(len, self.of.values())) > _MOST_RESTS:
                raise _no_state(f"tensor '{name}'")


def state_rule(
    file: str,
    names: Sequence[str],
    signed: Callable[[str], Sequence[int]],
    total: Callable[[str], int],
    rests: Rests,
    *,
    before: Rests | None = None,
) -> Rule:
    """Fills a piece of the soup and one of its state, from all ingredients called `names`.

    `signed` and `total` are their weights in a tensor and the sum of the soup's. With the rests of
    the state `before`, that comes first among the values, and only what changed follows.
    """

    def rule(name: str, first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        out, kept = outs
        called = block_name(file, name)
        sums_before, changed = ([], values) if before is None else (values[:1], values[1:])
        told = zip(changed, signed(called), names, strict=True)
        heard = [(value, weight, who) for value, weight, who in told if weight]
        if out.dtype not in exact.DTYPES:
            same = [*sums_before, *(value for value, _, _ in heard)]
            whose = ["the running state"] * len(sums_before) + [who for _, _, who in heard]
            copy_same(file, name, same, whose, out)
            kept.copy_(out)
            return
        for start in range(0, len(out), exact.CHUNK):
            part = slice(start, start + exact.CHUNK)
            sums, left = kept[part].view(torch.float64), dict[int, int]()
            if before is None:
                sums.zero_()
            else:
                sums.copy_(sums_before[0][part].view(torch.float64))
                left = before.within(name, first + start, len(sums))
            for value, weight, who in heard:
                with named(file, name, out.dtype, [who]):
                    add(sums, left, value[part], weight)
            with named(file, name, out.dtype, names):
                divide(sums, left, total(called), out[part])
            rests.add(name, first + start, left)

    return rule


def _no_state(tensor: str) -> Refused:
    return Refused(
        f"The values of {tensor} lie so far apart that there is no running state of their sums",
        cure="make the soup without --state",
    )


def _bits(rest: int, tensor: str) -> int:
    """A rest as a float64's bits; refused where that is not all of it."""
    value = math.ldexp(float(rest), -149)
    if units(value) != rest:
        raise _no_state(f"tensor '{tensor}'")
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _whole(bits: int) -> int:
    return units(struct.unpack("<d", struct.pack("<q", bits))[0])
