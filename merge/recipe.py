"""`soup.json`: what went into a soup, with which weight and digest, and where it was found.

Nothing in it tells the order or the history of the commands that led to it: ingredients are sorted
by name, and no clock, version or user is recorded (the ledger has the code's version).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoll.core.digest import canonical_json
from atoll.core.errors import Refused, UsageError, did_you_mean
from atoll.core.manifest import check_schema
from atoll.merge.exact import MAX_TOTAL

RECIPE_NAME = "soup.json"
STATE = "state"  # the folder of a running state, beside it
SOUP_KEY = "atoll.soup"  # in the header of its weights
SCHEMA_VERSION = 1

# How a soup comes about: as a mean by the weights that are given, by weights that are found in
# every tensor (`merge/stock.py`), of what is kept of the experts' moves (`merge/moves.py`), or as
# the base with adapters' products added (`merge/bake.py`).
Method = Literal["mean", "model-stock", "ties", "dare", "bake"]
MOVES = ("ties", "dare")
BAKE = "bake"
_DENSITIES = {"ties": 0.2, "dare": 0.1}  # of the papers
OF_MOVES = ("density", "scale", "seed")
# "same": each tensor keeps the ingredients' dtype.
Dtype = Literal["same", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """What a soup is asked to be, beside its ingredients; all of it goes into its recipe.

    `density` is the part of an expert's moves that TIES and DARE keep, `scale` what the mean of
    those, or of adapters' products, is multiplied by before it is added to the base, both in
    hundredths; `seed` is DARE's.
    None is the method's own. `state` keeps the exact sums beside the soup (`merge/state.py`).
    """

    dtype: Dtype = "same"
    variant: str | None = None  # of the ingredients' files
    blocks: Sequence[Block] = ()
    method: Method = "mean"
    density: float | None = None
    scale: float | None = None
    seed: int | None = None
    state: bool = False
    rank: int | None = None  # of adapters: cut off there (`merge/truncate.py`)

    def resolved(self) -> Settings:
        """With the method's own values; `UsageError` for what it does not have, or not so."""
        moves = self.method in MOVES
        if self.state and self.method != "mean":
            raise UsageError(
                f"{self.method} has no running state", cure="leave out --state, or the method"
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"The rank is {self.rank}", allowed="1, 2, 3, ...")
        if self.rank is not None and self.method != "mean":
            raise UsageError(f"{self.method} has no rank", cure="leave out --rank, or the method")
        scaled = moves or self.method == BAKE
        told = {"density": moves, "scale": scaled, "seed": self.method == "dare"}
        for name, known in told.items():
            if getattr(self, name) is not None and not known:
                raise UsageError(
                    f"{self.method} has no {name}", cure=f"leave out --{name}, or name a --method"
                )
        if not scaled:
            return self
        scale = 1.0 if self.scale is None else self.scale
        density = _DENSITIES.get(self.method) if self.density is None else self.density
        for name, value, most in (("density", density, 1.0), ("scale", scale, 100.0)):
            if value is None:
                continue
            if not 0 < value <= most or (Fraction(str(value)) * 100).denominator > 1:
                raise UsageError(f"{name} is {value}", allowed=f"0.01, 0.02, ... up to {most:g}")
        seed = (self.seed or 0) if self.method == "dare" else None
        return replace(self, density=density, scale=scale, seed=seed)


class Ingredient(BaseModel):
    """One member of a soup.

    `sha256` is of its weights, empty until they are read; `path` is relative to the soup's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shard: str | None
    weight: int
    sha256: str
    path: str


class Block(BaseModel):
    """Tensors in which some ingredients count otherwise.

    `tensors` is a pattern of their names as the shell has them, `up_blocks.*`; those of a pipeline
    begin with the component's, `unet.up_blocks.*`. `weights` are by ingredient, and may be 0. Of
    the blocks that a tensor is in, the one of the longest pattern counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: str
    weights: dict[str, int]


