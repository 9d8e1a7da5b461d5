"""What the command line says of itself: help, versions, usage errors, JSON, verbosity."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

import atoll as package
from atoll.cli.main import app
from tests.cli.conftest import atoll, done

COMMANDS = [
    ("demo",), ("partition",), ("recipes",), ("base",), ("train",), ("status",), ("logs",),
    ("stop",), ("resume",), ("assemble",), ("sample",), ("evaluate",),
    ("unlearn",), ("verify",), ("soup", "create"), ("soup", "loo"), ("soup", "add"),
    ("soup", "remove"), ("soup", "verify"), ("soup", "show"),
]  # fmt: skip


def registered() -> set[tuple[str, ...]]:
    names = {(str(command.name),) for command in app.registered_commands}
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        for command in group.typer_instance.registered_commands:
            names.add((str(group.name), str(command.name)))
    return names


def test_every_command_is_known_here() -> None:
    assert registered() == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command(command: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        said = atoll(*command, flag)
        assert said.code == 0
        assert f"Example: atoll {' '.join(command)}" in " ".join(said.out.split())
        for option in ("--json", "--verbose", "--quiet"):
            assert option in said.out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_example_parses(command: tuple[str, ...]) -> None:
    # With an option that does not exist the first complaint is about that one.
    said = atoll(*command, "--no-such-option", "--json")
    assert said.code == 2
    assert "--no-such-option" in said.error["what"]
    assert "--help" in said.error["cure"]


def test_bare_and_version() -> None:
    bare = atoll()
    assert bare.code == 2
    assert "Usage: atoll" in bare.out
    assert all(command[0] in bare.out for command in COMMANDS)
    assert atoll("soup").code == 2
    version = atoll("--version")
    assert (version.code, version.out.strip()) == (0, f"atoll {package.__version__}")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from atoll.cli.main import run\n"
        "try:\n"
        "    run(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'diffusers', 'pyarrow', 'numpy', 'pydantic', 'faiss', 'PIL',\n"
        "         'open_clip', 'matplotlib', 'sklearn', 'fsspec'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["trian", "x"], "Did you mean 'train'"),
        (["soup", "crate", "x"], "create"),
        (["train"], "RUN"),
        (["train", "x", "--minute", "1"], "--minutes"),
        (["train", "x", "--minutes", "soon"], "--minutes"),
        (["train", "x", "--minutes", "0"], "minutes"),
        (["sample", "x", "--steps", "0"], "steps"),
        (["sample", "x", "--count", "0"], "count"),
        (["sample", "x", "--guidance", "-1"], "guidance"),
        (["evaluate", "x"], "--reference"),
        (["evaluate", "x", "--reference", "y", "--count", "3"], "count"),
        (["demo", "--shards", "1"], "shards"),
        (["demo", "--minutes", "0"], "minutes"),
        (["partition", "a", "b", "--fit-on", "al"], "fit-on"),
        (["partition", "a"], "RUN"),
        (["verify"], "RUN|CERTIFICATE"),
        (["logs", "x"], "SHARD"),
        (["status", "x", "--every", "0"], "every"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(given: list[str], named: str) -> None:
    plain = atoll(*given)
    assert plain.code == 2
    assert plain.out == ""
    assert plain.err.startswith("atoll: ")
    assert named in plain.err
    assert atoll(*given, "--json").error["code"] == 2


def test_fit_on_takes_its_choices(corpus, tmp_path) -> None:
    for choice in ("commons", "all"):
        made = done(
            "partition", corpus, tmp_path / choice, "--shards=2", "--commons=0.25",
            f"--fit-on={choice}", "--set", "fit.steps=1",
        )  # fmt: skip
        manifest = json.loads((tmp_path / choice / "manifest.json").read_text())
        seen = sorted(made["shards"]) if choice == "all" else []
        assert manifest["encoder"]["fitted_on"] == manifest["partition"]["fitted_on"] == seen
        done("verify", tmp_path / choice)


def test_quiet_and_verbose(made) -> None:
    said = atoll("verify", made)
    assert said.code == 0
    assert "ok  every artefact is in the ledger" in said.out
    assert atoll("verify", made, "-q").out == ""
    quiet = atoll("sample", made, "x", "--steps=2", "--out", made.parent / "q", "-q", "--json")
    assert quiet.json["pictures"]
    assert quiet.err == ""
    assert "sampling" in atoll("sample", made, "x", "--steps=2", "--out", made.parent / "q").err
    assert atoll("soup", "show", made / "soups/all", "-v").code == 0


def test_a_place_that_cannot_be_written_is_no_traceback(made, tmp_path) -> None:
    (tmp_path / "file").write_text("here first")
    said = atoll("sample", made, "x", "--steps=1", "--out", tmp_path / "file", "--json")
    assert said.code == 1
    assert "file" in said.error["what"]
