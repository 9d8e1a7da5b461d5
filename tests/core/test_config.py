"""Typed configuration: dotted overrides, what is refused and how, and the record on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from atoll.core.config import (
    CONFIG_NAME,
    Config,
    apply_overrides,
    load_config,
    parse_config,
    remembering,
    save_config,
    saved_config,
)
from atoll.core.errors import ConfigError, ExitCode, Failed, Interrupted, MissingError, Refused
from atoll.core.storage import Storage


class Inner(Config):
    rate: float = Field(default=0.1, gt=0)
    name: str | None = None
    kind: Literal["a", "b"] = "a"


class Middle(Config):
    inner: Inner = Inner()
    steps: int = Field(default=3, ge=1)
    maybe: Inner | None = None


class Outer(Config):
    seed: int = 0
    training: Middle = Middle()
    sizes: tuple[int, ...] = (8, 8)
    flag: bool = False
    text: str = ""


def refusal(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Outer(), overrides)
    assert caught.value.exit_code == ExitCode.CONFIGURATION == 3
    return str(caught.value)


def test_override_changes_one_field_and_nothing_else() -> None:
    before = Outer(seed=5, training=Middle(steps=9))
    after = apply_overrides(before, ["training.inner.rate=0.5"])
    assert after == Outer(seed=5, training=Middle(steps=9, inner=Inner(rate=0.5)))
    assert before == Outer(seed=5, training=Middle(steps=9))
    assert apply_overrides(before, []) == before


def test_a_part_that_may_be_absent_is_begun_by_its_first_key() -> None:
    after = apply_overrides(Outer(), ["training.maybe.rate=0.5", "training.maybe.name=x"])
    assert after.training.maybe == Inner(rate=0.5, name="x")
    assert apply_overrides(after, ["training.maybe=null"]) == Outer()
    assert apply_overrides(Outer(), ['training.maybe={"kind": "b"}']).training.maybe == Inner(
        kind="b"
    )
    assert "training.maybe.rate" in refusal(["training.maybe.rat=0.5"])
    assert "training.maybe.rate" in refusal(['training.maybe={"rat": 0.5}'])


def test_values_are_json_where_they_parse_else_text() -> None:
    after = apply_overrides(
        Outer(),
        [
            "seed=-7",
            "training.inner.rate=1e-3",
            "training.inner.name=a=b c",
            "training.inner.kind=b",
            "sizes=[1, 2, 3]",
            "flag=true",
            'training={"steps": 2, "inner": {"name": "whole"}}',
            "training.inner.rate=2",
        ],
    )
    assert after.seed == -7
    assert after.sizes == (1, 2, 3)
    assert after.flag is True
    assert after.training == Middle(steps=2, inner=Inner(name="whole", rate=2))
    assert apply_overrides(Outer(), ["training.inner.name=a=b"]).training.inner.name == "a=b"
    assert apply_overrides(after, ["training.inner.name=null"]).training.inner.name is None


@pytest.mark.parametrize("value", ["007", "7", "1.5", "true", "null", "[1]", '"quoted"', "x", ""])
def test_text_that_looks_like_json_is_still_text_where_text_is_wanted(value: str) -> None:
    wanted = "quoted" if value == '"quoted"' else value
    assert apply_overrides(Outer(), [f"text={value}"]).text == wanted


def test_later_overrides_win() -> None:
    assert apply_overrides(Outer(), ["seed=1", "seed=2"]).seed == 2
    assert "training=3 is not valid" in refusal(["training=3", "training.steps=1"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("sead=1", "seed"),
        ("trainin.steps=1", "training"),
        ("training.step=1", "training.steps"),
        ("training.inner.rat=1", "training.inner.rate"),
        ("training.iner.rate=1", "training.inner"),
        ('training={"stepz": 1}', "training.steps"),
        ('training={"inner": {"rates": 1}}', "training.inner.rate"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, meant: str) -> None:
    text = refusal([override])
    assert "Unknown configuration key" in text
    assert f"Did you mean '{meant}'?" in text
    assert "Allowed:" in text


@pytest.mark.parametrize("override", ["seed.x=1", "=1", "training..steps=1", ".=1", "sizes.0=1"])
def test_key_that_leads_nowhere_is_unknown(override: str) -> None:
    assert "Unknown configuration key" in refusal([override])


@pytest.mark.parametrize("override", ["seed", "", "training.steps"])
def test_no_equals_sign_is_refused_with_the_form(override: str) -> None:
    assert "Allowed: KEY=VALUE, such as seed=7" in refusal([override])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=abc", "seed='abc'"),
        ("seed=1.5", "seed=1.5"),
        ("training.steps=0", "training.steps=0"),
        ("training.inner.rate=-1", "training.inner.rate=-1"),
        ("training.inner.rate=NaN", "training.inner.rate=nan"),
        ("training.inner.kind=c", "training.inner.kind='c'"),
        ("training=3", "training=3"),
        ("sizes=8", "sizes=8"),
    ],
)
def test_wrong_value_names_key_and_value(override: str, key: str) -> None:
    text = refusal([override])
    assert key in text
    assert "Cure:" in text


@given(st.builds(Outer, seed=st.integers(), text=st.text(st.characters(codec="utf-8"))))
def test_configuration_survives_its_record(config: Outer) -> None:
    run = Storage("memory://config")
    save_config(config, run, "x")
    assert load_config(Outer, run.local(f"x/{CONFIG_NAME}")) == config


def test_record_lies_beside_the_result_with_its_schema(tmp_path: Path) -> None:
    run = Storage(tmp_path)
    config = apply_overrides(Outer(), ["training.inner.rate=0.25"])
    save_config(config, run, "")
    save_config(config, run, "base")
    assert run.list() == [CONFIG_NAME, f"base/{CONFIG_NAME}"]
    values = run.read_json(CONFIG_NAME)
    assert values.pop("schema_version") == 1
    assert values == json.loads(config.model_dump_json())
    assert load_config(Outer, tmp_path / CONFIG_NAME) == config


@pytest.mark.parametrize("before", [None, Outer(seed=1)])
@pytest.mark.parametrize("refusal", [ConfigError, MissingError, Refused])
def test_what_is_refused_is_not_remembered(
    tmp_path: Path, before: Outer | None, refusal: type[Exception]
) -> None:
    run = Storage(tmp_path)
    if before is not None:
        save_config(before, run, "x")

    def refused() -> None:
        with remembering(Outer(seed=2), run, "x"):
            assert saved_config(Outer, run, "x") == Outer(seed=2)  # meanwhile it may be killed
            raise refusal("no")

    with pytest.raises(refusal):
        refused()
    assert saved_config(Outer, run, "x") == before


def test_a_refusal_is_told_though_storage_is_away_by_then(tmp_path: Path) -> None:
    run = Storage(tmp_path)

    def away(_name: str) -> None:
        raise Failed("no answer")

    def refused() -> None:
        with remembering(Outer(seed=2), run, "x"):
            run.remove = away  # type: ignore[method-assign]
            raise Refused("no")

    with pytest.raises(Refused):
        refused()


@pytest.mark.parametrize("end", [None, Failed, Interrupted, KeyboardInterrupt, OSError])
def test_what_goes_wrong_later_or_otherwise_is_remembered(
    tmp_path: Path, end: type[BaseException] | None
) -> None:
    run = Storage(tmp_path)

    def ended() -> None:
        with remembering(Outer(seed=2), run, "x") as begun:
            if end is not None:
                raise end("no")
            begun()
            raise Refused("no")  # the word of one island, and another has begun

    with pytest.raises(end or Refused):
        ended()
    assert saved_config(Outer, run, "x") == Outer(seed=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a readable configuration"),
        ("[1]", "A configuration is a JSON object"),
        ("3", "A configuration is a JSON object"),
        ('{"sead": 1}', "Did you mean 'seed'?"),
        ('{"training": {"step": 1}}', "Did you mean 'training.steps'?"),
        ('{"seed": "x"}', "seed='x' is not valid"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, tmp_path / "c.json")
    assert said in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a readable configuration"):
        load_config(Outer, tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="not a readable configuration"):
        load_config(Outer, tmp_path)


def test_hand_written_file_may_be_partial() -> None:
    assert parse_config(Outer, {"training": {"steps": 5}}) == Outer(training=Middle(steps=5))


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Outer().seed = 1  # type: ignore[misc]
