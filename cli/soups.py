"""`atoll soup`: create, loo, add, remove, verify, show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.output import Result, command

if TYPE_CHECKING:
    from atoll.core.manifest import Manifest
    from atoll.core.storage import Storage
    from atoll.merge.far import Place
    from atoll.merge.soup import Soup

SoupArgument = Annotated[str, typer.Argument(metavar="SOUP", help="A soup's folder, or its URI.")]
ExpertsArgument = Annotated[
    list[str],
    typer.Argument(metavar="EXPERT[=WEIGHT]...", help="Experts; integer weights, 1 if none"),
]
SearchOption = Annotated[
    list[str] | None,
    typer.Option("--ingredients", help="Where to look for ingredients that moved; repeatable."),
]


DtypeOption = Annotated[str, typer.Option(help="same, float32, bfloat16 or float16.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="What experts without atoll.json were made from.")
]
VariantOption = Annotated[
    str | None, typer.Option(help="Which files to read where there are several, such as fp16.")
]
BlockOption = Annotated[
    list[str] | None,
    typer.Option(
        "--block",
        metavar="TENSORS:NAME=WEIGHT",
        help="Another weight in tensors of these names, 'up_blocks.*:style-a=0'; repeatable.",
    ),
]
NegativeOption = Annotated[
    bool, typer.Option("--negative", help="Weights below 0 are meant: EXPERT=-1 takes away.")
]

NameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME=EXPERT",
        help="What to call an expert without atoll.json, if not as its path; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Average experts into a soup, exactly.", no_args_is_help=True)
    app.add_typer(group, name="soup")

    @command(group, "create", example="atoll soup create out/soup out/run/islands/*/expert")
    def create(
        out: Annotated[str, typer.Argument(metavar="OUT", help="The new soup's folder, or a URI.")],
        expert: ExpertsArgument,
        dtype: DtypeOption = "same",
        base: BaseOption = None,
        variant: VariantOption = None,
        block: BlockOption = None,
        negative: NegativeOption = False,
        name: NameOption = None,
        method: Annotated[
            str, typer.Option(help="mean; with --base model-stock, ties, dare or bake.")
        ] = "mean",
        density: Annotated[
            float | None, typer.Option(help="What TIES (0.2) and DARE (0.1) keep of the moves.")
        ] = None,
        scale: Annotated[
            float | None, typer.Option(help="What TIES, DARE and bake multiply the mean by (1).")
        ] = None,
        seed: Annotated[int | None, typer.Option(help="Of what DARE keeps (0).")] = None,
        rank: Annotated[
            int | None, typer.Option(help="Of LoRA adapters: cut their mean off at this rank.")
        ] = None,
        state: Annotated[
            bool,
            typer.Option("--state", help="Keep the exact sums too, to add and remove faster."),
        ] = False,
        check: Annotated[
            bool, typer.Option("--check", help="Only say how the experts go together.")
        ] = False,
        barrier: Annotated[
            str | None,
            typer.Option(
                metavar="FOLDER",
                help="With --check, losses too: on records of this shard or commons of a run.",
            ),
        ] = None,
    ) -> Result:
        """Average experts, with integer weights, into a new soup."""
        from atoll.cli import soup_words as words
        from atoll.core.errors import UsageError
        from atoll.merge import soup
        from atoll.merge.far import place_of

        weighted = words.weights_of(expert)
        settings = words.settings_of(
            dtype=dtype, variant=variant, block=block, method=method, density=density,
            scale=scale, seed=seed, state=state, rank=rank,
        )  # fmt: skip
        its_base = words.base_of(base)
        if check and (method != "mean" or state):
            raise UsageError(
                "A check is the same for every method, and keeps no state",
                cure="leave out --method and --state",
            )
        if check:
            from atoll.cli.soup_check import checked
            from atoll.merge.preflight import check as do_check

            pack = None if barrier is None else words.local_folder(barrier)
            return checked(
                do_check(
                    place_of(out),
                    weighted,
                    settings,
                    base=its_base,
                    negative=negative,
                    names=words.names_of(name),
                    pack=pack,
                )
            )
        if barrier is not None:
            raise UsageError("--barrier says more of a check", cure="add --check")
        with _at_work(place_of(out), weighted, its_base) as runs:
            made = soup.create(
                place_of(out), weighted, settings, base=its_base, negative=negative,
                names=words.names_of(name), claim=runs.claim,
            )  # fmt: skip
            runs.remember(made)
        return _result(made)

    @command(group, "loo", example="atoll soup loo out/loo out/run/islands/*/expert")
    def loo(
        out: Annotated[str, typer.Argument(metavar="OUT", help="A folder or URI for the soups.")],
        expert: ExpertsArgument,
        dtype: DtypeOption = "same",
        base: BaseOption = None,
        variant: VariantOption = None,
        block: BlockOption = None,
        negative: NegativeOption = False,
        name: NameOption = None,
    ) -> Result:
        """Leave one out: the soup of all experts but one, for every one, at OUT/without-NAME."""
        from atoll.cli import soup_words as words
        from atoll.merge import soup
        from atoll.merge.far import place_of

        weighted, its_base = words.weights_of(expert), words.base_of(base)
        with _at_work(place_of(out), weighted, its_base) as runs:
            made = soup.leave_one_out(
                place_of(out), weighted,
                words.settings_of(dtype=dtype, variant=variant, block=block),
                base=its_base, negative=negative, names=words.names_of(name), claim=runs.claim,
            )  # fmt: skip
            for each in made.values():
                runs.remember(each)
        told = {name: _result(each) for name, each in made.items()}
        return {
            "soups": {
                name: {k: v for k, v in each.items() if k != "text"} for name, each in told.items()
            },
            "text": "\n".join(f"without {name}: {each.place}" for name, each in made.items()),
        }

    @command(group, "add", example="atoll soup add out/soup out/run/islands/shard-05/expert=2")
    def add(
        soup: SoupArgument,
        expert: ExpertsArgument,
        search: SearchOption = None,
        base: BaseOption = None,
        block: BlockOption = None,
        negative: NegativeOption = False,
        name: NameOption = None,
    ) -> Result:
        """Make a soup anew with further experts."""
        from atoll.cli import soup_words as words
        from atoll.merge import soup as soups
        from atoll.merge.far import place_of

        weighted, its_base = words.weights_of(expert), words.base_of(base)
        with _at_work(place_of(soup), weighted, its_base) as runs:
            made = soups.add(
                place_of(soup), weighted, search=words.paths_of(search), base=its_base,
                blocks=words.blocks_of(block), negative=negative, names=words.names_of(name),
                claim=runs.claim,
            )  # fmt: skip
            runs.remember(made)
        return _result(made)

    @command(group, "remove", example="atoll soup remove out/soup shard-02")
    def remove(
        soup: SoupArgument,
        name: Annotated[str, typer.Argument(metavar="NAME", help="An ingredient or its shard.")],
        search: SearchOption = None,
    ) -> Result:
        """Make a soup anew without one ingredient."""
        from atoll.cli import soup_words as words
        from atoll.merge import soup as soups
        from atoll.merge.far import place_of

        with _at_work(place_of(soup)) as runs:
            made = soups.remove(place_of(soup), name, search=words.paths_of(search))
            runs.remember(made)
        return _result(made)

    @command(group, "verify", example="atoll soup verify out/soup")
    def verify(soup: SoupArgument, search: SearchOption = None) -> Result:
        """Recompute a soup from its ingredients and compare every byte."""
        from atoll.cli import soup_words as words
        from atoll.core.errors import Refused
        from atoll.merge.far import place_of
        from atoll.merge.verify import verify as do_verify

        verdict = do_verify(place_of(soup), search=words.paths_of(search))
        if not verdict.holds:
            raise Refused(
                f"{soup} is not the soup of its recipe: {'; '.join(verdict.problems)}",
                cure="make it again with `atoll soup create`",
            )
        return {
            "soup": soup,
            "holds": True,
            "sha256": verdict.found_sha256,
            "ingredients": list(verdict.ingredients),
            "text": f"{soup} is bitwise the soup of {', '.join(verdict.ingredients)}",
        }

    @command(group, "show", example="atoll soup show out/soup")
    def show(soup: SoupArgument) -> Result:
        """What is in a soup."""
        from atoll.merge import soup as soups
        from atoll.merge.far import place_of

        return _result(soups.show(place_of(soup)))


def _result(made: Soup) -> Result:
    from atoll.merge.recipe import OF_MOVES

    ingredients = [
        {"name": part.name, "shard": part.shard, "weight": part.weight, "sha256": part.sha256}
        for part in made.recipe.ingredients
    ]
    blocks = {block.tensors: block.weights for block in made.recipe.blocks}
    no_weight = None if made.recipe.method == "mean" else made.recipe.base
    listed = "\n".join(
        f"  {part['weight']} x {part['name']}" for part in ingredients if part["name"] != no_weight
    )
    if made.recipe.method != "mean":
        listed += f"\n  by {made.recipe.method}, with {made.recipe.base} as the base"
    of_method = {
        name: getattr(made.recipe, name)
        for name in OF_MOVES
        if getattr(made.recipe, name) is not None
    }
    listed += "".join(f", {name} {value:g}" for name, value in of_method.items())
    for tensors, weights in blocks.items() if made.recipe.method != "model-stock" else ():
        told = ", ".join(f"{weight} x {name}" for name, weight in weights.items())
        listed += f"\n  in {tensors}: {told}"
    if made.recipe.error is not None:
        listed += f"\n  cut off at rank {made.recipe.rank}, {made.recipe.error:.2g} of it lost"
    if made.recipe.state_sha256 is not None:
        listed += "\n  with its running state"
    plan = made.plan
    if plan is not None and plan.from_state:
        listed += f"\n  from its running state, {plan.read_bytes / 1e9:.3g} GB read"
    result: dict[str, Any] = {
        "soup": str(made.place),
        "name": made.recipe.name,
        "sha256": made.recipe.sha256,
        "base_sha256": made.recipe.base_sha256,
        "ingredients": ingredients,
        "method": made.recipe.method,
        **of_method,
        "rank": made.recipe.rank,
        "error": made.recipe.error,
        "state_sha256": made.recipe.state_sha256,
        "plan": None if plan is None else vars(plan),
        "blocks": blocks,
        "text": f"{made.place}: {made.recipe.name}\n{listed}",
    }
    return result


def _check_of_run(place: Place) -> None:
    """Refuse what lies in a run and says of no shard that it is its: a head, a checkpoint."""
    from atoll.cli.working import run_of
    from atoll.core.denoiser import CARD_NAME
    from atoll.core.errors import Refused
    from atoll.core.storage import Storage
    from atoll.merge.model import WEIGHTS_SUFFIX

    if isinstance(place, Path) and not place.exists():
        return  # which is said where it is opened
    home = run_of(place)
    folder = place
    if str(place).endswith(WEIGHTS_SUFFIX):
        folder = place.parent if isinstance(place, Path) else place.rpartition("/")[0]
    if home is not None and not Storage(folder).exists(CARD_NAME):
        raise Refused(
            f"{place} lies in the run {home}, and is none of its experts",
            allowed="folders with atoll.json, such as islands/SHARD/expert",
        )


@dataclass(frozen=True)
class _Runs:
    """The runs that a soup lies in or comes from, held."""

    held: list[tuple[Storage, Manifest]]

    def claim(self, place: Place) -> None:
        """Note that a soup is about to be put elsewhere, so that a removal looks there."""
        for run, manifest in self.held:
            manifest.add_export(str(place).rstrip("/"))
            manifest.save(run)

    def remember(self, made: Soup) -> None:
        """Tell them all of a soup; one that left them is among their exports."""
        from atoll.cli.recording import remember

        for run, manifest in self.held:
            remember(made, run, manifest)


@contextmanager
def _at_work(
    soup: Place, experts: Iterable[Place] = (), base: Place | None = None
) -> Iterator[_Runs]:
    """Hold the runs that a soup lies in or comes from, before anything of it is changed."""
    from atoll.cli.working import check_recorded, run_of, working_on
    from atoll.core.storage import Storage
    from atoll.merge.home import Home
    from atoll.merge.ingredients import located
    from atoll.merge.recipe import RECIPE_NAME

    experts = [*experts, *([] if base is None else [base])]
    parts: list[Place] = [soup, *experts]
    if Storage(soup).exists(RECIPE_NAME):
        parts += [located(part, soup) for part in Home(soup).recipe().ingredients]
    with ExitStack() as stack:
        found = {run_of(part) for part in parts}
        homes = sorted((home for home in found if home is not None), key=str)
        runs = _Runs([stack.enter_context(working_on(home)) for home in homes])
        for expert in experts:
            _check_of_run(expert)
            check_recorded(expert)
        yield runs
