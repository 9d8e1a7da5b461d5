"""What stands at RUN before a partition: nothing, the same partition, remains, or another's files.

The command's configuration lies in `partition/atoll.config.json`; digests of the corpora lie in
the ledger's notes, because the manifest must read the same when a shard's records never were in
the corpus.
"""

from __future__ import annotations

import json
from typing import Any

from atoll.core.config import CONFIG_NAME, parse_config, save_config
from atoll.core.errors import Refused
from atoll.core.journal import log
from atoll.core.ledger import Ledger
from atoll.core.manifest import MANIFEST_NAME, Manifest
from atoll.core.storage import Storage
from atoll.partitioner.readers import source_sha256
from atoll.partitioner.settings import PartitionConfig, commons_fraction, names_a_corpus

FOLDER = "partition"
_CONFIG = f"{FOLDER}/{CONFIG_NAME}"
_MADE_HERE = ("encoder", "vae", "commons", "shards", FOLDER)


def corpora(corpus: str, config: PartitionConfig) -> dict[str, str]:
    """sha256 of the corpus, and of the commons where it is a corpus of its own."""
    found = {"corpus": source_sha256(corpus)}
    if commons_fraction(config) is None and names_a_corpus(config.commons):
        found["commons"] = source_sha256(config.commons)
    return found


def finished(corpus: str, run: Storage, config: PartitionConfig) -> Manifest | None:
    """The manifest of the same partition, if it was finished; `Refused` if another one was."""
    if not run.exists(MANIFEST_NAME):
        return None
    manifest = Manifest.load(run)
    earlier = saved_config(run)
    differing = _differences(earlier.model_dump(mode="json"), config.model_dump(mode="json"))
    if not differing:
        # Last, since it reads the whole corpus.
        entry = Ledger(run).latest("partition", FOLDER)
        known = {} if entry is None else entry.note
        now = corpora(corpus, config)
        differing = [f"the {name}'s files" for name in sorted(now) if now[name] != known.get(name)]
    if differing:
        raise Refused(
            f"{run.uri} is partitioned already, with other settings: {', '.join(differing)}",
            allowed="the same command again, which changes nothing",
            cure="give another RUN, or remove this one first",
        )
    log.info("%s is already partitioned", run.uri)
    return manifest


def saved_config(run: Storage) -> PartitionConfig:
    """The configuration that the run was partitioned with."""
    try:
        values = run.read_json(_CONFIG)
    except FileNotFoundError as error:
        raise Refused(
            f"{run.uri}/{_CONFIG} is missing", cure="restore it from a copy; nothing was changed"
        ) from error
    if isinstance(values, dict):
        values.pop("schema_version", None)
    return parse_config(PartitionConfig, values)


def start_anew(run: Storage, config: PartitionConfig) -> None:
    """Clear the remains of a partition that was interrupted; `Refused` where they are not ours."""
    # Not `exists`: a disk that was full from the start leaves an empty folder.
    standing = [name for name in _MADE_HERE if run.list(name)]
    if standing and not run.exists(_CONFIG):
        raise Refused(
            f"{run.uri} holds {', '.join(standing)}, which no partition wrote",
            cure="give another RUN",
        )
    # The configuration goes last and comes first: by it the rest is known to be ours.
    for name in _MADE_HERE:
        run.remove(name)
    save_config(config, run, FOLDER)


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Each dotted key whose value changed, with both values."""
    found: list[str] = []
    for key in sorted({*earlier, *now}):
        one, other = earlier.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key} was {json.dumps(one)}, now {json.dumps(other)}")
    return found
