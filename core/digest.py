"""What a file, a folder and a value are named by: sha256 over their bytes, in one canonical layout.

What a stranger recomputes with coreutils and a JSON library; nothing here knows of a store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """Hex sha256 of one local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path, names: Iterable[str] | None = None) -> str:
    """Hex sha256 over the sorted `sha256  relative/name` lines of the files below a local folder.

    The same text as `sha256sum` prints, so that a stranger can recompute it with coreutils. `names`
    are the files that count where it is not all of them.
    """
    files = path.rglob("*") if names is None else (path / name for name in names)
    return sha256_named(
        {file.relative_to(path).as_posix(): sha256_file(file) for file in files if file.is_file()}
    )


def sha256_named(digests: Mapping[str, str]) -> str:
    """What `sha256_folder` gives for files of these names and digests."""
    lines = (f"{sha256}  {name}\n" for name, sha256 in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one layout of JSON on disk: sorted keys, two spaces, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
