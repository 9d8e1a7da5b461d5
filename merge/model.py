"""What is averaged as one: a diffusers component, a whole pipeline, or a single safetensors file.

In: a path. Out: the networks' weights by the names that their files have in a soup, and all else
that belongs to them: configurations, tokenizers, schedulers. Nothing here knows an architecture:
what a folder holds is what counts.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atoll.core.denoiser import CARD_NAME
from atoll.core.digest import canonical_json, sha256_named
from atoll.core.errors import MissingError, Refused, UsageError
from atoll.merge.lora import FILE_NAME as ADAPTER_NAME
from atoll.merge.lora import is_adapter
from atoll.merge.recipe import RECIPE_NAME, SOUP_KEY
from atoll.merge.weights import UNREAD, Reader, Weights, find_weights

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
# Weights of a single file have no name of their own in a soup, whatever their files are called.
FILE_NAME = "soup.safetensors"
WEIGHTS_SUFFIX = ".safetensors"
TEXTS = (".json", ".txt", ".model", ".jinja", ".bpe", ".tiktoken")
# What a library notes about who wrote a configuration, from where and in which dtype the weights
# were; no part of what it configures. The second are left out of a soup, of which they are untrue.
_WRITERS = ("_diffusers_version", "transformers_version")
_UNTRUE = ("_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype")


class Model:
    """One thing to average; a context manager that opens and closes its weights.

    `weights` are by the name that their file has in a soup, relative to its folder, `texts` the
    content of all other files likewise, and `name` is what the path is called.
    """

    def __init__(
        self, path: Path, weights: Mapping[str, Weights], texts: Mapping[str, bytes]
    ) -> None:
        self.path = path
        self.name = model_name(path)
        self.weights = dict(sorted(weights.items()))
        self.texts = dict(sorted(texts.items()))
        self._closing = ExitStack()
        self._read_before = ""

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for weights in self.weights.values():
                opened.enter_context(weights)
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def sha256(self) -> str:
        """Hex sha256 of an open model's weights file; of several, over `sha256  name` lines.

        Whoever reads it several times asks after each: `Refused` if it was another before.
        """
        home = self.path if self.path.is_dir() else self.path.parent
        digests = {
            file.relative_to(home).as_posix(): digest
            for weights in self.weights.values()
            for file, digest in weights.sha256().items()
        }
        found = sha256_weights(digests)
        if self._read_before not in ("", found):
            raise Refused(f"{self.path} changed while it was read", cure="run the command again")
        self._read_before = found
        return found

    @property
    def is_soup(self) -> bool:
        """Whether any weights say that they are averaged, wherever they were copied to."""
        return any(SOUP_KEY in weights.metadata for weights in self.weights.values())

    @property
    def is_adapter(self) -> bool:
        """Whether it is of low-rank adapters, whose halves are not averaged by themselves."""
        return any(is_adapter(weights) for weights in self.weights.values())

    @property
    def dtypes(self) -> list[str]:
        """Those of all tensors, by the format's names, sorted."""
        layouts = [w.layout for w in self.weights.values()]
        return sorted({layout.dtype for each in layouts for layout in each.values()})

    def config(self, name: str) -> dict[str, Any] | None:
        """What a configuration says but for notes on its writing; None of any other file.

        Two models are alike in a file if this is equal, and of any other if its bytes are.
        """
        if not _configures(name):
            return None
        return _without(json.loads(self.texts[name]), (*_WRITERS, *_UNTRUE))

    def written(self, name: str) -> bytes:
        """A text file as it lies in a soup: of a configuration, without what is untrue of one."""
        content = self.texts[name]
        if not _configures(name):
            return content
        config = json.loads(content)
        kept = _without(config, _UNTRUE)
        return content if kept == config else canonical_json(kept)


def model_name(path: Path) -> str:
    """What a path is called: a component that lies in a pipeline by the pipeline's name."""
    path = Path(os.path.abspath(path))  # as it is called here: a hub's cache links to digests
    if path.suffix == WEIGHTS_SUFFIX:
        return path.stem
    return path.parent.name if (path.parent / PIPELINE_NAME).is_file() else path.name


def sha256_weights(digests: Mapping[str, str]) -> str:
    """A sole file's digest, or that of the `sha256  name` lines of several."""
    return next(iter(digests.values())) if len(digests) == 1 else sha256_named(digests)


def open_model(path: Path, variant: str | None = None, reader: Reader | None = None) -> Model:
    """Find the parts of what lies at a path; weights are opened later.

    Of a `variant` those parts are taken that have it. A `reader` gives the bytes of weights' files
    that are only stood for here. Raises `UsageError` where there is nothing,
    `MissingError` where a network has no weights, and `Refused` for what is damaged.
    """
    model = _opened(path, variant, reader)
    files = [file for weights in model.weights.values() for file in weights.paths]
    # Adapters have none, and are added to a base that may.
    varied = model.is_adapter or any(f".{variant}" in file.name for file in files)
    if variant is not None and not varied:
        raise MissingError(
            f"No weights of {path} are of the variant '{variant}'",
            allowed=", ".join(sorted({file.name for file in files})),
            cure="leave out --variant",
        )
    return model


