"""Adapters added to their base: `W + scale * sum(p_i s_i B_i A_i) / sum(p_i)`, rounded once.

With `p_i` the weights and `s_i` the adapters' own scales (`lora.py`). As in any soup an element is
the exact value of that, correctly rounded, and so the same for any order, processor or library of
linear algebra: it is computed in float64, whose error is bounded (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 3.1: for a dot product of n terms in any order by
`n u / (1 - n u) sum |x_k| |y_k|`, and that sum, by Cauchy and Schwarz, by the norms' product), and
where the bounds on either side round to two values the element is computed in fractions. These
are few (docs/LOG.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.ingredients import block_name
from atoll.merge.lora import Adapter, read_half
from atoll.merge.mean import named
from atoll.merge.original import original_names
from atoll.merge.recipe import Recipe
from atoll.merge.stream import Rule
from atoll.merge.weights import Layout

_AT_ONCE = 1 << 18  # elements, with some ten float64 each
_KEPT = 2  # layers whose factors are in memory
_MOST_FACTOR = 2.0**64  # far from what products of float32 overflow with
_UNIT = 2.0**-53  # of float64's rounding
# Beside the dot product's: factor and quotient of B, the base, and what norms lose; then doubled.
_MORE_TERMS = 8
# What kohya calls the networks that diffusers calls so; a network by itself has no name.
_KOHYA = {
    "": ("lora_unet", "lora_transformer"),
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer", "lora_unet"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
_TEXT = "text_model."
_WEIGHT = ".weight"
_ALONE = ("", "unet.", "transformer.")


@dataclass(frozen=True)
class Layer:
    """What is added to one tensor, flattened to `(outputs, inputs)`."""

    parts: tuple[tuple[Fraction, Tensor, Tensor], ...]  # times B `(outputs, rank)`, A

    @functools.cached_property
    def up(self) -> Tensor:
        """All B side by side, each times its factor, which is rounded."""
        return torch.cat([up.double() * float(factor) for factor, up, _ in self.parts], dim=1)

    @functools.cached_property
    def down(self) -> Tensor:
        """All A, one below the other."""
        return torch.cat([down for _, _, down in self.parts]).double()

    @functools.cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Of the rows of B and the columns of A."""
        return self.up.norm(dim=1), self.down.norm(dim=0)

    @functools.cached_property
    def live(self) -> tuple[Tensor, Tensor]:
        """Which rows of B and columns of A are not all 0: where one is, nothing is added."""
        rows = torch.stack([up.any(dim=1) for _, up, _ in self.parts]).any(dim=0)
        return rows, self.down.any(dim=0)

    def element(self, row: int, column: int) -> Fraction:
        """The exact sum."""
        total = Fraction(0)
        for factor, up, down in self.parts:
            pairs = zip(up[row].tolist(), down[:, column].tolist(), strict=True)
            total += factor * sum((Fraction(b) * Fraction(a) for b, a in pairs), Fraction(0))
        return total


def tensors_of_layers(
    layouts: Mapping[str, Mapping[str, Layout]], stems: Iterable[str], base: str
) -> dict[tuple[str, str], str]:
    """Which layer of adapters is added to which tensor, by its file and name.

    `layouts` are the base's. Refused where a layer is nowhere: it would be lost in silence.
    """
    left, found = set(stems), dict[tuple[str, str], str]()
    taken = dict[str, str]()
    for file, tensors in layouts.items():
        component = file.rpartition("/")[0]
        modules = {name.removesuffix(_WEIGHT): name for name in tensors if name.endswith(_WEIGHT)}
        original = original_names(modules)
        for module, name in modules.items():
            layout = tensors[name]
            for stem in left.intersection(_names(component, module, original.get(module))):
                if (file, name) in found:
                    raise Refused(f"{found[file, name]} and {stem} are both {module} of '{base}'")
                if stem in taken:
                    raise Refused(f"{stem} may be {taken[stem]} or {module} of '{base}'")
                if layout.torch_dtype not in exact.DTYPES:
                    raise Refused(f"{stem} is {module} of '{base}', which is {layout.dtype}")
                found[file, name], taken[stem] = stem, module
    if missing := sorted(left - taken.keys()):
        raise Refused(
            f"The layer {missing[0]} of the adapters is nowhere in '{base}'",
            allowed="adapters of this base, in diffusers' names of its layers",
            cure="name the base that they were made for, of a pipeline the whole of it",
        )
    return found


def _names(component: str, module: str, original: str | None) -> Iterator[str]:
    """What adapters may call a module of a component, or of a network by itself."""
    prefixes = [f"{component}."] if component else list(_ALONE)
    # Some versions of transformers write a text encoder's names without this, some with it.
    kohya = _KOHYA.get(component, ())
    for name in (module, f"{_TEXT}{module}", module.removeprefix(_TEXT)):
        yield from (f"{prefix}{name}" for prefix in prefixes)
        yield from (f"{prefix}_{name}".replace(".", "_") for prefix in kohya)
    if original is not None:
        yield from (f"{prefix}_{original}".replace(".", "_") for prefix in kohya)


