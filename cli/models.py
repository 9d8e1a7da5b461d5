"""`atoll sample` and `atoll evaluate`: pictures from a model, and figures about models."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.output import Result, command

if TYPE_CHECKING:
    from atoll.cli.systems import Model, Pictures
    from atoll.core.storage import Storage

RoutingOption = Annotated[
    str,
    typer.Option(
        help="full, top-k:K, mass:P, threshold:Q, sample:M, once, oracle:SHARD, or auto: what the "
        "run's evaluation chose. By bands of t with >, as in full>0.5,once.",
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Solver steps.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
GuidanceOption = Annotated[float, typer.Option(min=0, help="1 is unguided.")]


OnePosteriorOption = Annotated[
    bool,
    typer.Option("--one-posterior", help="Guide by the prompt's gate weights alone, as others do."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @command(app, "sample", example='atoll sample out/run "red apple" --routing once --seed 7')
    def sample(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, ensemble or denoiser.")],
        prompt: Annotated[
            list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to show.")
        ] = None,
        routing: RoutingOption = "full",
        steps: StepsOption = 30,
        guidance: GuidanceOption = 1.0,
        one_posterior: OnePosteriorOption = False,
        seed: Annotated[int, typer.Option(help="Seed of the noise and of draws.")] = 0,
        count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
        size: Annotated[
            str | None, typer.Option(metavar="HxW", help="Height and width [the run's main shape]")
        ] = None,
        out: Annotated[str, typer.Option(help="Folder for the pictures.")] = "out/pictures",
        encoder: Annotated[
            str | None, typer.Option(help="Encoder folder, for a denoiser outside a run.")
        ] = None,
        device: DeviceOption = "auto",
        expert_gib: Annotated[
            float | None,
            typer.Option(help="Most memory for experts, which are paged from disk [all of them]"),
        ] = None,
        trace: Annotated[
            bool, typer.Option("--trace", help="Also write trace.json and a heat strip.")
        ] = False,
    ) -> Result:
        """Sample pictures: PNG files, one per prompt and count, named by their number."""
        from atoll.cli.systems import batches, load_model, of_size
        from atoll.cli.systems import sample as do_sample
        from atoll.core.journal import progress
        from atoll.core.storage import Storage
        from atoll.router.pipeline import to_pil

        room = None if expert_gib is None else _bytes_of(expert_gib)
        loaded = load_model(model, encoder=encoder, device=device, expert_bytes=room)
        loaded = loaded if size is None else of_size(loaded, size)
        routing = str(loaded.routing(routing))  # refused before anything is computed
        prompts = [text for text in (prompt or [""]) for _ in range(count)]
        with progress("sampling", steps * batches(len(prompts))) as advance:
            made = do_sample(
                loaded, prompts, routing=routing, steps=steps, guidance=guidance, seed=seed,
                one_posterior=one_posterior, trace=trace, watch=lambda _step: advance(1),
            )  # fmt: skip
        place = Storage(out)
        files = []
        for number, (text, picture) in enumerate(zip(prompts, to_pil(made.x_data), strict=True)):
            name = f"{number:04d}.png"
            place.write_bytes(name, _png(picture))
            files.append({"file": f"{out}/{name}", "prompt": text})
        settings = {
            "schema_version": 1, "model": model, "routing": routing, "steps": steps,
            "guidance": guidance, "one_posterior": one_posterior, "seed": seed, "prompts": prompts,
        }  # fmt: skip
        settings |= {} if size is None else {"size": size}
        place.write_json("sample.json", settings)
        result: dict[str, Any] = {
            "pictures": files,
            "experts_per_step": made.experts_per_step,
            "null_experts_per_step": made.null_experts_per_step,
        }
        if trace:
            result["trace"] = [
                f"{out}/{name}" for name in _write_trace(place, loaded, made, prompts)
            ]
        cost = f"{made.experts_per_step:.3g} experts a step"
        if guidance != 1:
            cost += f", and {made.null_experts_per_step:.3g} for guidance"
        result["text"] = f"{len(files)} pictures in {out}, by {cost}"
        return result

    @command(app, "evaluate", example="atoll evaluate out/run/ensemble --reference out/run")
    def evaluate(
        model: Annotated[list[str], typer.Argument(metavar="MODEL...", help="What to measure.")],
        reference: Annotated[
            str, typer.Option(metavar="RUN", help="The run whose held-out records are real.")
        ],
        routing: Annotated[
            list[str] | None,
            typer.Option(help="For ensembles; repeatable [default: full, once, top-k:1]"),
        ] = None,
        count: Annotated[int, typer.Option(min=20, help="Pictures per system.")] = 500,
        steps: StepsOption = 30,
        guidance: GuidanceOption = 1.0,
        one_posterior: OnePosteriorOption = False,
        seed: Annotated[int, typer.Option(help="Seed of noise, prompts and draws.")] = 0,
        device: DeviceOption = "auto",
        out: Annotated[
            str | None, typer.Option(help="Folder for metrics.json and report.html [RUN's own]")
        ] = None,
    ) -> Result:
        """Compare models with held-out records, all on the same noise and prompts."""
        from atoll.cli.evaluating import evaluate_models

        evaluation, place = evaluate_models(
            model, reference, routings=routing or ["full", "once", "top-k:1"],
            count=count, steps=steps, guidance=guidance, one_posterior=one_posterior, seed=seed,
            device=device, out=out,
        )  # fmt: skip
        plain = json.loads(evaluation.model_dump_json())
        return {
            "metrics": plain,
            "report": f"{place}/report.html",
            "text": f"Look at {place}/report.html",
        }


def _write_trace(place: Storage, model: Model, made: Pictures, prompts: list[str]) -> list[str]:
    """Write what was noted of each step; the names of the two files to look at."""
    from atoll.router.trace import preview_png, strip_png, trace_json

    previews = [f"trace/{number:04d}.png" for number in range(len(made.trace))]
    for name, step in zip(previews, made.trace, strict=True):
        place.write_bytes(name, preview_png(step, model.decoded))
    place.write_json("trace.json", trace_json(made.trace, model.shards, previews))
    strips = strip_png(made.trace, model.shards, prompts, model.decoded)
    place.write_bytes("trace.png", strips)
    return ["trace.json", "trace.png"]


def _bytes_of(gib: float) -> int:
    from atoll.core.errors import UsageError

    if not (math.isfinite(gib) and gib > 0):
        raise UsageError(f"--expert-gib is {gib}", allowed="a number above 0")
    return int(gib * 2**30)


def _png(picture: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
