"""Stop when the installed `atoll` is another checkout: its code would be tested, not this one."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_configure() -> None:
    here = Path(__file__).resolve().parent
    try:
        import atoll.core
    except ImportError as error:
        pytest.exit(f"atoll is not installed ({error}); run `pip install -e {here}[dev]`", 4)
    installed = Path(atoll.core.__file__).resolve().parent
    if installed != here / "core":
        pytest.exit(
            f"The installed atoll is {installed}, the tests are those of {here}; "
            f"run `pip install -e {here}[dev]`",
            4,
        )
