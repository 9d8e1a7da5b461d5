"""At work on a run: one command at a time, on what the manifest recorded, after any removal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atoll.core.errors import Refused
from atoll.core.lock import exclusive
from atoll.core.manifest import MANIFEST_NAME, Artefact, Manifest, check_artefact
from atoll.core.storage import Storage

# Written when a removal begins and removed when it has ended.
INTENT_NAME = "unlearn.json"
_HUBS = ("hf", "http", "https")


def check_no_removal(run: Storage) -> None:
    """Refuse to work on a run in the middle of a removal."""
    if run.exists(INTENT_NAME):
        shard = run.read_json(INTENT_NAME)["shard"]
        raise Refused(
            f"A removal of {shard} from {run.uri} was interrupted",
            cure=f"finish it first: `atoll unlearn {run.uri} {shard}`",
        )


@contextmanager
def working_on(run: str | Path) -> Iterator[tuple[Storage, Manifest]]:
    """Hold a run for one command; its manifest is as it stands while nobody else may change it.

    Raises `UsageError` where there is no run, and `Refused` while another command is at work on it
    or when a removal is not finished.
    """
    storage = Storage(run)
    Manifest.load(storage)  # no lock in a folder that is no run
    with exclusive(storage):
        check_no_removal(storage)
        yield storage, Manifest.load(storage)


def owning_run(folder: Path) -> Path | None:
    """The nearest folder above that holds a manifest, or None."""
    for parent in folder.resolve().parents:
        if (parent / MANIFEST_NAME).is_file() and _is_run(Storage(parent)):
            return parent
    return None


def _is_run(place: Storage) -> bool:
    """Whether a manifest is one of a run: others call files so too."""
    try:
        found = place.read_json(MANIFEST_NAME)
    except Refused:
        return True  # it is damaged, and its run too; better said there than not at all
    return isinstance(found, dict) and "schema_version" in found


def run_of(place: Path | str) -> Path | str | None:
    """The run that a path or a URI lies in, or None."""
    return owning_run(place) if isinstance(place, Path) else owning_run_afar(place)


def owning_run_afar(uri: str) -> str | None:
    """Likewise of a URI; on a hub, where nothing is written in place, lies none."""
    scheme, _, path = uri.rstrip("/").partition("://")
    if scheme in _HUBS:
        return None
    parts = path.split("/")
    for end in range(len(parts) - 1, 0, -1):
        home = f"{scheme}://{'/'.join(parts[:end])}"
        # Who may read one folder need not be allowed to look into those above.
        with suppress(PermissionError):
            if Storage(home).exists(MANIFEST_NAME) and _is_run(Storage(home)):
                return home
    return None


def check_recorded(place: Path | str) -> None:
    """Refuse a folder that its run records with another digest; strangers' folders may pass."""
    if isinstance(place, str):
        home: Path | str | None = owning_run_afar(place)
        name = "" if home is None else place.rstrip("/")[len(str(home)) + 1 :]
    else:
        home = owning_run(place)
        name = "" if home is None else place.resolve().relative_to(home).as_posix()
    if home is None:
        return
    run = Storage(home)
    check_no_removal(run)
    recorded = Manifest.load(run).artefacts().get(name)
    if recorded is not None:
        check_artefact(run, Artefact(path=name, sha256=recorded))
