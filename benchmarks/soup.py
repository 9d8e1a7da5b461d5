"""How fast, how frugal and how exact a soup is, beside `cp` and the tools that average models.

    python -m benchmarks.soup OUT [--quick] [--json]

Two sets of experts are made in OUT: four UNets of Stable Diffusion 2.1's configuration in bfloat16
(0.87B parameters, 1.7 GB each) and seven smaller ones in float32, with random weights. All is run
as its users run it, start of the interpreter included: `atoll soup create`, `mergekit-pytorch`, a
script for sd-mecha, `cp` of the same files; with the files in the page cache, then without. Sampled
elements of all are compared with fractions. In full it takes 25 GB of disk; a second run finds
experts and peers made.

Soups of 4, 7 and 32 of a third set are added to and removed from, with `--state` and without: which
way the planner takes, what it moves, and whether both make the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atoll.core.denoiser import NETWORK_CONFIG, Card, write_card
from atoll.core.digest import canonical_json
from atoll.core.flow import Prediction
from atoll.merge.weights import WEIGHTS_NAME
from benchmarks import peers
from benchmarks.rounding import reference
from benchmarks.rows import Row, row, show, unmeasured

WARM, COLD = 10.0, 5.0  # times as fast as a peer
OF_COPY_WARM, OF_COPY_COLD = 0.35, 0.7  # of the bytes a second that `cp` moves
ANONYMOUS = 1.0  # GiB beyond the interpreter's
SAMPLED = 10_000_000
REPEATS = 3
SD21: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SMALLER = SD21 | {"block_out_channels": (128, 256, 512, 512), "attention_head_dim": 8}
TINY = SD21 | {
    "block_out_channels": (32, 64), "attention_head_dim": 4, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


MANY = SD21 | {"block_out_channels": (64, 128, 256, 256), "attention_head_dim": 8}


@dataclass(frozen=True)
class Case:
    """A set of experts."""

    name: str
    config: dict[str, Any]
    dtype: torch.dtype
    count: int


FULL = (
    Case("SD2.1", SD21, torch.bfloat16, 4),
    Case("smaller", SMALLER, torch.float32, 7),
)
QUICK = (
    Case("tiny bf16", TINY, torch.bfloat16, 3),
    Case("tiny f32", TINY, torch.float32, 2),
)


CHANGES = (Case("many", MANY, torch.float32, 32), Case("many bf16", MANY, torch.bfloat16, 32))
QUICK_CHANGES = (Case("tiny changes", TINY, torch.float32, 7),)
COUNTS = (4, 7, 32)  # of the experts that a change leads to


def experts(case: Case, out: Path) -> list[Path]:
    """The set's folders, made unless they are there; what a killed run left is made again."""
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in UNet2DConditionModel(**case.config).state_dict().items()
        }
    made = []
    for number in range(case.count):
        folder = out / f"expert-{number}"
        made.append(folder)
        if folder.exists():
            continue
        partial_folder = out / f"making-{number}"
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        draw = torch.Generator().manual_seed(number)
        state = {
            name: (0.05 * torch.randn(shape, generator=draw)).to(case.dtype)
            for name, shape in shapes.items()
        }
        save_file(state, partial_folder / WEIGHTS_NAME, {"format": "pt"})
        config = {"_class_name": "UNet2DConditionModel", **case.config}
        (partial_folder / NETWORK_CONFIG).write_bytes(canonical_json(config))
        write_card(
            partial_folder,
            Card(
                name=folder.name,
                kind="expert",
                shard=folder.name,
                base_sha256="0" * 64,
                family="unet",
                prediction=Prediction.VELOCITY,
                latent_space="random",
                images_seen=1,
            ),
        )
        partial_folder.rename(folder)
    return made


# -- timing ----------------------------------------------------------------------------------------


def ours(folders: Sequence[Path], soup: Path) -> list[str]:
    """The command."""
    script = Path(sys.executable).with_name("atoll")
    return [str(script), "soup", "create", str(soup), *map(str, folders), "--quiet"]


def timed(work: Callable[[], Any], files: Sequence[Path], fresh: Path, *, cold: bool) -> float:
    """Seconds of one run into a fresh place, with its inputs in the page cache or not."""
    if fresh.is_dir():
        shutil.rmtree(fresh)
    fresh.unlink(missing_ok=True)
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def copied(files: Sequence[Path], into: Path) -> None:
    """As `cp` does it."""
    into.mkdir()
    for number, file in enumerate(files):
        subprocess.run(["cp", str(file), str(into / str(number))], check=True)


