"""What the words after `atoll soup` mean: experts with weights, blocks, names, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from atoll.core.errors import Refused, UsageError, did_you_mean
from atoll.merge.far import Place, place_of
from atoll.merge.recipe import Block, Dtype, Method, Settings


def settings_of(
    *,
    dtype: str,
    variant: str | None,
    block: list[str] | None,
    method: str = "mean",
    density: float | None = None,
    scale: float | None = None,
    seed: int | None = None,
    state: bool = False,
    rank: int | None = None,
) -> Settings:
    """What the options ask for; they are checked where the recipe is made."""
    return Settings(
        dtype=cast("Dtype", _choice("dtype", dtype, get_args(Dtype))),
        variant=variant,
        blocks=blocks_of(block),
        method=cast("Method", _choice("method", method, get_args(Method))),
        density=density,
        scale=scale,
        seed=seed,
        state=state,
        rank=rank,
    )


def base_of(base: str | None) -> Place | None:
    """`--base PATH`."""
    return None if base is None else place_of(base)


def names_of(told: list[str] | None) -> dict[Place, str]:
    """`--name NAME=EXPERT`, by expert."""
    pairs = [text.partition("=") for text in told or []]
    for text, (_, equals, expert) in zip(told or [], pairs, strict=True):
        if not equals or not expert:
            raise UsageError(f"'{text}' names nobody", allowed="NAME=EXPERT")
    return {place_of(expert): name for name, _, expert in pairs}


def blocks_of(told: list[str] | None) -> list[Block]:
    """`--block TENSORS:NAME=WEIGHT`."""
    return [_block(text) for text in told or []]


def _block(text: str) -> Block:
    tensors, _, told = text.partition(":")
    name, _, weight = told.rpartition("=")
    try:
        return Block(tensors=tensors, weights={name: int(weight)})
    except ValueError:
        raise UsageError(
            f"'{text}' is no block", allowed="TENSORS:NAME=WEIGHT, as in 'up_blocks.*:style-a=2'"
        ) from None


def _choice(what: str, text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise UsageError(
            f"Unknown {what} '{text}'. {did_you_mean(text, choices)}".strip(),
            allowed=", ".join(choices),
        )
    return text


def local_folder(folder: str) -> Path:
    """A path, where a URI is not taken."""
    if "://" in folder:
        raise UsageError(
            f"{folder} is not a local folder", allowed="a local path", cure="fetch it first"
        )
    return Path(folder)


def paths_of(search: list[str] | None) -> list[Path]:
    """`--ingredients DIR`."""
    return [Path(place) for place in search or []]


def weights_of(experts: list[str]) -> dict[Place, int]:
    """`EXPERT[=WEIGHT]` arguments, each expert once."""
    weighted: dict[Place, int] = {}
    for text in experts:
        path, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            path, weight = text, "1"
        try:
            number = int(weight)
        except ValueError:
            raise UsageError(
                f"'{weight}' in '{text}' is not a weight",
                allowed="a whole number from 1",
                cure=f"where it is a part of the name, give a weight behind it: {text}=1",
            ) from None
        if place_of(path) in weighted:
            raise Refused(f"{path} is named twice", cure=f"give it a weight: {path}=2")
        weighted[place_of(path)] = number
    return weighted
