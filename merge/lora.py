"""Averages low-rank adapters: the products B A, never A and B each for itself.

The mean of products is a product again, of the factors side by side: with `p_i` the weights, `s_i`
the adapters' scales (alpha over rank; Hu et al. 2021, arXiv 2106.09685) and P the sum of weights,

    sum_i p_i s_i B_i A_i / P = [B_1 p_1 s_1 / P, B_2 p_2 s_2 / P, ...] [A_1; A_2; ...]

so that its rank is the sum of theirs. A is as it came, every element of B is rounded once. Modules
of smaller rank are filled up with zeros: diffusers gives adapters of several ranks another scale.
In the names of diffusers and PEFT (`lora_A`, `lora_B`), and in kohya's (`lora_down`, `lora_up`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from atoll.core.errors import Refused
from atoll.merge import exact
from atoll.merge.recipe import SOUP_KEY, Recipe
from atoll.merge.truncate import Factors, distance, truncate
from atoll.merge.weights import FORMAT_NAMES, Layout, Weights

FILE_NAME = "pytorch_lora_weights.safetensors"  # diffusers'
_METADATA_KEY = "lora_adapter_metadata"  # diffusers': settings, each by component and name
_ADAPTER = re.compile(r"\.(lora_|lora\.|hada_|lokr_|oft_|dora_)|(^|\.)lora_")
_HALVES = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
_PEFT = "base_model."
_OTHERWISE = ("use_rslora", "use_dora")


@dataclass(frozen=True)
class Module:
    """The tensors of one adapted layer, by name, and what multiplies their product."""

    down: str  # A, (rank, inputs...)
    up: str  # B, (outputs, rank, ...)
    scale: Fraction
    alpha: str | None = None  # in kohya's names the tensor that the scale comes from


@dataclass
class Adapter:
    """What a file of adapters holds, by the name of the layer."""

    weights: Weights
    modules: dict[str, Module] = field(default_factory=dict)


def is_adapter(weights: Weights) -> bool:
    """Whether any tensor is a part of a low-rank adapter."""
    return any(_ADAPTER.search(name) for name in weights.layout)


def read_adapter(weights: Weights, called: str) -> Adapter:
    """Understand an open file; `Refused` for what is no plain LoRA, with the tensor's name."""
    found = Adapter(weights)
    settings = _settings(weights, called)
    left = set(weights.layout)
    for name in sorted(weights.layout):
        stem, half = _split(name)
        if half not in _HALVES:
            continue
        up = name.replace(f"{half}.", f"{_HALVES[half]}.", 1)
        if up not in weights.layout:
            raise Refused(f"'{called}' has {name} and no {up}", allowed="adapters of both halves")
        shapes = [weights.layout[each].shape for each in (name, up)]
        rank = shapes[0][:1]
        if min(map(len, shapes)) < 2 or rank != shapes[1][1:2] or not rank[0]:
            raise Refused(
                f"The halves of {stem} in '{called}' do not fit: {shapes[0]}, {shapes[1]}"
            )
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in weights.layout else None
        if alpha is None and stem.startswith(_PEFT):
            raise Refused(
                f"'{called}' is as PEFT saves adapters, with their scale in another file",
                allowed="files of diffusers (save_lora_weights, save_lora_adapter) or kohya",
                cure="load it into its model and save it by diffusers",
            )
        told = _value(weights, alpha) if alpha else settings.alpha(stem, rank[0])
        found.modules[stem] = Module(name, up, told / rank[0], alpha)
        left -= {name, up, alpha}
    if left:
        raise Refused(
            f"'{called}' has {min(left)}, which is no half of an adapter",
            allowed=", ".join(f"{down} and {up}" for down, up in _HALVES.items()) + ", alpha",
            cure="merge the adapter into its base and average the models",
        )
    return found


