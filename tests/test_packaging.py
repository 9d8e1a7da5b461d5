"""What is declared is what is there, and what a wheel carries works away from the checkout."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import atoll

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PYPROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUP["package-dir"]
NOT_PACKAGES = {"tests", "examples", "docs", "benchmarks", "build", "dist", "out"}


def test_packages_are_the_folders_with_an_init() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py"))
        if path.relative_to(ROOT).parts[0] not in NOT_PACKAGES and path.parts[-2][0] != "."
    }
    listed = {FOLDERS[name] for name in SETUP["packages"]}
    assert listed == {folder for folder in found if not folder.startswith(".")}
    assert set(SETUP["packages"]) == set(FOLDERS)
    for name, folder in FOLDERS.items():
        assert name == ("atoll" if folder == "package" else f"atoll.{folder.replace('/', '.')}")


def test_every_folder_with_modules_has_an_init() -> None:
    for path in ROOT.glob("*/*.py"):
        folder = path.parent.relative_to(ROOT).parts[0]
        if folder not in NOT_PACKAGES and not folder.startswith("."):
            assert (path.parent / "__init__.py").exists(), path


def data_files() -> set[str]:
    """Files of the packages that are no modules, as paths inside a wheel."""
    return {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


def test_typing_links_are_complete_relative_and_lead_here() -> None:
    links = {path.name: path for path in (ROOT / ".typing" / "atoll").iterdir()}
    wanted = {FOLDERS[name] for name in FOLDERS if name != "atoll"}
    assert set(links) == {*wanted, "__init__.py", "py.typed"}
    for name, link in links.items():
        assert link.is_symlink(), name
        assert not link.readlink().is_absolute(), name
        target = ROOT / ("package" if "." in name else "") / name
        assert link.resolve() == target.resolve(), name


def test_version_is_one() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert SETUP["dynamic"]["version"] == {"attr": "package.__version__"}
    code = (ROOT / "package" / "__init__.py").read_text()
    assert f'__version__ = "{atoll.__version__}"' in code
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        assert atoll.__version__ in changelog.read_text()


def test_console_script_leads_to_a_function() -> None:
    scripts = PYPROJECT["project"]["scripts"]
    assert list(scripts) == ["atoll"]
    module, function = scripts["atoll"].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"def {function}(" in Path(spec.origin).read_text()


def test_bare_imports_of_every_package_are_banned() -> None:
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == {folder for folder in FOLDERS.values() if folder != "package"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without the network, by the setuptools that is installed."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs setuptools and pip, which the dev extra brings")
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
            "--no-index", "--disable-pip-version-check", "-q", "-w", str(built), str(source),
        ],
        capture_output=True, text=True, cwd=built,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = built.glob("*.whl")
    return found


def test_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).glob("*.py")
    }
    assert held == modules | data_files()
    assert {f"{name.replace('.', '/')}/py.typed" for name in FOLDERS} <= held
    assert "atoll/partitioner/report.html" in held
    assert {"atoll/evaluate/report.html", "atoll/evaluate/style.html"} <= held


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "atoll"
    assert metadata["Version"] == atoll.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "atoll = atoll.cli.main:run" in scripts
    wanted = {name.partition(">")[0] for name in PYPROJECT["project"]["dependencies"]}
    required = {r.partition(">")[0] for r in metadata.get_all("Requires-Dist") if "extra" not in r}
    assert required == wanted


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel, and our dependencies but not our checkout."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    site = Path(paths["purelib"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A folder named in a .pth is searched; the .pth files in it, the editable one too, are not run.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin" / "python"


def _where(python: Path, code: str, *, cwd: Path) -> list[str]:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("inside_a_clone", [False, True])
def test_installed_wheel_is_what_is_imported(
    installed: Path, tmp_path: Path, inside_a_clone: bool
) -> None:
    code = (
        "import atoll, atoll.core.storage, atoll.cli.main, importlib.resources as r;"
        "print(atoll.__file__, atoll.core.storage.__file__, atoll.__version__,"
        "      r.files('atoll.evaluate').joinpath('report.html'))"
    )
    said = _where(installed, code, cwd=ROOT if inside_a_clone else tmp_path)
    site = installed.parent.parent
    for path in (said[0], said[1], said[3]):
        assert Path(path).is_relative_to(site)
        assert Path(path).exists()
    assert said[2] == atoll.__version__


def test_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['atoll', '--version']; from atoll.cli.main import run; run()"
    assert _where(installed, code, cwd=tmp_path) == ["atoll", atoll.__version__]


def test_guard_stops_when_another_checkout_is_installed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "core").mkdir()
    (tmp_path / "test_x.py").write_text("def test_x(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 4
    assert "The installed atoll is" in done.stdout + done.stderr
    assert str(ROOT / "core") in done.stdout + done.stderr
    assert "1 passed" not in done.stdout
