"""A small real run, made by the commands themselves; copied by every test that changes it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from atoll.cli.main import run as console_script
from tests.sharing import shared
from tests.waiting import PATIENCE_SECONDS, until

SHARD = "shard-01"  # the one that the tests take out
SHARDS = ("shard-00", "shard-01", "shard-02")
PARTITION = ("--shards=3", "--commons=0.25", "--holdout=0.15", "--set", "fit.steps=20")
BASE = (
    "--recipe=unet-tiny", "--passes=1", "--set", "training.checkpoints=1",
    "--set", "trunk.images=256", "--set", "trunk.width=8",
)  # fmt: skip
TRAIN = (
    "--passes=1", "--set", "training.checkpoints=2", "--set", "head.images=128",
    "--set", "head.batch=16", "--set", "head.bands=2",
    "--set", "preview=4", "--set", "preview_steps=2", "--set", "slots=2",
)  # fmt: skip
# What holds clocks, process ids or the removal itself.
ASIDE = ("ledger/", "certificate.json", ".lock")
CLOCKS = ("heartbeat.json", "journal.jsonl")
CLAIMS = "/gen/"  # each says who claims, and nobody else says the same


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        found = json.loads(lines[0])
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked for its form."""
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert set(error) == {"code", "what", "allowed", "cure"}
        assert error["code"] == self.code
        assert error["what"]
        assert "Traceback" not in self.err
        return dict(error)


def atoll(*arguments: object) -> Said:
    """Run a command in this process, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            console_script([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Said(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> dict[str, Any]:
    """Run a command that succeeds; its `--json` object."""
    said = atoll(*arguments, "--json")
    assert said.code == 0, (said.out, said.err[-2000:])
    return said.json


def interrupted(arguments: list[str], begun: Callable[[], bool]) -> Said:
    """Start a command as a process, wait until its work has begun, and press Ctrl-C."""
    script = "from atoll.cli.main import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        until(begun, by=process, every=0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert "leaked" not in err, err  # as libraries complain where an interpreter ends untidily
    return Said(process.returncode, out, err)


def count(folder: Path) -> int:
    """How many entries a folder holds, if it is there; those on their way aside."""
    return len([path for path in folder.glob("*") if path.name[0] != "."])


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by name -> sha256; the lock aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def content(run: Path) -> dict[str, str]:
    """Every file of a run that a removal must leave as if the shard had never been."""
    return {
        name: sha256
        for name, sha256 in tree(run).items()
        if not name.startswith(ASIDE) and not name.endswith(CLOCKS) and CLAIMS not in name
    }


def write_corpus(path: Path, count: int, *, without: Collection[tuple[bytes, str]] = ()) -> Path:
    """The first digits of scikit-learn as Parquet, less some pairs of image and caption."""
    digits = load_digits()
    rows: list[dict[str, object]] = []
    for picture, label in zip(digits.images[:count], digits.target[:count], strict=True):
        buffer = io.BytesIO()
        Image.fromarray((picture * 15.9375).astype("uint8")).save(buffer, format="PNG")
        caption = f"a handwritten {label}"
        if (buffer.getvalue(), caption) not in without:
            rows.append({"image": buffer.getvalue(), "caption": caption, "label": str(label)})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "digits.parquet"
    return shared(tmp_path_factory, "corpus", lambda to: write_corpus(to / name, 300)) / name


@pytest.fixture(scope="session")
def partitioned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `partition` leaves it."""

    def make(folder: Path) -> None:
        made = done("partition", corpus, folder / "run", *PARTITION)
        assert sorted(made["shards"]) == list(SHARDS)

    return shared(tmp_path_factory, "partitioned", make) / "run"


@pytest.fixture(scope="session")
def based(partitioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `base` leaves it."""

    def make(folder: Path) -> None:
        run = shutil.copytree(partitioned, folder / "run")
        assert done("base", run, *BASE)["recipe"] == "unet-tiny"

    return shared(tmp_path_factory, "based", make) / "run"


@pytest.fixture(scope="session")
def trained(based: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `train` leaves it."""

    def make(folder: Path) -> None:
        run = shutil.copytree(based, folder / "run")
        assert done("train", run, *TRAIN)["trained"] == list(SHARDS)

    return shared(tmp_path_factory, "trained", make) / "run"


@pytest.fixture(scope="session")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run: experts, ensemble, a soup of all and a soup of one."""
    return (
        shared(tmp_path_factory, "whole", lambda to: complete(shutil.copytree(trained, to / "run")))
        / "run"
    )


def complete(run: Path) -> None:
    """What follows training."""
    assert done("assemble", run)["missing"] == []
    experts = [f"{place}=2" for place in sorted((run / "islands").glob("*/expert"))]
    done("soup", "create", run / "soups/all", *experts)


@pytest.fixture
def fresh(made: Path, tmp_path: Path) -> Path:
    """A copy of the whole run to change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def untouched() -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """Checks that a folder holds the same bytes afterwards."""

    @contextlib.contextmanager
    def check(folder: Path):
        before = tree(folder)
        yield
        assert tree(folder) == before

    return check