def mean_adapter(
    recipe: Recipe, adapters: Sequence[Adapter], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], float | None]:
    """The mean of adapters in the order of the recipe, in `dtype` or the narrowest for all.

    Where an adapter leaves a layer alone it says 0 there. At the recipe's rank, if it has one, with
    its error.
    """
    modules, layers = _mean_layers(recipe, adapters, dtype)
    error = None
    if recipe.rank is not None:
        # As soon as nothing is cut off the mean is the exact one, and stays so.
        if any(len(down) > recipe.rank for down, _ in layers.values()):
            cut = truncate(layers, recipe.rank)
            layers, error = cut.factors, cut.error
        else:
            error = 0.0
    rank = max(len(down) for down, _ in layers.values())
    made: dict[str, Tensor] = {}
    for stem, (down, up) in layers.items():
        module, missing = modules[stem], rank - len(down)
        made[module.down] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        empty = up.new_zeros(up.shape[0], missing, *up.shape[2:])
        made[module.up] = torch.cat([up, empty], dim=1)
        if module.alpha is not None:
            made[module.alpha] = torch.tensor(float(rank))
    return made, error


def distance_from_made(
    recipe: Recipe, adapters: Sequence[Adapter], dtype: torch.dtype | None, found: Weights
) -> float:
    """How far an open file's products are from those of `mean_adapter`, over their norm.

    `Refused` where it differs in anything but the values of A and B.
    """
    made, _ = mean_adapter(recipe, adapters, dtype)
    header = found.metadata.get(SOUP_KEY)
    if found.layout != layouts_of(made) or header != recipe.metadata[SOUP_KEY]:
        raise Refused("it has other tensors, or says something else in its header")
    modules, _ = _mean_layers(recipe, adapters, dtype)
    for module in modules.values():
        if module.alpha and not torch.equal(read_half(found, module.alpha), made[module.alpha]):
            raise Refused(f"{module.alpha} is another")
    wanted = {stem: (made[m.down], made[m.up]) for stem, m in modules.items()}
    told = {stem: (read_half(found, m.down), read_half(found, m.up)) for stem, m in modules.items()}
    return distance(wanted, told)


