"""Places: the schema of `islands.yaml`, which says where shards are trained.

An island is a Ray head that Atoll starts on this machine (`local: true`) or one that is there
already (`address`). The file never holds a secret: it names the environment variable or the file
that does, and a token written into it is refused without being repeated.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from atoll.core.config import Config, parse_config
from atoll.core.errors import AtollError, ConfigError, MissingError, UsageError, did_you_mean

# Ray's own order; an island that names no token of its own may rely on these.
RAY_TOKEN, RAY_TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_SECRETS = ("token", "password", "secret", "authorization", "headers", "auth")
_NAMED = "name the variable with token_env, or the file with token_file"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_TOKEN = r"[!-~]+"


class Tls(Config):
    """How an https address is checked: by a CA file, by the system's (the default), or not."""

    ca: str | None = None
    verify: bool = True


class Resources(Config):
    """What one job asks the island for, all workers together; None takes what training needs."""

    workers: int | None = Field(default=None, ge=1)  # None: the command's
    cpus: int | None = Field(default=None, ge=1)
    gpus: int | None = Field(default=None, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)


class Island(Config):
    """One place: what it is, how it is reached, what it holds, and what it costs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    # Either a head of our own on this machine, and what it offers; None divides what is there.
    local: bool = False
    cpus: int | None = Field(default=None, ge=1)
    gpus: int | None = Field(default=None, ge=0)
    memory_gib: float | None = Field(default=None, gt=0)
    # Or the Jobs API of a cluster that is there already.
    address: str | None = None
    token_env: str | None = None
    token_file: str | None = None
    tls: Tls = Tls()
    prefix: str | None = None  # the run's URI as this island reaches it, where that is another
    python: str = "python"  # the interpreter there
    ship: bool = True  # send our code along, so that nothing of ours has to be installed there
    # Both.
    jobs: int | None = Field(default=None, ge=1)  # shards at once; None: 1, or what a head holds
    resources: Resources = Resources()
    price: float | None = Field(default=None, ge=0)  # per hour and job, in any currency
    labels: dict[str, str] = Field(default_factory=dict)  # for people
    shards: tuple[str, ...] = ()  # pinned: these and no others, and nowhere else

    @model_validator(mode="before")
    @classmethod
    def _check_secrets(cls, values: Any) -> Any:
        _no_secret(values)
        return values

    @field_validator("token_env", mode="before")
    @classmethod
    def _a_variable(cls, value: Any) -> Any:
        # Not repeated: whoever mistakes this key pastes the token itself.
        if value is not None and not (isinstance(value, str) and re.fullmatch(_VARIABLE, value)):
            raise ConfigError(
                "token_env is not the name of an environment variable",
                allowed="a name such as ISLAND_A_TOKEN",
                cure="export the token under such a name; its value belongs into no file here",
            )
        return value

    @field_validator("address", "prefix", mode="before")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        if isinstance(value, str) and "@" in value.partition("://")[2].partition("/")[0]:
            raise ConfigError(
                "An address or prefix carries credentials before its '@'",
                allowed="https://HOST:PORT, s3://BUCKET/PATH",
                cure=f"{_NAMED}; a store's credentials belong into the island's environment",
            )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Island:
        if self.local == (self.address is not None):
            raise ConfigError(
                f"Island '{self.name}' is to be either local or an address",
                allowed="`local: true`, or `address: https://HOST:PORT`",
            )
        stray = [
            key
            for key in (
                ("token_env", "token_file", "prefix", "tls", "python", "ship")
                if self.local
                else ("cpus", "gpus", "memory_gib")
            )
            if getattr(self, key) != type(self).model_fields[key].default
        ]
        if stray:
            kind = "local" if self.local else "an address"
            raise ConfigError(
                f"Island '{self.name}' is {kind}, and {', '.join(stray)} has no meaning there",
                cure="remove it; what one job takes is said below `resources`",
            )
        if self.address is not None:
            self._check_address(self.address)
        if self.price is not None and not math.isfinite(self.price):
            raise ConfigError(f"The price of island '{self.name}' is not a number")
        return self

    def _check_address(self, address: str) -> None:
        scheme, _, host = address.partition("://")
        if scheme not in ("http", "https") or not host or set(host) & set(" ?#"):
            raise UsageError(
                f"'{address}' is not an address of a Ray Jobs API",
                allowed="http://HOST:PORT or https://HOST:PORT",
            )
        if self.tls != Tls() and scheme != "https":
            raise ConfigError(
                f"Island '{self.name}' has tls settings and an address without TLS",
                cure="write https://, or remove tls",
            )
        if self.token_env is not None and self.token_file is not None:
            raise ConfigError(
                f"Island '{self.name}' has two tokens", allowed="token_env or token_file"
            )

    def token_place(self) -> tuple[str, str]:
        """The environment variable or else the file that holds the token; neither: it has none."""
        if self.token_env is not None:
            return self.token_env, ""
        if self.token_file is not None:
            return "", self.token_file
        if os.environ.get(RAY_TOKEN, "").strip():
            return RAY_TOKEN, ""
        return "", os.environ.get(RAY_TOKEN_PATH, "")

    def token(self) -> str:
        """The token as it is there now; empty where an island has none."""
        variable, file = self.token_place()
        if variable:
            if not (found := os.environ.get(variable, "").strip()):
                raise MissingError(
                    f"The environment has no {variable}, the token of island '{self.name}'",
                    cure=f"export {variable} before the command",
                )
        elif file:
            found = self._token_in(file)
        else:
            return ""
        if not re.fullmatch(_TOKEN, found):
            # Not repeated, and never sent: a header's error would quote it.
            raise MissingError(
                f"{variable or file} holds something else than the token of island '{self.name}'",
                allowed="one word of printable ASCII",
            )
        return found

    def _token_in(self, path: str) -> str:
        key = RAY_TOKEN_PATH if self.token_file is None else "token_file"
        try:
            found = Path(path).expanduser().read_text().strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise MissingError(
                f"The token file of island '{self.name}' ({key}) cannot be read: {reason}"
            ) from None
        if not found:
            raise MissingError(f"The token file of island '{self.name}' ({key}) is empty")
        return found

    def takes(self, shard: str, others: Iterable[Island] = ()) -> bool:
        """Whether a shard may be trained here: pins hold for islands and for shards."""
        if self.shards:
            return shard in self.shards
        return not any(shard in other.shards for other in others)


def _no_secret(values: Any) -> None:
    """Refuse a key that holds a secret, without repeating it."""
    for key in values if isinstance(values, Mapping) else ():
        if str(key).lower() in _SECRETS:
            raise ConfigError(f"'{key}' would put a secret into a file", cure=_NAMED)


def check_islands(islands: Iterable[Island], shards: Iterable[str] | None = None) -> None:
    """What holds for a list and not for one: unique names, no shared token, pins that exist."""
    islands = list(islands)
    names = [island.name for island in islands]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Two islands are named {', '.join(twice)}", cure="rename one")
    bare = [i.name for i in islands if i.address and not (i.token_env or i.token_file)]
    if len(bare) > 1:
        raise ConfigError(
            f"{', '.join(bare)} would all be sent the token of {RAY_TOKEN}",
            cure="give each island a token_env or a token_file of its own",
        )
    known = None if shards is None else list(shards)
    for island in islands:
        for shard in island.shards if known is not None else ():
            assert known is not None
            if shard not in known:
                raise UsageError(
                    f"Island '{island.name}' is for '{shard}', which this run does not have. "
                    f"{did_you_mean(shard, known)}".strip(),
                    allowed=", ".join(known),
                )


def read_islands(path: str | Path) -> tuple[Island, ...]:
    """The islands of an `islands.yaml`; `ConfigError` says which island and which key."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable file ({error})") from error
    except yaml.YAMLError as error:
        # Its own words quote the line, and the line may hold what no log should.
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f", line {line + 1}"
        raise ConfigError(f"{path}{where} is not YAML", allowed="see docs/islands.yaml") from None
    if not isinstance(values, dict) or not isinstance(values.get("islands"), list):
        raise ConfigError(f"{path} holds no list of islands", allowed="islands: [{name: ...}, ...]")
    if stray := [str(key) for key in values if key not in ("islands", "schema_version")]:
        raise ConfigError(
            f"{path} has an unknown key '{stray[0]}'",
            allowed="islands",
        )
    if not values["islands"]:
        raise ConfigError(f"{path} lists no island", cure="leave out --islands for one local head")
    folder, entries = Path(path).parent, enumerate(values["islands"], 1)
    islands = tuple(_island(entry, f"{path}, island {n}", folder) for n, entry in entries)
    check_islands(islands)
    return islands


def _anchored(island: Island, folder: Path) -> Island:
    """Relative paths are the file's, so that a saved configuration means the same anywhere."""
    token_file, ca = (
        None if name is None else str((folder / Path(name).expanduser()).absolute())
        for name in (island.token_file, island.tls.ca)
    )
    tls = island.tls.model_copy(update={"ca": ca})
    return island.model_copy(update={"token_file": token_file, "tls": tls})


def _island(values: Any, where: str, folder: Path) -> Island:
    name = values.get("name") if isinstance(values, dict) else None
    named = f"{where} ({name})" if isinstance(name, str) else where
    try:
        if isinstance(values, dict):
            _no_secret(values)
            values = {str(key): value for key, value in values.items()}
        return _anchored(parse_config(Island, values), folder)
    except (ConfigError, UsageError) as error:
        kind: type[AtollError] = type(error)
        raise kind(
            f"{named}: {error.what}",
            allowed=error.allowed,
            cure=error.cure.replace("--set or of the --config file", "the file"),
        ) from None
