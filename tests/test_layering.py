"""The shape of the project, read from its syntax: who imports whom, what only one file does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in _SETUP["package-dir"].items()}

# ARCHITECTURE, "Folders": what each package may import besides itself and `atoll`.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "partitioner": {"core"},
    "islands": {"core"},
    "router": {"core"},
    "merge": {"core"},
    "evaluate": {"core", "router"},
    "deploy": {"core", "router"},
    "cli": {"core", "partitioner", "islands", "router", "merge", "evaluate", "deploy"},
    "atoll": set(),
}

# The only files that may import these.
ONLY_IN: dict[str, set[str]] = {
    # Its Jobs API is spoken over HTTP, its heads are processes; Train launches workers.
    "ray": {"islands/workers.py"},
    "faiss": {"partitioner/cluster.py"},
    "open_clip": {"core/embedding.py"},
    "timm": {"core/embedding.py"},
    "sklearn": {"cli/digits.py"},
}
FASTAPI = {"fastapi", "starlette", "uvicorn"}


def package_of(path: Path) -> str:
    folder = path.parent.relative_to(ROOT).as_posix()
    by_folder = {where.relative_to(ROOT).as_posix(): name for name, where in FOLDERS.items()}
    name = by_folder[folder]
    return name.split(".")[1] if "." in name else name


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()
TREES = {path: ast.parse(path.read_text()) for path in MODULES.values()}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names of all that is imported; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the bodies of functions, not TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


def places(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield relative(path), node


def where(path: str, node: ast.AST) -> str:
    return f"{path}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:100]}"


# -- who imports whom ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", TREES, ids=relative)
def test_siblings_do_not_import_each_other(path: Path) -> None:
    package = package_of(path)
    for name in imports(TREES[path]):
        parts = name.split(".")
        if parts[0] == "atoll" and len(parts) > 1 and f"atoll.{parts[1]}" in FOLDERS:
            allowed = {package, *ALLOWED[package]}
            assert parts[1] in allowed, f"{package} imports {name}; allowed: {sorted(allowed)}"


@pytest.mark.parametrize("path", TREES, ids=relative)
def test_our_packages_are_never_imported_bare(path: Path) -> None:
    bare = {name.removeprefix("atoll.") for name in FOLDERS if name != "atoll"} | {"package"}
    assert not bare & {name.split(".")[0] for name in imports(TREES[path])}


def _graph(*, lazy: bool) -> dict[str, set[str]]:
    return {
        name: {i for i in imports(TREES[path], lazy=lazy) if i in MODULES} - {name, "atoll"}
        for name, path in MODULES.items()
    }


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*trail, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := visit(name, []):
            return found
    return []


def test_there_is_no_import_cycle() -> None:
    assert _cycle(_graph(lazy=False)) == []


def test_there_is_no_import_cycle_of_lazy_imports_either() -> None:
    assert _cycle(_graph(lazy=True)) == []


def test_cycles_would_be_found() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_are_imported_in_one_file(library: str) -> None:
    found = {
        relative(path)
        for path, tree in TREES.items()
        if library in {name.split(".")[0] for name in imports(tree)}
    }
    assert found <= ONLY_IN[library]


def test_web_server_is_imported_in_one_file_at_most() -> None:
    found = {
        relative(path)
        for path, tree in TREES.items()
        if FASTAPI & {name.split(".")[0] for name in imports(tree)}
    }
    assert len(found) <= 1


def _loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_training_step_loads_nothing_heavier_than_torch_diffusers_and_safetensors() -> None:
    loaded = _loaded_by("atoll.islands.step")
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"ray", "faiss", "open_clip", "pyarrow", "timm", "typer", "sklearn"}


def test_who_starts_islands_does_not_wait_for_diffusers() -> None:
    """It takes seconds to load, before which no Ray head would be started."""
    loaded = _loaded_by("atoll.islands.supervise")
    assert "torch" in loaded
    assert not loaded & {"diffusers", "ray", "scipy", "tensorboard"}


@pytest.mark.parametrize("module", ["atoll.merge.verify", "atoll.cli.recording"])
def test_who_makes_a_soup_does_not_wait_for_diffusers(module: str) -> None:
    """It would take longer to load than small models take to average."""
    loaded = _loaded_by(module)
    assert "torch" in loaded
    assert not loaded & {"diffusers", "ray", "scipy", "open_clip", "sklearn"}


def test_command_line_loads_nothing_heavy() -> None:
    loaded = _loaded_by("atoll.cli.main")
    assert not loaded & {"torch", "diffusers", "ray", "faiss", "open_clip", "pyarrow", "sklearn"}


def test_packages_are_a_docstring() -> None:
    for name, folder in FOLDERS.items():
        tree = TREES[folder / "__init__.py"]
        assert ast.get_docstring(tree), name
        rest = [ast.unparse(node) for node in tree.body[1:]]
        if name == "atoll.router":  # diffusers finds a pipeline's class only so
            assert rest == [
                "import atoll.router.pipeline as pipeline",
                "__all__ = ['pipeline']",
            ]
        elif name == "atoll":
            assert [line.split(" =")[0] for line in rest] == ["__version__"]
        else:
            assert rest == []


# -- what only one file does ---------------------------------------------------------------------

_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "poisson",
}  # fmt: skip
_DRAWING_METHODS = {
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_",
    "geometric_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "trunc_normal_", "orthogonal_",
}  # fmt: skip


def _draws(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        dotted = ast.unparse(node)
        return (
            (dotted.startswith("torch.") and dotted.split(".")[1] in _DRAWS)
            or node.attr in _DRAWING_METHODS
            or dotted in ("torch.Generator", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")
            or dotted.startswith(("np.random", "numpy.random"))
        )
    return False


def test_only_seeds_makes_randomness() -> None:
    # A draw from a generator that is handed to it is a function of what seeds made.
    handed = {
        node.func
        for _, node in places(ast.Call)
        if isinstance(node, ast.Call) and "generator" in {k.arg for k in node.keywords}
    }
    found = [
        where(path, node)
        for path, node in places(ast.Attribute)
        if path != "core/seeds.py" and _draws(node) and node not in handed
    ]
    found += [
        f"{relative(path)}: {name}"
        for path, tree in TREES.items()
        if path != ROOT / "core/seeds.py"
        for name in imports(tree)
        if name == "random" or name.startswith(("random.", "numpy.random"))
    ]
    assert found == []


def test_global_generator_is_seeded_only_in_a_fork_and_from_seeds() -> None:
    for path, tree in TREES.items():
        forked = {
            call
            for block in ast.walk(tree)
            if isinstance(block, ast.With)
            and any("torch.random.fork_rng" in ast.unparse(i.context_expr) for i in block.items)
            for call in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.manual_seed":
                assert node in forked, where(relative(path), node)
                seed = ast.unparse(node.args[0])
                assert "seeds.key(" in seed or seed == "seed", where(relative(path), node)


def _one_minus(node: ast.AST) -> str | None:
    """`t` of `1 - t` (or `1 - expand(t, x)`)."""
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and isinstance(node.left, ast.Constant)
        and node.left.value == 1
    ):
        return ast.unparse(node.right)
    return None


def _interpolates(node: ast.AST) -> bool:
    """`(1 - t) * a + t * b` in any order of factors and terms."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
        return False
    terms = [
        (term.left, term.right)
        for term in (node.left, node.right)
        if isinstance(term, ast.BinOp) and isinstance(term.op, ast.Mult)
    ]
    if len(terms) != 2:
        return False
    for one, other in (terms, terms[::-1]):
        times = {t for t in map(_one_minus, one) if t}
        if times & {ast.unparse(factor) for factor in other}:
            return True
    return False


