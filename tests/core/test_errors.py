"""Exit codes are an interface: each is pinned, and every error says what to do."""

from __future__ import annotations

import json

import pytest

from atoll.core import errors
from atoll.core.errors import AtollError, ExitCode, did_you_mean

# ARCHITECTURE: "Exit codes".
TABLE = {
    errors.Failed: 1,
    errors.UsageError: 2,
    errors.ConfigError: 3,
    errors.DataError: 4,
    errors.MissingError: 5,
    errors.Interrupted: 6,
    errors.Refused: 7,
    errors.Fenced: 8,
}


@pytest.mark.parametrize(("kind", "code"), TABLE.items(), ids=lambda v: getattr(v, "__name__", v))
def test_exit_code(kind: type[AtollError], code: int) -> None:
    assert int(kind("x").exit_code) == code
    assert issubclass(kind, AtollError)


def test_table_is_complete() -> None:
    assert set(AtollError.__subclasses__()) == set(TABLE)
    assert {int(code) for code in ExitCode} == {0, *TABLE.values()}


def test_text_has_what_allowed_and_cure() -> None:
    error = errors.UsageError("There is no shard 'x'", allowed="a, b", cure="give a or b")
    assert str(error) == "There is no shard 'x'. Allowed: a, b. Cure: give a or b."
    assert str(errors.Failed("What?", cure="Look!")) == "What? Cure: Look!"
    assert str(errors.Failed("alone")) == "alone."


def test_json_form_has_the_four_keys() -> None:
    error = errors.Refused("é", allowed="1", cure="do")
    assert error.as_dict() == {"code": 7, "what": "é", "allowed": "1", "cure": "do"}
    assert json.loads(json.dumps(error.as_dict())) == error.as_dict()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("ful", "Did you mean 'full'?"), ("top_k", "Did you mean 'top-k'?"), ("zzzz", ""), ("", "")],
)
def test_did_you_mean_names_the_nearest_or_nothing(given: str, wanted: str) -> None:
    assert did_you_mean(given, ["full", "once", "top-k"]) == wanted


def test_did_you_mean_takes_any_iterable() -> None:
    assert did_you_mean("shard01", {"shard-01": 1, "shard-12": 2}) == "Did you mean 'shard-01'?"
    assert did_you_mean("x", iter(())) == ""