class Recipe(BaseModel):
    """All of `soup.json`: enough for a stranger to compute the soup again, bit by bit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    ingredients: tuple[Ingredient, ...] = Field(min_length=1)
    base_sha256: str | None  # None: nobody said which base they are copies of
    variant: str | None = None  # of the ingredients' files
    method: Method = "mean"
    density: float | None = None
    scale: float | None = None
    seed: int | None = None
    base: str | None = None  # the ingredient that is the base, if there is one
    blocks: tuple[Block, ...] = ()  # sorted by pattern
    dtype: Dtype = "same"
    rounding: Literal["nearest-even of the exact mean, zeros +0"] = (
        "nearest-even of the exact mean, zeros +0"
    )
    # Of the soup's own weights, as of an ingredient's; empty until they are written.
    sha256: str = ""
    state_sha256: str | None = None  # of its running state likewise, if it is kept
    rank: int | None = None  # at which a mean of adapters is cut off
    error: float | None = None  # of that: its distance from the mean, over the mean's norm

    @classmethod
    def of(
        cls,
        ingredients: list[Ingredient],
        settings: Settings,
        *,
        base_sha256: str | None,
        base: str | None = None,
    ) -> Self:
        """A recipe in the one order, after checking names, weights and settings."""
        settings = settings.resolved()
        names = [ingredient.name for ingredient in ingredients]
        for name in names:
            if names.count(name) > 1:
                raise Refused(
                    f"Two ingredients are named '{name}'",
                    allowed="one ingredient of a name",
                    cure="without atoll.json: give one a name of its own, --name NAME=EXPERT; else "
                    f"leave one out, or first `atoll soup remove SOUP {name}`",
                )
        ordered = tuple(sorted(ingredients, key=lambda ingredient: ingredient.name))
        recipe = cls(
            ingredients=ordered,
            base_sha256=base_sha256,
            base=base,
            variant=settings.variant,
            method=settings.method,
            density=settings.density,
            scale=settings.scale,
            seed=settings.seed,
            blocks=in_order(settings.blocks),
            dtype=settings.dtype,
            state_sha256="" if settings.state else None,
            rank=settings.rank,
        )
        recipe._check_weights()
        return recipe

    def blocks_without(self, names: Collection[str]) -> tuple[Block, ...]:
        """The blocks of a soup that ingredients have left; Model Stock finds its own anew."""
        if self.method == "model-stock":
            return ()
        return in_order(
            Block(
                tensors=block.tensors,
                weights={n: weight for n, weight in block.weights.items() if n not in names},
            )
            for block in self.blocks
        )

    def settings(self, blocks: Iterable[Block]) -> Settings:
        """What the soup was asked to be, with other blocks."""
        return Settings(
            dtype=self.dtype,
            variant=self.variant,
            blocks=tuple(blocks),
            method=self.method,
            density=self.density,
            scale=self.scale,
            seed=self.seed,
            state=self.state_sha256 is not None,
            rank=self.rank,
        )

    def has_mean_without(self, names: Collection[str]) -> bool:
        """Whether a soup is left when ingredients leave: an expert, and weights with a mean."""
        rest = [part for part in self.ingredients if part.name not in names]
        if not {part.name for part in rest} - {self.base}:
            return False
        try:
            rest_of = self.settings(self.blocks_without(names))
            Recipe.of(rest, rest_of, base_sha256=self.base_sha256, base=self.base)
        except UsageError:
            return False
        return True

    def weights(self, tensor: str) -> list[int]:
        """What every ingredient counts in a tensor, in their order."""
        inside = [block for block in self.blocks if fnmatchcase(tensor, block.tensors)]
        return self._weights(
            max(inside, key=lambda one: (len(one.tensors), one.tensors), default=None)
        )

    def _weights(self, block: Block | None) -> list[int]:
        told = {} if block is None else block.weights
        return [told.get(part.name, part.weight) for part in self.ingredients]

    def _check_weights(self) -> None:
        names = [part.name for part in self.ingredients]
        for block in self.blocks:
            for name in sorted(block.weights.keys() - set(names)):
                raise UsageError(
                    f"The block {block.tensors} weighs '{name}', which is no ingredient. "
                    f"{did_you_mean(name, names)}".strip(),
                    allowed=", ".join(names),
                )
        if self.base not in (None, *names) or (self.base is None and self.method != "mean"):
            raise UsageError(
                f"The base is said to be {self.base}", allowed=f"an ingredient: {', '.join(names)}"
            )
        for part in self.ingredients:
            check_weight(part.weight, part.name, negative=True)
            if part.weight < 0 and self.method != "mean":
                raise UsageError(
                    f"The weight {part.weight} of {part.name} is negative",
                    allowed=f"positive integers, with {self.method}",
                )
        if self.method in MOVES or self.method == BAKE:
            self._check_moves()
        check_total(self._weights(None), "")
        for block in self.blocks:
            check_total(self._weights(block), f" in {block.tensors}")

    def _check_moves(self) -> None:
        """Weights are of the experts alone, and all that they are multiplied with is counted."""
        for block in self.blocks:
            for name, weight in block.weights.items():
                if name == self.base:
                    raise UsageError(
                        f"'{name}' is the base, which has no weight", allowed="those of experts"
                    )
                if weight < 0:
                    raise UsageError(
                        f"The weight {weight} of {name} in {block.tensors} is negative",
                        allowed=f"0 and positive integers, with {self.method}",
                    )
        kept, scale = (Fraction(str(each)) for each in (self.density or 1, self.scale))
        widest = 2 * scale.numerator * kept.denominator + scale.denominator * kept.numerator
        most = [self._weights(None), *(self._weights(block) for block in self.blocks)]
        if widest * max(map(sum, most)) > MAX_TOTAL:
            raise UsageError(
                "The weights are too large for this density and scale",
                cure="divide them by a common factor, or say 0.2 and not 0.21",
            )

    @classmethod
    def load(cls, soup: Path, *, called: Path | str | None = None) -> Self:
        """The recipe in a soup's folder, or in what stands for one that is `called` something else.

        Raises `UsageError` where there is none, and `Refused` if it is damaged.
        """
        called = soup if called is None else called
        path = f"{called}/{RECIPE_NAME}"
        try:
            values = json.loads((soup / RECIPE_NAME).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"There is no soup at {called}",
                allowed=f"a folder with {RECIPE_NAME}",
                cure="make one with `atoll soup create OUT EXPERT...`",
            ) from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path} is not readable JSON ({error})") from error
        check_schema(values, SCHEMA_VERSION, path)
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise Refused(f"{path} is damaged: {where}: {first['msg']}") from error
        names = [ingredient.name for ingredient in recipe.ingredients]
        if names != sorted(set(names)):
            raise Refused(f"{path} is damaged: ingredients are not sorted by distinct names")
        try:
            if recipe.settings(recipe.blocks) != recipe.settings(recipe.blocks).resolved():
                raise Refused(f"{path} is damaged: it leaves out what its method needs")
            recipe._check_weights()
        except UsageError as error:
            raise Refused(f"{path} is damaged: {error.what}") from error
        return recipe

    def to_bytes(self) -> bytes:
        """The file's content; what is not said of a soup is not in it."""
        unsaid = {name for name in ("variant", "base", "blocks") if not getattr(self, name)}
        unsaid |= {
            n for n in (*OF_MOVES, "state_sha256", "rank", "error") if getattr(self, n) is None
        }
        unsaid |= {"method"} if self.method == "mean" else set()
        return canonical_json(self.model_dump(mode="json", exclude=unsaid))

    def asked(self, *, digests: bool) -> Self:
        """What a soup was asked to be, without the digest that it came to, and its parts' too."""
        parts = self.ingredients
        if not digests:
            parts = tuple(part.model_copy(update={"sha256": ""}) for part in parts)
        state = None if self.state_sha256 is None else ""
        unmade = {"ingredients": parts, "sha256": "", "state_sha256": state, "error": None}
        return self.model_copy(update=unmade)

    @property
    def name(self) -> str:
        """The soup's unique name, a function of what is in it: same soup, same name."""
        parts = [(i.name, i.weight, i.sha256) for i in self.ingredients]
        blocks = [[block.model_dump() for block in self.blocks]] if self.blocks else []
        moves = [[self.method, *(getattr(self, name) for name in OF_MOVES)]]
        told = [*blocks, *(moves if self.scale is not None else [])]
        told += [] if self.rank is None else [[self.rank]]
        text = json.dumps([parts, self.base_sha256, self.dtype, self.rounding, *told])
        return f"soup-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the weights file says of itself: all that is known before it is made."""
        told: dict[str, object] = {
            "ingredients": {part.name: part.weight for part in self.ingredients},
            "base_sha256": self.base_sha256,
            "dtype": self.dtype,
            "rounding": self.rounding,
        }
        if self.method != "mean":
            told["method"] = self.method
        for name in (*OF_MOVES, "rank"):
            if getattr(self, name) is not None:
                told[name] = getattr(self, name)
        if self.blocks and self.method != "model-stock":
            told["blocks"] = {block.tensors: block.weights for block in self.blocks}
        return {SOUP_KEY: canonical_json(told).decode()}

    @property
    def shards(self) -> list[str]:
        """The shards whose experts are in it, sorted."""
        return sorted({i.shard for i in self.ingredients if i.shard is not None})

    def named(self, name: str) -> Ingredient:
        """The ingredient of that name, or else the only one of that shard."""
        by_name = [i for i in self.ingredients if i.name == name]
        found = by_name or [i for i in self.ingredients if i.shard == name]
        if len(found) == 1:
            return found[0]
        names = [i.name for i in self.ingredients]
        if found:
            raise UsageError(
                f"Shard '{name}' has {len(found)} experts in this soup",
                allowed=", ".join(i.name for i in found),
                cure="name one of them",
            )
        raise UsageError(
            f"There is no ingredient '{name}' in this soup. {did_you_mean(name, names)}".strip(),
            allowed=", ".join(names),
        )


