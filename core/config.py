"""Typed configuration: dotted overrides with a did-you-mean, and the resolved record on disk.

A configuration is a pydantic model owned by the package that reads it. `--set a.b=c` changes one
field; what a command really ran with is saved beside its result as `atoll.config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from atoll.core.errors import ConfigError, MissingError, Refused, did_you_mean
from atoll.core.outage import unless_away
from atoll.core.storage import Storage

CONFIG_NAME = "atoll.config.json"


class Config(BaseModel):
    """Base of every configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def _check_key(kind: type[BaseModel], dotted: str) -> Any:
    """The type of a dotted key's field; a key that no field answers to is refused."""
    here: type[BaseModel] | None = kind
    annotation: Any = None
    for depth, part in enumerate(dotted.split(".")):
        fields = here.model_fields if here is not None else {}
        if part not in fields:
            prefix = ".".join(dotted.split(".")[:depth])
            known = [f"{prefix}.{name}" if prefix else name for name in fields]
            raise ConfigError(
                f"Unknown configuration key '{dotted}'. {did_you_mean(dotted, known)}".strip(),
                allowed=", ".join(known) if known else f"'{prefix}' has no keys below it",
                cure="correct the key of --set or of the --config file",
            )
        annotation = fields[part].annotation
        here = _model(annotation)
    return annotation


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is, or may be where it may be None."""
    may_be = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    models = [one for one in may_be if isinstance(one, type) and issubclass(one, BaseModel)]
    return models[0] if models else None


def _value(text: str, annotation: Any) -> Any:
    """JSON where it parses, except where it would be a number and the field is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    as_is = isinstance(value, str) or (value is None and annotation == str | None)
    return text if annotation in (str, str | None) and not as_is else value


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """A copy with each `a.b=value` applied; values are JSON where they parse, else text."""
    values = config.model_dump(mode="json")
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"'{override}' is not an override", allowed="KEY=VALUE, such as seed=7"
            )
        annotation = _check_key(type(config), dotted)
        *parents, last = dotted.split(".")
        place = values
        for parent in parents:
            if place[parent] is None:  # a part that may be absent, begun by its first key
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{parent}={place!r} is not valid: '{override}' is below it")
        place[last] = _value(text, annotation)
    return parse_config(type(config), values)


def parse_config(kind: type[C], values: Any) -> C:
    """Validate plain values, as the error a user can act on."""
    if not isinstance(values, dict):
        raise ConfigError("A configuration is a JSON object", allowed='{"key": value, ...}')
    for name in values:
        _check_key(kind, name)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            _check_key(kind, dotted)
        raise ConfigError(
            f"{dotted}={first.get('input')!r} is not valid: {first['msg']}",
            cure="correct the value of --set or of the --config file",
        ) from error


def load_config(kind: type[C], path: str | Path) -> C:
    """Read a configuration that an earlier command saved, or that was written by hand."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable configuration ({error})") from error
    if isinstance(values, dict):
        values.pop("schema_version", None)
    return parse_config(kind, values)


def save_config(config: Config, storage: Storage, folder: str) -> None:
    """Write the resolved configuration beside a result."""
    name = f"{folder}/{CONFIG_NAME}" if folder else CONFIG_NAME
    storage.write_json(name, {"schema_version": 1, **config.model_dump(mode="json")})


def saved_config(kind: type[C], storage: Storage, folder: str) -> C | None:
    """What `save_config` wrote into that folder, if it did."""
    name = f"{folder}/{CONFIG_NAME}"
    return load_config(kind, storage.local(name)) if storage.exists(name) else None


@contextmanager
def remembering(
    config: Config, storage: Storage, folder: str, *, forget: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Save what a command is asked; refused before `begun`, which this yields, it is forgotten.

    The next command then starts from what the one before was asked; `forget` takes back what else
    was written for this one. A failure or an interruption forgets nothing.
    """
    earlier = saved_config(type(config), storage, folder)
    save_config(config, storage, folder)
    begun = Event()
    try:
        yield begun.set
    except (ConfigError, MissingError, Refused):
        if not begun.is_set():
            with unless_away("taking back what was refused"):
                if earlier is None:
                    storage.remove(f"{folder}/{CONFIG_NAME}")
                else:
                    save_config(earlier, storage, folder)
                forget()
        raise


def differences(earlier: Config, asked: Config) -> list[str]:
    """The keys that two configurations of one kind disagree in, each as a sentence says it."""
    found = []
    for name, value in asked:
        before = getattr(earlier, name)
        if isinstance(value, Config) and isinstance(before, Config):
            found += [f"{name}.{line}" for line in differences(before, value)]
        elif value != before:
            found.append(f"{name}={value}, was {before}")
    return found