def _opened(path: Path, variant: str | None, reader: Reader | None) -> Model:
    if path.is_file():
        return _of_file(path, reader)
    if (path / PIPELINE_NAME).is_file():
        return _of_pipeline(path, variant, reader)
    if (path / CONFIG_NAME).is_file():
        return _of_component(path, variant, reader)
    if (path / ADAPTER_NAME).is_file():
        return Model(path, {ADAPTER_NAME: Weights([path / ADAPTER_NAME], reader)}, {})
    if path.is_dir():
        raise MissingError(
            f"There is neither {PIPELINE_NAME} nor {CONFIG_NAME} in {path}",
            allowed="a diffusers pipeline, a component of one, or a .safetensors file",
        )
    raise UsageError(
        f"There is nothing at {path}",
        allowed="a diffusers pipeline, a component of one, or a .safetensors file",
    )


def _of_file(path: Path, reader: Reader | None) -> Model:
    if path.suffix != WEIGHTS_SUFFIX:
        raise Refused(
            f"{path} is not a safetensors file",
            allowed="NAME.safetensors",
            cure="save it as safetensors; pickles are not read",
        )
    weights = Weights([path], reader)
    return Model(path, {ADAPTER_NAME if is_adapter(weights) else FILE_NAME: weights}, {})


def _of_component(path: Path, variant: str | None, reader: Reader | None) -> Model:
    name, files = find_weights(path, variant)
    content = _read(path / CONFIG_NAME)
    return Model(path, {name: Weights(files, reader)}, {CONFIG_NAME: content})


def _of_pipeline(path: Path, variant: str | None, reader: Reader | None) -> Model:
    content = _read(path / PIPELINE_NAME)
    index = json.loads(content)
    if index.get("_class_name") == "AtollPipeline":
        raise Refused(
            f"{path} is an ensemble", allowed="experts", cure="name the experts that are in it"
        )
    weights, texts = {}, {PIPELINE_NAME: content}
    for name, declared in index.items():
        # Beside components there are switches of the pipeline, and components that it goes without.
        if name.startswith("_") or not isinstance(declared, list) or declared[:2] == [None, None]:
            continue
        if not _is_component(name):
            raise Refused(f"{path}/{PIPELINE_NAME} names '{name}'", allowed="folders beside it")
        folder = path / name
        if not folder.is_dir():
            raise MissingError(f"{path}/{PIPELINE_NAME} names {name}, which is not there")
        # What is in these would be in the soup, and not in its recipe.
        if (folder / CARD_NAME).is_file() or (folder / RECIPE_NAME).is_file():
            raise Refused(
                f"The component {name} of {path} is an expert or a soup of Atoll's",
                allowed="pipelines of others",
                cure=f"name {folder} itself, or the ingredients of a soup",
            )
        left = []
        for file in sorted(folder.iterdir()):
            if file.name.startswith("."):
                continue  # somebody's notes
            if file.suffix in TEXTS and ".index." not in file.name and file.is_file():
                texts[f"{name}/{file.name}"] = _read(file)
            elif file.suffix not in (WEIGHTS_SUFFIX, ".json", *UNREAD):
                left.append(file.name)
        if left:
            log.warning("%s is not copied from %s", ", ".join(left), folder)
        # A network without its configuration is damaged; what has neither is none.
        if (folder / CONFIG_NAME).is_file():
            stem, files = find_weights(folder, variant)
            weights[f"{name}/{stem}"] = Weights(files, reader)
        elif any(folder.glob(f"*{WEIGHTS_SUFFIX}")):
            raise MissingError(f"There are weights in {folder}, and no {CONFIG_NAME}")
    if not weights:
        raise MissingError(f"No component of {path} has weights")
    return Model(path, weights, texts)


def _is_component(name: str) -> bool:
    """Whether a name from a stranger's file is that of a folder below, and of nothing else."""
    taken = ("", CARD_NAME, RECIPE_NAME, PIPELINE_NAME)
    return name not in taken and name[:1] != "." and "/" not in name and name.isprintable()


def _configures(name: str) -> bool:
    """Whether a text file is a configuration; a vocabulary may have any word among its keys."""
    base = name.rpartition("/")[2]
    return base in (CONFIG_NAME, PIPELINE_NAME) or base.endswith("_config.json")


def _read(path: Path) -> bytes:
    """A text file; a configuration is checked to be one."""
    content = path.read_bytes()
    if _configures(path.name):
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path} is not readable JSON ({error})") from error
        if not isinstance(found, dict):
            raise Refused(f"{path} is not an object")
    return content


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
