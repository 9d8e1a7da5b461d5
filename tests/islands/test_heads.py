"""What a local head is told by its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.core.ledger import SIGNING_KEY
from atoll.islands import heads


def test_nobody_else_signs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A head's jobs run what they are sent; the key of who signs certificates is not theirs."""
    monkeypatch.setenv(SIGNING_KEY, "secret")
    monkeypatch.setenv("ATOLL_OTHER", "kept")
    told = heads._environment(heads.HeadOrder("a", 1), tmp_path / "token")
    assert SIGNING_KEY not in told
    assert told["ATOLL_OTHER"] == "kept"
