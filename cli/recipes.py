"""`atoll recipes`: what there is to train, how large it is and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.output import Result, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atoll.core.conditioning import Conditioning
    from atoll.core.manifest import Picture

# Stable Diffusion's: latents of 256x256, and the text of CLIP ViT-L/14.
_LATENT = (4, 32, 32)
_TOKENS, _TEXT_WIDTH = 77, 768


@dataclass(frozen=True)
class _Cost:
    """What a recipe is, and what it costs where it can be trained; else the reason why not."""

    name: str
    family: str
    about: str
    batch: int
    parameters: int = 0
    forward_flops: int = 0  # of one picture
    training_bytes: int = 0  # whatever the batch
    reason: str | None = None


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "recipes", example="atoll recipes out/run --family uvit")
    def recipes(
        run: Annotated[
            str | None,
            typer.Argument(metavar="[RUN]", help="Count for this run's pictures and encoder."),
        ] = None,
        family: Annotated[str | None, typer.Option(help="Those of one family alone.")] = None,
    ) -> Result:
        """List the recipes: parameters, operations for a picture, and memory of training.

        Without a run they are counted for latents of 4x32x32 and the text of CLIP ViT-L/14.
        """
        from atoll.core.errors import UsageError, did_you_mean
        from atoll.core.families import FAMILIES
        from atoll.core.recipes import RECIPES

        if family is not None and family not in FAMILIES:
            raise UsageError(
                f"Unknown family '{family}'. {did_you_mean(family, FAMILIES)}".strip(),
                allowed=", ".join(FAMILIES),
            )
        pictures, cond = _of_run(run) if run is not None else _usual()
        rows = [
            _cost(name, pictures, cond)
            for name, recipe in RECIPES.items()
            if family in (None, recipe.family)
        ]
        return {
            "picture": list(pictures[0].shape),
            "text_width": cond.tokens.shape[2],
            "recipes": [asdict(row) for row in rows],
            "text": _table(rows, pictures[0]),
        }


def _usual() -> tuple[Sequence[Picture], Conditioning]:
    import torch

    from atoll.core.conditioning import Conditioning
    from atoll.core.manifest import Picture

    channels, height, width = _LATENT
    cond = Conditioning(
        torch.zeros(1, _TOKENS, _TEXT_WIDTH),
        torch.ones(1, _TOKENS, dtype=torch.bool),
        torch.zeros(1, _TEXT_WIDTH),
        torch.ones(1, dtype=torch.bool),
    )
    return [Picture(channels=channels, height=height, width=width)], cond


def _of_run(uri: str) -> tuple[Sequence[Picture], Conditioning]:
    """The shapes of its training tensors, the main one first, and its condition of no caption."""
    from atoll.core.cache import BlockCache
    from atoll.core.manifest import Manifest
    from atoll.core.pack import open_pack
    from atoll.core.storage import Storage

    run = Storage(uri)
    manifest = Manifest.load(run)
    commons = open_pack(run, manifest.commons, BlockCache(1))
    return [manifest.picture, *manifest.pictures], commons.null


def _cost(name: str, pictures: Sequence[Picture], cond: Conditioning) -> _Cost:
    """On the first of these shapes, if the recipe takes all of them."""
    from atoll.core import recipes
    from atoll.core.errors import ConfigError
    from atoll.core.families import check_shapes

    recipe = recipes.recipe_of(name)
    row = _Cost(name, recipe.family, recipe.about, recipe.batch)
    try:
        check_shapes(recipe.family, recipe.config, pictures)
    except ConfigError as error:
        return replace(row, reason=error.what)
    widths = {"text_width": cond.tokens.shape[2], "pooled_width": cond.pooled.shape[1]}
    network = recipes.outline(recipe, pictures[0], **widths)
    parameters = recipes.parameter_count(network)
    return replace(
        row,
        parameters=parameters,
        forward_flops=recipes.forward_flops(network, recipe.family, pictures[0], cond),
        training_bytes=recipes.training_bytes(parameters),
    )


def _table(rows: Sequence[_Cost], picture: Picture) -> str:
    """For a person: a line per recipe."""
    lines = [
        f"On pictures of {'x'.join(map(str, picture.shape))}. GiB are those of weights, gradients, "
        "AdamW's state and one average in float32; activations come on top.",
        f"{'recipe':<12} {'parameters':>13} {'GFLOP forward':>14} {'GiB':>7} {'batch':>6}  about",
    ]
    for row in rows:
        costs = (
            f"{row.parameters:>13,} {row.forward_flops / 1e9:>14,.2f} "
            f"{row.training_bytes / 2**30:>7.2f} {row.batch:>6}  {row.about}"
        )
        lines.append(f"{row.name:<12} {costs if row.reason is None else row.reason}")
    return "\n".join(lines)
