"""islands.yaml: what it says, what is refused and how, and that no secret is ever repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.core.config import apply_overrides, load_config, save_config
from atoll.core.errors import AtollError, ConfigError, MissingError, UsageError
from atoll.core.places import Island, check_islands, read_islands
from atoll.core.storage import Storage

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "7f3a9c0d1e2b4a5968778695a4b3c2d1"


def write(folder: Path, text: str) -> Path:
    (folder / "islands.yaml").write_text(text)
    return folder / "islands.yaml"


def refused(folder: Path, entry: str) -> AtollError:
    with pytest.raises(AtollError) as raised:
        read_islands(write(folder, f"islands:\n  - {{name: a, {entry}}}\n"))
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None
    return raised.value


def test_the_example_is_read_and_every_key_of_it_is_used() -> None:
    desk, hall, archive = read_islands(ROOT / "docs/islands.yaml")
    assert (desk.local, desk.cpus, desk.jobs) == (True, 2, 1)
    assert hall.tls.ca == "/etc/atoll/hall-ca.pem"
    assert (hall.resources.cpus, hall.resources.gpus) == (8, 1)
    assert hall.prefix == "s3://atoll-runs/flowers"
    assert (hall.price, hall.labels["gpu"]) == (2.49, "L40S")
    assert archive.shards == ("shard-02",)
    check_islands([desk, hall, archive], ["shard-00", "shard-02"])


def test_a_pinned_shard_goes_to_its_island_and_nowhere_else() -> None:
    islands = read_islands(ROOT / "docs/islands.yaml")
    takes = {i.name: [s for s in ("shard-00", "shard-02") if i.takes(s, islands)] for i in islands}
    assert takes == {"desk": ["shard-00"], "hall": ["shard-00"], "archive": ["shard-02"]}
    with pytest.raises(UsageError, match=r"'shard-02', which this run.*Did you mean 'shard-20'"):
        check_islands(islands, ["shard-00", "shard-20"])


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("adress: http://h:1", "Did you mean 'address'"),
        ("local: true, resources: {cpu: 1}", "Did you mean 'resources.cpus'"),
        ("local: true, cpus: none", "cpus="),
        ("local: true, cpus: 0", "cpus=0"),
        ("local: true, price: -1", "price=-1"),
        ("local: true, price: .inf", "price"),
        ("local: true, address: http://h:1", "either local or an address"),
        ("cpus: 1", "either local or an address"),
        ("local: true, prefix: s3://b/run", "prefix has no meaning"),
        ("local: true, token_env: A", "token_env has no meaning"),
        ("address: http://h:1, cpus: 1", "cpus has no meaning"),
        ("address: http://h:1, tls: {verify: false}", "without TLS"),
        ("address: https://h:1, token_env: A, token_file: b", "two tokens"),
        ("address: ray://h:1", "not an address"),
        ("address: h:8265", "not an address"),
        ("local: true, name: a b", "name="),
    ],
)
def test_what_is_refused(tmp_path: Path, entry: str, named: str) -> None:
    error = refused(tmp_path, entry)
    assert "islands.yaml, island 1" in str(error)
    assert named in str(error)


@pytest.mark.parametrize(
    "entry",
    [
        f"address: http://h:1, token: {SECRET}",
        f"address: http://h:1, Token: {SECRET}",
        f"address: http://h:1, headers: {{Authorization: {SECRET}}}",
        f"address: http://h:1, token_env: {SECRET}",
        f"address: http://h:1, token_env: [{SECRET}]",
        f"address: https://user:{SECRET}@h:1",
        f"address: http://h:1, prefix: s3://key:{SECRET}@bucket/run",
        f"address: http://h:1, labels: {{a: b}}, secret: {SECRET}",
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, entry: str) -> None:
    assert isinstance(refused(tmp_path, entry), ConfigError)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no list of islands"),
        ("[]", "no list of islands"),
        ("islands: {a: 1}", "no list of islands"),
        ("islands: []", "lists no island"),
        ("islands: [7]", "JSON object"),
        ("islands: [{name: a, local: true}]\nisland: 1", "unknown key 'island'"),
        (f"islands: [{{name: a, token: {SECRET}", "line 1 is not YAML"),
        ("islands: !!python/object/apply:os.system ['true']", "not YAML"),
        ("islands: [{name: a, local: true}, {name: a, local: true}]", "Two islands are named a"),
        (
            "islands: [{name: a, address: 'http://a:1'}, {name: b, address: 'http://b:1'}]",
            "a, b would all be sent",
        ),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        read_islands(write(tmp_path, text))
    assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match="not a readable file"):
        read_islands(tmp_path / "nowhere.yaml")


def test_a_token_comes_from_where_it_is_said_to_be(tmp_path: Path, monkeypatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MINE"):
        monkeypatch.delenv(name, raising=False)
    held = tmp_path / "token"
    held.write_text(f"{SECRET}\n")
    place = {"name": "a", "address": "http://h:1"}
    assert Island(**place).token() == ""
    assert Island(**place, token_file=str(held)).token() == SECRET
    with pytest.raises(MissingError, match="has no MINE"):
        Island(**place, token_env="MINE").token()
    monkeypatch.setenv("MINE", SECRET)
    assert Island(**place, token_env="MINE").token() == SECRET
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(held))
    assert Island(**place).token() == SECRET
    # A token pasted where its file belongs is not repeated either.
    with pytest.raises(MissingError) as raised:
        Island(**place, token_file=SECRET).token()
    assert SECRET not in str(raised.value)
    held.write_text("")
    with pytest.raises(MissingError, match="is empty"):
        Island(**place, token_file=str(held)).token()
    # What no header can carry would be quoted by the error that says so.
    for text in (f"{SECRET}\n{SECRET}", f"Bearer {SECRET}", f"{SECRET}\u2026"):
        held.write_text(text)
        with pytest.raises(MissingError, match=r"token holds something else") as raised:
            Island(**place, token_file=str(held)).token()
        assert SECRET not in str(raised.value)


def test_where_a_token_is_can_be_said_without_reading_it(monkeypatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    place = {"name": "a", "address": "http://h:1"}
    assert Island(**place).token_place() == ("", "")
    assert Island(**place, token_env="MINE").token_place() == ("MINE", "")
    assert Island(**place, token_file="/held").token_place() == ("", "/held")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home")
    assert Island(**place).token_place() == ("", "/home")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    assert Island(**place).token_place() == ("RAY_AUTH_TOKEN", "")


def test_what_a_command_saves_is_read_again(tmp_path: Path) -> None:
    from atoll.islands.settings import TrainConfig

    told = read_islands(ROOT / "docs/islands.yaml")
    config = TrainConfig(islands=told)
    save_config(config, Storage(tmp_path), "islands")
    again = load_config(TrainConfig, tmp_path / "islands/atoll.config.json")
    assert again == config
    assert apply_overrides(again, ["islands=[]"]).islands == ()
