"""A command's options, its --config file and its --set overrides become one configuration."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from atoll.core.config import Config, apply_overrides, load_config

C = TypeVar("C", bound=Config)


def resolve(
    kind: type[C],
    config: str | None,
    overrides: list[str] | None,
    *,
    earlier: C | None = None,
    **options: Any,
) -> C:
    """The configuration of a command: defaults, then --config, then options, then --set.

    What an earlier command of this run was told takes the place of the defaults, so that a bare
    command resumes. An option's name is its dotted key with two underscores for a dot; None means
    not given.
    """
    start = load_config(kind, config) if config else earlier or kind()
    given = [
        f"{name.replace('__', '.')}={json.dumps(value)}"
        for name, value in options.items()
        if value is not None
    ]
    return apply_overrides(start, [*given, *(overrides or [])])