def check_weight(weight: object, where: str, *, negative: bool = False) -> int:
    """A positive integer, or a negative one if that is said to be meant; or the error."""
    whole = isinstance(weight, int) and not isinstance(weight, bool)
    if not isinstance(weight, int) or not whole or weight == 0:
        raise UsageError(
            f"The weight {weight!r} of {where} is not a positive integer",
            allowed="1, 2, 3, ...",
            cure="scale fractions up to integers; to leave an ingredient out, do not name it",
        )
    if weight < 0 and not negative:
        raise UsageError(
            f"The weight {weight} of {where} is negative, not a positive integer",
            allowed="1, 2, 3, ...",
            cure="if you mean to take it away from the others, say --negative",
        )
    return weight


def check_blocks(blocks: Iterable[Block], names: Collection[str], *, negative: bool) -> None:
    """Refuse weights of others than those named, and negative ones that nobody said are meant."""
    for block in blocks:
        for name, weight in block.weights.items():
            if name not in names:
                raise UsageError(
                    f"The block {block.tensors} weighs '{name}', which is not added here. "
                    f"{did_you_mean(name, names)}".strip(),
                    allowed=", ".join(sorted(names)),
                )
            if weight:
                check_weight(weight, f"{name} in {block.tensors}", negative=negative)


def check_total(weights: Sequence[int], where: str) -> None:
    """Refuse weights whose mean is not defined, or not exactly computed."""
    if sum(weights) <= 0:
        raise UsageError(
            f"The weights{where} add up to {sum(weights)}",
            allowed="a positive sum",
            cure="let what is added count more than what is taken away",
        )
    reach = sum(map(abs, weights))
    if reach > MAX_TOTAL:
        raise UsageError(
            f"The weights{where} add up to {reach}, signs aside",
            allowed=f"a sum of at most {MAX_TOTAL}",
            cure="divide them by a common factor",
        )


def in_order(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """One block a pattern, sorted; those that say nothing are none."""
    told: dict[str, dict[str, int]] = {}
    for block in blocks:
        told[block.tensors] = told.get(block.tensors, {}) | block.weights
    return tuple(
        Block(tensors=tensors, weights=dict(sorted(weights.items())))
        for tensors, weights in sorted(told.items())
        if weights
    )