_ENDS = re.compile(r"noise.*data|data.*noise|epsilon.*x_t|x_t.*epsilon|x_t.*data|data.*x_t")


def _forms_a_target(node: ast.AST) -> bool:
    """A difference of two points of the path: x_noise - x_data, epsilon - x_t, x_t - x_data."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and isinstance(node.left, ast.Name | ast.Attribute)
        and isinstance(node.right, ast.Name | ast.Attribute)
        and bool(_ENDS.search(f"{ast.unparse(node.left)} {ast.unparse(node.right)}"))
    )


def test_only_flow_interpolates_and_forms_targets() -> None:
    found = [
        (path, where(path, node))
        for path, node in places(ast.BinOp)
        if _interpolates(node) or _forms_a_target(node)
    ]
    assert [text for path, text in found if path != "core/flow.py"] == []
    assert len(found) >= 4  # that the patterns still find what flow does


@pytest.mark.parametrize(
    "text", ["(1 - t) * a + t * b", "t * b + (1 - t) * a", "a * (1 - t) + b * t"]
)
def test_interpolation_would_be_found(text: str) -> None:
    assert _interpolates(ast.parse(text, mode="eval").body)


def test_nothing_is_pickled_or_evaluated() -> None:
    modules_ = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {
        "torch.load", "torch.save", "np.load", "numpy.load", "np.save", "eval", "exec", "compile",
        "__import__", "importlib.import_module", "yaml.load",
    }  # fmt: skip
    found = [
        f"{relative(path)}: {name}"
        for path, tree in TREES.items()
        for name in imports(tree)
        if name.split(".")[0] in modules_
    ]
    found += [
        where(path, node)
        for path, node in places(ast.Call)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    ]
    assert found == []


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"}
    tracked = [*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py"), *ROOT.glob("*/*/")]
    assert [relative(p) for p in tracked if p.stem in drawers] == []


def test_no_importable_folder_is_named_like_the_package() -> None:
    # It would shadow an installed wheel for everybody who stands in a clone.
    assert not (ROOT / "atoll").exists()
    assert not (ROOT / "atoll.py").exists()