def bake_rule(
    recipe: Recipe,
    file: str,
    layouts: Mapping[str, Layout],
    adapters: Mapping[str, Adapter],
    tensors: Mapping[str, str],
) -> Rule:
    """The rule of a file of the base: `tensors` are layers by the tensor that they are added to.

    `layouts` are the file's, and `adapters`, by the name of the ingredient, are open.
    """

    @functools.lru_cache(maxsize=_KEPT)
    def layer_of(name: str) -> Layer | None:
        called = block_name(file, name)
        return _layer(recipe, called, tensors[name], adapters, layouts[name].shape)

    def rule(name: str, first: int, values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        (value,), (out,) = values, outs
        if value.dtype not in exact.DTYPES:
            out.copy_(value)
            return
        layer = layer_of(name) if name in tensors else None
        with named(file, name, out.dtype, [str(recipe.base)]):
            if layer is None:
                exact.mean([value], [1], out=out)
                return
            _add(value, layer, first, out)

    return rule


def _layer(
    recipe: Recipe,
    called: str,
    stem: str,
    adapters: Mapping[str, Adapter],
    shape: tuple[int, ...],
) -> Layer | None:
    """What the adapters add to a tensor; None where nothing."""
    weights = dict(zip((p.name for p in recipe.ingredients), recipe.weights(called), strict=True))
    total, scale = sum(weights[name] for name in adapters), Fraction(str(recipe.scale))
    parts = []
    for name, adapter in adapters.items():
        module = adapter.modules.get(stem)
        if module is None or not weights[name]:
            continue
        down, up = (read_half(adapter.weights, each) for each in (module.down, module.up))
        wide = down.shape[1:].numel() == math.prod(shape[1:])
        if len(shape) < 2 or up.shape[0] != shape[0] or not wide or up.shape[2:].numel() != 1:
            raise Refused(
                f"{stem} of '{name}' does not fit: A is {tuple(down.shape)}, B {tuple(up.shape)}, "
                f"and {called} {shape}",
                allowed="adapters of this base",
            )
        for half in (down, up):
            if not bool(torch.isfinite(half).all()):
                raise Refused(
                    f"'{name}' holds NaN or infinity in {stem}", cure="leave this adapter out"
                )
        factor = scale * module.scale * weights[name] / total
        if not abs(factor) < _MOST_FACTOR:
            raise Refused(
                f"'{name}' would be scaled beyond all reason in {stem}",
                allowed=f"alphas below {_MOST_FACTOR:.0g} times the rank",
            )
        parts.append((factor, up.flatten(1), down.flatten(1)))
    return Layer(tuple(parts)) if parts else None


def _add(value: Tensor, layer: Layer, first: int, out: Tensor) -> None:
    """A piece of a tensor, flattened, from its element `first` on, with what is added to it."""
    columns = layer.down.shape[1]
    rows = max(_AT_ONCE // columns, 1)
    start = 0
    while start < len(value):
        row, skipped = divmod(first + start, columns)
        end = min(len(value), start + rows * columns - skipped)
        last = -(-(first + end) // columns)
        _add_rows(value[start:end], layer, row, last, skipped, out[start:end])
        start = end


def _add_rows(value: Tensor, layer: Layer, row: int, last: int, skipped: int, out: Tensor) -> None:
    """The same of whole rows, of which the first ones' elements are `skipped`."""
    if not bool(torch.isfinite(value).all()):
        raise exact.NotFiniteError(0)
    part = slice(skipped, skipped + len(value))
    wide = value.double()
    sums = (layer.up[row:last] @ layer.down).view(-1)[part] + wide
    ups, downs = layer.norms
    error = (ups[row:last, None] * downs[None]).view(-1)[part].add_(wide.abs())
    error.mul_(2 * (layer.down.shape[0] + _MORE_TERMS) * _UNIT)
    rows, inputs = layer.live
    # Adapters start with B = 0, and what was never trained stays so: then the sum is W itself.
    error[~(rows[row:last, None] & inputs[None]).view(-1)[part]] = 0
    low, high = exact.rounded(sums - error, out.dtype), exact.rounded(sums + error, out.dtype)
    out.copy_(low)
    columns = layer.down.shape[1]
    for place in (low != high).nonzero().view(-1).tolist():
        found = divmod(row * columns + skipped + place, columns)
        true = Fraction(float(wide[place])) + layer.element(*found)
        # In units of 2**-149 over a total.
        odd = exact.rounded_to_odd(true.numerator << 149, true.denominator)
        out[place] = exact.rounded(torch.tensor([odd], dtype=torch.float64), out.dtype)[0]
    if not bool(torch.isfinite(out).all()):
        raise exact.NotFiniteError(None)
