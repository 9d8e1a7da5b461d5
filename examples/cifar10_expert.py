"""One expert of CIFAR-10, from a Parquet file to samples and its curve, by four commands.

python examples/cifar10_expert.py cifar10.parquet out/cars

The common start learns trucks, the one island automobiles; both take about 40 minutes together on
one core. The file needs the columns image, caption and label. What is made: islands/automobile/
preview-*.png while it trains, preview.png of the expert as published, and curve.png.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

COMMONS, SHARD = "truck", "automobile"
BASE_PASSES, PASSES = 8, 24


def main(corpus: str, out: str) -> None:
    """Run the commands; a second run resumes."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    two, run = folder / "two-classes.parquet", folder / "run"
    table = pq.read_table(corpus)
    pq.write_table(table.filter(pc.field("label").isin([COMMONS, SHARD])), two)

    atoll(
        "partition", two, run, "--by", "label", "--commons", COMMONS,
        "--set", "holdout=0.05", "--set", "flips=true",
    )  # fmt: skip
    averages = "training.ema_decays=[0.995,0.999]"
    atoll("base", run, "--recipe", "unet-nano", "--passes", BASE_PASSES, "--set", averages)
    atoll(
        "train", run, "--passes", PASSES, "--set", averages,
        "--set", "preview=36", "--set", "preview_milestones=8",
    )  # fmt: skip
    curve(run / "islands" / SHARD / "metrics.jsonl", folder / "curve.png")


def atoll(*arguments: object) -> None:
    """Run a command as a shell would, or end as it ended."""
    print("$ atoll", *arguments, flush=True)  # noqa: T201
    script = Path(sys.executable).with_name("atoll")
    ended = subprocess.run([script, *map(str, arguments)], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def curve(metrics: Path, out: Path, *, window: int = 20) -> None:
    """The training loss over images seen, and its mean over the lines before."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seen, losses = ([line[key] for line in lines] for key in ("images_seen", "loss"))
    recent = [losses[max(0, end - window) : end] for end in range(1, len(losses) + 1)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(seen, losses, color="0.8", linewidth=0.8)
    axes.plot(seen, [sum(values) / len(values) for values in recent])
    axes.set(xlabel="images seen", ylabel="flow-matching loss", ylim=(0, max(losses[1:])))
    figure.savefig(out, dpi=120)
    print(f"{out}: {losses[0]:.4f} to {sum(recent[-1]) / len(recent[-1]):.4f}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
