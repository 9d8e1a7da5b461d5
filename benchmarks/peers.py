"""Other tools that average models, each run as its users run it, in an environment of its own.

mergekit's `mergekit-pytorch` takes a file of options, sd-mecha a few lines of Python; both take
single safetensors files. What this environment has already (torch) is not installed again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

PACKAGES = {"mergekit": "mergekit", "sd-mecha": "sd-mecha"}

# sd-mecha knows a model by a list of its tensors, and has none of diffusers' own UNets.
_MECHA = """
import json, sys
import sd_mecha
from sd_mecha.extensions import model_configs
out, dtype, *files = sys.argv[1:]
with open(files[0], "rb") as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
lines = ["identifier: benchmark-unet", "components:", "  unet:"]
names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
for name, tensor in header.items():
    if name != "__metadata__":
        lines.append(f"    {name}: {{shape: {tensor['shape']}, dtype: {names[tensor['dtype']]}}}")
config = model_configs.from_yaml(chr(10).join(lines))
model_configs.register(config)
models = [sd_mecha.model(file, config=config) for file in files]
import torch
sd_mecha.merge(sd_mecha.n_average(*models), output=out, output_dtype=getattr(torch, dtype))
"""


class PeerError(Exception):
    """A peer could not be installed, or did not end well; says why."""


@dataclass(frozen=True)
class Peer:
    """How to average safetensors files with equal weights into `result`, below `out`."""

    name: str
    command: list[str]
    result: Path


def environment(folder: Path) -> Path:
    """A Python that has the peers, made in `folder` unless it is there; `PeerError` if it fails."""
    python = folder / "bin/python"
    if (folder / "done").exists():
        return python
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        ours = sysconfig.get_path("purelib")
        theirs = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        Path(theirs.strip(), "beside.pth").write_text(ours)
        _run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES.values()])
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(_last_line(error)) from error
    (folder / "done").touch()
    return python


def peers(python: Path, files: Sequence[Path], out: Path, dtype: str) -> list[Peer]:
    """Every peer's way to the mean of these files."""
    out.mkdir(parents=True, exist_ok=True)
    told = {
        "merge_method": "linear",
        "models": [{"model": str(file), "parameters": {"weight": 1.0}} for file in files],
        "dtype": dtype,
    }
    (out / "mergekit.yaml").write_text(yaml.safe_dump(told))
    (out / "mecha.py").write_text(_MECHA)
    mergekit, mecha = out / "mergekit", out / "mecha.safetensors"
    return [
        Peer(
            "mergekit",
            [str(python.parent / "mergekit-pytorch"), str(out / "mergekit.yaml"), str(mergekit)],
            mergekit / "model.safetensors",
        ),
        Peer(
            "sd-mecha",
            [str(python), str(out / "mecha.py"), str(mecha), dtype, *map(str, files)],
            mecha,
        ),
    ]


def run(peer: Peer, more: Mapping[str, str] | None = None) -> None:
    """Run it to its end; `PeerError` with its last word if that was not a good one."""
    try:
        _run(peer.command, more)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(_last_line(error)) from error
    if not peer.result.exists():
        raise PeerError(f"it left no {peer.result.name}: {sorted(os.listdir(peer.result.parent))}")


def _run(command: Sequence[str], more: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(more or {})}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def _last_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(said).splitlines() if line.strip()]
    return json.dumps(lines[-1][:200])[1:-1] if lines else type(error).__name__