def _mean_layers(
    recipe: Recipe, adapters: Sequence[Adapter], dtype: torch.dtype | None
) -> tuple[dict[str, Module], dict[str, Factors]]:
    names = [part.name for part in recipe.ingredients]
    stems = sorted({stem for adapter in adapters for stem in adapter.modules})
    parts = {stem: _of_module(recipe, stem, names, adapters, dtype) for stem in stems}
    modules = {stem: module for stem, (_, _, module) in parts.items()}
    return modules, {stem: (down, up) for stem, (down, up, _) in parts.items()}


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """How tensors lie in a file."""
    return {name: Layout(FORMAT_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def _of_module(
    recipe: Recipe,
    stem: str,
    names: Sequence[str],
    adapters: Sequence[Adapter],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Module]:
    """A and B of one layer, side by side, and how its tensors are called."""
    weights = recipe.weights(stem)
    there = [i for i, adapter in enumerate(adapters) if stem in adapter.modules]
    modules = [adapters[i].modules[stem] for i in there]
    first = modules[0]
    for i, module in zip(there, modules, strict=True):
        pair = f"'{names[there[0]]}' and '{names[i]}'"
        if (module.down, module.up, module.alpha) != (first.down, first.up, first.alpha):
            raise Refused(
                f"{pair} name {stem} otherwise: {first.down} and {module.down}, alpha "
                f"{first.alpha} and {module.alpha}",
                cure="convert them to the names of one library",
            )
        if _widths(adapters[i].weights, module) != _widths(adapters[there[0]].weights, first):
            raise Refused(
                f"{pair} cannot be averaged, the layer {stem} has other widths",
                allowed="adapters of one base",
            )
    downs = [read_half(adapters[i].weights, m.down) for i, m in zip(there, modules, strict=True)]
    ups = [read_half(adapters[i].weights, m.up) for i, m in zip(there, modules, strict=True)]
    wide = dtype or functools.reduce(torch.promote_types, (each.dtype for each in (*downs, *ups)))
    made = []
    for i, down, up, module in zip(there, downs, ups, modules, strict=True):
        part = module.scale * weights[i] / sum(weights)
        if part == 0:
            continue
        try:
            made.append((_times(down, Fraction(1), wide), _times(up, part, wide)))
        except exact.NotFiniteError as error:
            raise Refused(
                f"'{names[i]}' holds NaN, infinity or what {str(wide)[6:]} does not hold in {stem}",
                cure="leave this adapter out, or choose --dtype float32",
            ) from error
    if not made:  # nobody is heard here
        made = [(downs[0][:0].to(wide), ups[0][:, :0].to(wide))]
    return torch.cat([a for a, _ in made]), torch.cat([b for _, b in made], dim=1), first


def _times(value: Tensor, part: Fraction, dtype: torch.dtype) -> Tensor:
    """A tensor times a number, every element rounded once; as a mean with zeros it is exact."""
    above, below = part.as_integer_ratio()
    if abs(above) + abs(below - above) > exact.MAX_TOTAL:
        raise Refused(
            f"An adapter would be scaled by {above}/{below}",
            allowed=f"fractions of numbers up to {exact.MAX_TOTAL >> 1}",
            cure="save it with an alpha that is a whole number",
        )
    if above == below:
        return exact.mean([value], [1], dtype=dtype)
    return exact.mean([value, torch.zeros_like(value)], [above, below - above], dtype=dtype)


def read_half(weights: Weights, name: str) -> Tensor:
    """A or B of an open file."""
    layout = weights.layout[name]
    value = torch.empty(layout.count, dtype=layout.torch_dtype)
    if value.dtype not in exact.DTYPES:
        raise Refused(f"The half {name} of an adapter is {layout.dtype}", allowed="floats")
    weights.read(name, 0, value)
    return value.view(layout.shape)


def _widths(weights: Weights, module: Module) -> tuple[tuple[int, ...], ...]:
    down, up = (weights.layout[name].shape for name in (module.down, module.up))
    return down[1:], up[:1] + up[2:]


def _split(name: str) -> tuple[str, str]:
    """A layer's name, and which half this is of it; `` for what is none."""
    for half in _HALVES:
        stem, found, rest = name.partition(f".{half}.")
        if found and rest in ("weight", "default.weight"):
            return stem, half
    return name, ""


def _value(weights: Weights, name: str) -> Fraction:
    layout = weights.layout[name]
    value = torch.empty(layout.count, dtype=layout.torch_dtype)
    if layout.count != 1:
        raise Refused(f"{name} has {layout.count} values", allowed="one")
    weights.read(name, 0, value)
    if not bool(torch.isfinite(value).all()):
        raise Refused(f"{name} is {float(value[0])}", allowed="a number")
    return Fraction(float(value[0]))


@dataclass(frozen=True)
class _Settings:
    """What the header of a file of diffusers says of scales, by component and name."""

    told: Mapping[str, Any]

    def alpha(self, stem: str, rank: int) -> Fraction:
        """A layer's alpha; without one, the rank."""
        component, _, layer = stem.partition(".")
        patterns = self.told.get(f"{component}.alpha_pattern") or {}
        for pattern, alpha in patterns.items():
            # As PEFT takes them: the end of a name, or an expression for it.
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return Fraction(alpha)
        alpha = self.told.get(f"{component}.lora_alpha")
        return Fraction(rank if alpha is None else alpha)


def _settings(weights: Weights, called: str) -> _Settings:
    try:
        told = json.loads(weights.metadata.get(_METADATA_KEY, "{}"))
        for name, value in told.items():
            if name.rpartition(".")[2] in _OTHERWISE and value:
                raise Refused(
                    f"'{called}' is an adapter with {name}, whose product is scaled otherwise",
                    allowed="plain LoRA",
                    cure="merge the adapter into its base and average the models",
                )
        settings = _Settings(told)
        for component in {name.partition(".")[0] for name in told}:
            settings.alpha(f"{component}.", 1)
            for pattern in told.get(f"{component}.alpha_pattern") or {}:
                re.compile(pattern)
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise Refused(f"What '{called}' says of its adapters is damaged ({error})") from error
    return settings
