"""Three islands on this machine: one is killed, one freezes and wakes up, one comes late.

    python -m benchmarks.heads OUT

Three real Ray heads, each with a token, ports and a folder of its own, told to `atoll train` by an
`islands.yaml` as clusters of somebody's. Three shards of the handwritten digits are trained on
them while the first head is killed with all below it, the second is stopped for 45 seconds, and
the third is not there before. What is printed is what happened, and `atoll status` at each turn of
it; OUT holds `islands.yaml`, `train.log`, and `watch.txt`, which `atoll status --watch` wrote.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from atoll.cli.digits import write_digits
from atoll.core.manifest import Manifest
from atoll.core.storage import Storage
from atoll.islands.heads import PORTS, Head, HeadOrder, free_ports

FROZEN_SECONDS, LATE_SECONDS, MOST_SECONDS = 45.0, 12.0, 1200.0
NAMES = ("first", "second", "third")
TRAIN = (
    "--passes", "60", "--set", "watch.dead_seconds=18", "--set", "training.checkpoint_seconds=8",
)  # fmt: skip
_began = time.monotonic()


def say(text: str) -> None:
    """A line of what happens, with the seconds since the start."""
    print(f"[{time.monotonic() - _began:6.1f} s] {text}", flush=True)  # noqa: T201


def script() -> str:
    """The command, of the environment that runs this."""
    return str(Path(sys.executable).with_name("atoll"))


def atoll(*arguments: object) -> str:
    """Run a command to its end; what it printed."""
    told = [script(), *map(str, arguments)]
    return subprocess.run(told, check=True, stdout=subprocess.PIPE, text=True).stdout


def family(process: int) -> list[psutil.Process]:
    """A process and all below it."""
    head = psutil.Process(process)
    return [head, *head.children(recursive=True)]


def send(processes: list[psutil.Process], number: int) -> None:
    """A signal to those that are still there."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


class Islands:
    """The heads, and the file that says where they are; a token is there once its head is."""

    def __init__(self, out: Path) -> None:
        self._out = out
        free = free_ports(len(PORTS) * len(NAMES))
        self._ports = {
            name: free[n * len(PORTS) : (n + 1) * len(PORTS)] for n, name in enumerate(NAMES)
        }
        self.file = out / "islands.yaml"
        lines = ["islands:"]
        for name, ports in self._ports.items():
            port = dict(zip(PORTS, ports, strict=True))["--dashboard-port"]
            lines += [
                f"  - name: {name}",
                f"    address: http://127.0.0.1:{port}",
                f"    token_file: {self._token(name)}",
                f"    python: {sys.executable}",
                "    price: 1.5",
            ]
            # Of a head that is yet to come: read anew whenever it is asked.
            self._token(name).touch(mode=0o600)
            self._token(name).write_text("not-yet")
        self.file.write_text("\n".join(lines) + "\n")
        self.heads: dict[str, Head] = {}

    def _token(self, name: str) -> Path:
        return self._out.resolve() / f"token-{name}"

    def start(self, name: str) -> Head:
        """Start one and hand its token over."""
        head = self.heads[name] = Head(HeadOrder(name, cpus=1), self._ports[name])
        head.wait()
        self._token(name).write_text(head.cluster.token)
        say(f"the {name} head answers")
        return head

    def end(self) -> None:
        """End them all, and forget their tokens."""
        for head in self.heads.values():
            send(family(head.process) if head.alive() else [], signal.SIGCONT)
            head.end()
        for name in NAMES:
            self._token(name).unlink()


def disturbed(out: Path, run: Path, islands: Islands) -> int:
    """Train on them under disturbances; the exit code of `atoll train`."""
    shards = list(Manifest.load(Storage(run)).shards)

    def until(what: Callable[[], bool]) -> None:
        end = time.monotonic() + MOST_SECONDS
        while not what():
            if train.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"waited in vain; see {out}/train.log")
            time.sleep(0.5)

    def committed(shard: str) -> int:
        return len(list((run / "islands" / shard).glob("commits/*")))

    def show() -> None:
        print(atoll("status", run), flush=True)  # noqa: T201

    first, second = (islands.start(name) for name in NAMES[:2])
    with (out / "train.log").open("w") as log:
        train = subprocess.Popen(
            [script(), "train", str(run), "--islands", str(islands.file), *TRAIN],
            stdout=log, stderr=log,
        )  # fmt: skip
    with (out / "watch.txt").open("w") as looked:
        watch = subprocess.Popen([script(), "status", str(run), "--watch"], stdout=looked)
    try:
        until(lambda: all(committed(shard) >= 2 for shard in shards[:2]))
        say(f"{shards[0]} and {shards[1]} have committed twice")
        show()
        frozen, killed = family(second.process), family(first.process)
        send(frozen, signal.SIGSTOP)
        stopped = time.monotonic()
        send(killed, signal.SIGKILL)
        say(f"the second head is stopped ({len(frozen)} processes), the first killed "
            f"({len(killed)})")  # fmt: skip
        time.sleep(LATE_SECONDS)
        show()
        islands.start(NAMES[2])
        time.sleep(max(0.0, stopped + FROZEN_SECONDS - time.monotonic()))
        show()
        send(frozen, signal.SIGCONT)
        say(f"the second head goes on after {time.monotonic() - stopped:.0f} s")
        code = train.wait(MOST_SECONDS)
        say(f"atoll train has ended with {code}")
        show()
        watch.wait(60)
        say(f"atoll status --watch has ended with {watch.returncode}")
    finally:
        for process in (train, watch):
            process.terminate()
            process.wait()
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="a new or empty folder")
    out: Path = parser.parse_args().out
    os.environ["COLUMNS"] = "150"  # so wide are tables
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: name another folder, or remove it")
    run = out / "run"
    atoll("partition", write_digits(Storage(out)), run, "--shards", len(NAMES))
    atoll("base", run, "--passes", 20)
    islands = Islands(out)
    try:
        code = disturbed(out, run, islands)
    finally:
        islands.end()
    for name in ("controller-journal.jsonl", "journal.jsonl"):
        for file in sorted(run.glob(f"islands/*/{name}")):
            print(f"{file.parent.name}, {name}:\n{file.read_text()}")  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