def anonymous(command: Sequence[str]) -> tuple[float, int]:
    """Seconds of a command, and the most anonymous memory of its process, in bytes."""
    begun, most = time.perf_counter(), 0
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                most = max(most, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - begun, most


# -- exactness -------------------------------------------------------------------------------------


def differing(file: Path, inputs: Sequence[Path], sampled: int) -> tuple[int, int]:
    """How many sampled elements of a mean are not the rounded fraction, and of how many."""
    with safe_open(inputs[0], framework="pt") as opened:
        names = sorted(opened.keys())
        sizes = {name: opened.get_tensor(name).numel() for name in names}
    total = sum(sizes.values())
    parts = [
        (name, max(1, min(size, round(sampled * size / total)))) for name, size in sizes.items()
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        wrong = sum(pool.map(partial(_wrong, file, list(inputs)), parts, chunksize=8))
    return wrong, sum(count for _, count in parts)


def _wrong(file: Path, inputs: list[Path], part: tuple[str, int]) -> int:
    name, count = part

    def taken(path: Path) -> Tensor:
        with safe_open(path, framework="pt") as opened:
            flat: Tensor = opened.get_tensor(name).reshape(-1)
        draw = torch.Generator().manual_seed(len(flat))
        return flat[torch.randperm(len(flat), generator=draw)[:count]]

    expected = reference([taken(path) for path in inputs], [1] * len(inputs))
    found = taken(file)
    return int((found != expected).sum()) if found.dtype == expected.dtype else count


# -- rows ------------------------------------------------------------------------------------------


def measure(case: Case, out: Path, python: Path | str, *, sampled: int, repeats: int) -> list[Row]:
    """The rows of one set; `python` has the peers, or is why there are none."""
    place = out / case.name.replace(" ", "-")
    folders = experts(case, place)
    files = [folder / WEIGHTS_NAME for folder in folders]
    size = files[0].stat().st_size
    moved, copy_moved = (case.count + 1) * size, 2 * case.count * size
    where = f"{case.name}, {case.count} experts of {size / 1e9:.2f} GB in {str(case.dtype)[6:]}"
    soup, copy = place / "soup", place / "copy"
    command = ours(folders, soup)
    run_ours = partial(subprocess.run, command, check=True)
    rows = []
    seconds: dict[bool, float] = {}
    for cold, bar in ((False, OF_COPY_WARM), (True, OF_COPY_COLD)):
        pairs = [
            (
                timed(run_ours, files, soup, cold=cold),
                timed(partial(copied, files, copy), files, copy, cold=cold),
            )
            for _ in range(1 if cold else repeats)
        ]
        seconds[cold] = statistics.median(ours for ours, _ in pairs)
        ratio = statistics.median(moved / ours / (copy_moved / cp) for ours, cp in pairs)
        shown = ", ".join(f"{ours:.1f} s beside {cp:.1f}" for ours, cp in pairs)
        rows.append(
            row(
                f"{where}, {'cold' if cold else 'warm'}: bytes a second", ratio, "of cp",
                against=f"{shown}; {moved / 1e9:.1f} GB against {copy_moved / 1e9:.1f}",
                at_least=bar,
            )
        )  # fmt: skip
    shutil.rmtree(copy)
    rows += _memory(where, command, files, soup)
    wrong, of = differing(soup / WEIGHTS_NAME, files, sampled)
    rows.append(
        row(f"{where}: elements that fractions round otherwise", wrong, f"of {of}", at_most=0)
    )
    for peer in ("mergekit", "sd-mecha"):
        rows += _beside(peer, python, where, files, place / "peers", case, seconds, sampled)
    return rows


def _memory(where: str, command: list[str], files: Sequence[Path], soup: Path) -> list[Row]:
    most = 0

    def watched() -> None:
        nonlocal most
        _, most = anonymous(command)

    timed(watched, files, soup, cold=False)
    script = "import atoll.cli.main, atoll.merge.soup, time; time.sleep(1)"
    _, least = anonymous([sys.executable, "-c", script])
    return [
        row(
            f"{where}: anonymous memory beyond the interpreter's", (most - least) / 2**30, "GiB",
            against=f"{most / 2**30:.2f} GiB and {least / 2**30:.2f} with the same modules; page "
            "cache and mapped files not counted", at_most=ANONYMOUS,
        )
    ]  # fmt: skip


def measure_changes(case: Case, out: Path) -> list[Row]:
    """Of a soup with its running state and of one without: the last expert added and removed."""
    place = out / case.name.replace(" ", "-")
    folders = experts(case, place)
    files = [folder / WEIGHTS_NAME for folder in folders]
    rows = []
    for count in (n for n in COUNTS if n <= case.count):
        *others, last = folders[:count]
        soups = {"state": place / "kept", "rebuild": place / "plain"}
        for way, soup in soups.items():
            shutil.rmtree(soup, ignore_errors=True)
            create = [*ours(others, soup), *(["--state"] if way == "state" else [])]
            subprocess.run(create, check=True)
        size = files[0].stat().st_size
        state = sum(8 * n for n in _elements(files[0]))
        where = f"{case.name}, {count} experts of {size / 1e6:.0f} MB in {str(case.dtype)[6:]}"
        for verb, what, staying in (("add", last, others), ("remove", last.name, others)):
            told: dict[str, dict[str, Any]] = {}
            took: dict[str, float] = {}
            for way, soup in soups.items():
                command = [str(Path(sys.executable).with_name("atoll")), "soup", verb, str(soup)]
                command += [str(what), "--json", "--quiet"]
                os.sync()
                begun = time.perf_counter()
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                took[way], told[way] = time.perf_counter() - begun, json.loads(said.stdout)
            plan, read = told["state"]["plan"], told["state"]["plan"]["read_bytes"]
            # What the way not taken would have read; both write the soup and its state.
            anew = size * len(staying) + (size if verb == "add" else 0)
            other = anew if plan["from_state"] else state + size
            rows += [
                row(
                    f"{where}, {verb}: bytes read", read / other, "of the other way's",
                    against=f"from the {'state' if plan['from_state'] else 'experts'}: "
                    f"{read / 1e9:.2f} GB, {plan['written_bytes'] / 1e9:.2f} written; "
                    f"the other way reads {other / 1e9:.2f}", at_most=1.0,
                ),
                row(
                    f"{where}, {verb}: with the state", took["rebuild"] / took["state"],
                    "times as fast as without",
                    against=f"{took['state']:.1f} s against {took['rebuild']:.1f}, which writes "
                    f"{told['rebuild']['plan']['written_bytes'] / 1e9:.2f} GB",
                ),
                row(
                    f"{where}, {verb}: soups that differ",
                    told["state"]["sha256"] != told["rebuild"]["sha256"], "", at_most=0,
                ),
            ]  # fmt: skip
    return rows


def _elements(file: Path) -> list[int]:
    with safe_open(file, framework="pt") as opened:
        return [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118


def _beside(
    name: str,
    python: Path | str,
    where: str,
    files: Sequence[Path],
    out: Path,
    case: Case,
    seconds: dict[bool, float],
    sampled: int,
) -> list[Row]:
    """One peer's time, and what it rounds otherwise."""
    rows = [
        row(f"{where}, warm: beside {name}", None, "times", at_least=WARM),
        row(f"{where}, cold: beside {name}", None, "times", at_least=COLD),
        row(f"{where}: elements that fractions round otherwise, {name}", None, ""),
    ]
    if isinstance(python, str):
        return [unmeasured(each, python) for each in rows]
    made = peers.peers(python, files, out, str(case.dtype)[6:])
    peer = next(each for each in made if each.name == name)
    fresh = peer.result.parent if peer.result.parent != out else peer.result
    try:
        for place, cold in enumerate((False, True)):
            took = timed(partial(peers.run, peer), files, fresh, cold=cold)
            rows[place] |= row(
                rows[place]["name"], took / seconds[cold], "times",
                against=f"{took:.1f} s against {seconds[cold]:.1f}",
                at_least=rows[place]["bar"], digits=1,
            )  # fmt: skip
        wrong, of = differing(peer.result, files, sampled)
        rows[2] |= row(rows[2]["name"], wrong, f"of {of}")
    except peers.PeerError as error:
        rows = [
            each if each["value"] is not None else unmeasured(each, str(error)) for each in rows
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="a folder for experts, soups and peers")
    parser.add_argument("--quick", action="store_true", help="tiny experts, without peers")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    python: Path | str = "with --quick peers are left out"
    if not given.quick:
        try:
            python = peers.environment(given.out / "environment")
        except peers.PeerError as error:
            python = str(error)
    rows: list[Row] = []
    for case in QUICK if given.quick else FULL:
        rows += measure(
            case, given.out, python,
            sampled=20_000 if given.quick else SAMPLED, repeats=1 if given.quick else REPEATS,
        )  # fmt: skip
    for case in QUICK_CHANGES if given.quick else CHANGES:
        rows += measure_changes(case, given.out)
    show("soup", rows, as_json=given.json)


if __name__ == "__main__":
    main()
