"""What holds for the house as a whole: rooms, sizes, weight of an import, what may not stand in a file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pathways", "routing", "experts", "tasks", "sharding")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 400

needs_checkout = pytest.mark.skipif(not (ROOT / "pathways").is_dir(), reason="the packages are not beside the tests")


def _run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # A neutral environment: no devices asked for, and packages found as the test's own process finds them.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False
    )


def _tracked() -> list[Path]:
    listed = _run("git", "ls-files", "-z")
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return _run(sys.executable, "-c", code, "--no-cache", cwd=folder, PYTHONPATH=str(folder))


@needs_checkout
def test_rooms_import_only_what_they_may() -> None:
    result = _lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("room", "line", "allowed"),
    [
        ("tasks", "import routing.plan", False),
        ("routing", "import sharding", False),
        ("sharding", "import tasks", False),
        ("routing", "import experts", False),
        ("tasks", "import pathways", False),
        ("experts", "import tasks", False),
        ("experts", "import routing.gates", False),
        ("experts", "import routing.plan", True),
        ("pathways", "import tasks, routing.gates, experts, sharding", True),
    ],
)
def test_the_contracts_see_a_wrong_import(tmp_path: Path, room: str, line: str, allowed: bool) -> None:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no pyproject.toml beside the tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "routing" / "plan.py").touch()
    (tmp_path / "routing" / "gates.py").touch()
    (tmp_path / room / "new.py").write_text(line + "\n")
    result = _lint_imports(tmp_path)
    assert (result.returncode == 0) == allowed, result.stdout + result.stderr
    assert "Contracts:" in result.stdout, result.stderr


@needs_checkout
def test_no_module_is_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert lengths
    long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert not long, f"longer than {MOST_LINES} lines: {long}"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_light(package: str, tmp_path: Path) -> None:
    heavy = ("jax", "flax", "tensorstore", "pyarrow", "grain", "matplotlib", "sklearn", "duckdb", "tokenizers")
    code = f"import sys, json, {package}; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    result = _run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


def test_packages_are_the_installed_ones_when_that_is_asked() -> None:
    if not os.environ.get("PATHWAYS_INSTALLED"):
        pytest.skip("PATHWAYS_INSTALLED is not set: the checkout is tested")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert "site-packages" in spec.origin, spec.origin


def test_files_name_no_place_of_one_machine() -> None:
    # Put together here, so that this file does not name them either.
    homes = "|".join("/" + place + "/" for place in ("home", "root", "Users", "work", "tmp/v"))
    registries = "|".join(
        ("pypi" + r"\.org", "pythonhosted" + r"\.org", "registry" + r"\.npmjs", "extra-" + "index-url")
    )
    pattern = re.compile(rf"(?<![\w.$}}/-])(?:{homes})\w|{registries}")
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, found


def test_constraints_pin_every_direct_dependency() -> None:
    constraints, project = ROOT / "constraints.txt", ROOT / "pyproject.toml"
    if not (constraints.is_file() and project.is_file()):
        pytest.skip("no constraints.txt beside the tests")
    lines = [line for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    unpinned = [
        line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+( ; python_version (<|>=) \"3\.12\")?", line)
    ]
    assert not unpinned
    pinned = {_canonical(line.partition("==")[0]) for line in lines}
    declared = tomllib.loads(project.read_text())["project"]
    names = [*declared["dependencies"], *declared["optional-dependencies"]["dev"]]
    assert {_canonical(re.split("[<>=\\[]", name)[0]) for name in names} <= pinned


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
@needs_checkout
def test_wheel_has_five_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    code = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    result = _run(sys.executable, "-c", code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry_points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= names
    assert "pathways = pathways.cli:main" in entry_points
