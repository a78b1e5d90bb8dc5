"""What is installed, what it needs, and the house rules that a reader of the source relies on."""

import ast
import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "service"
SOURCES = sorted(SERVICE.rglob("*.py"))
OURS = {"flowmason_secrets", "flowmason_studio"}
COMPILED = {f"flowmason_secrets/{part}/_speedups" for part in ("api", "core", "index")}
# What is not a source, though it is beside them.
MADE = ("*.so", "*.egg-info", "__pycache__")
DURABLE = SERVICE / "flowmason_secrets" / "storage" / "durable.py"
CONFIG = SERVICE / "flowmason_secrets" / "config.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    """A source as test ids and messages show it."""
    return str(path.relative_to(SERVICE))


def project() -> dict[str, Any]:
    """The project's own description."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def distribution(requirement: str) -> str:
    """The normalised name in a requirement (PEP 503)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy of the working tree: building leaves files behind."""
    place, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    shutil.copytree(SERVICE, source / "service", ignore=shutil.ignore_patterns(*MADE))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"-w{place}", str(source)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout
    (path,) = place.iterdir()
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    """The wheel's METADATA."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(wheel.read(name).decode())


# The wheel.


def test_the_wheel_holds_the_sources_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    sources = {
        str(path.relative_to(SERVICE)): path.read_bytes()
        for top in OURS
        for path in (SERVICE / top).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    inside = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    compiled = {name for name in inside if name.endswith(".so")}
    if compiled or os.environ.get("CI"):
        assert {name.split(".")[0] for name in compiled} == COMPILED
    inside = {name: data for name, data in inside.items() if name not in compiled}
    assert set(inside) == set(sources)
    assert {name for name, data in inside.items() if data != sources[name]} == set()
    for name in ("flowmason_secrets/py.typed", "flowmason_studio/services/secrets.py"):
        assert name in inside
    if (SERVICE / "flowmason_secrets" / "FORMAT.md").exists():
        assert b"#" in inside["flowmason_secrets/FORMAT.md"]


def test_flowmason_studio_is_a_namespace(wheel: zipfile.ZipFile) -> None:
    studio = [name for name in wheel.namelist() if name.startswith("flowmason_studio/")]
    assert [name for name in studio if name.endswith(".py")] == [
        "flowmason_studio/services/secrets.py"
    ]


def test_the_documented_import_path_is_typed(wheel: zipfile.ZipFile) -> None:
    # PEP 561: without the marker, mypy takes everything imported from there for Any.
    studio = {name for name in wheel.namelist() if name.startswith("flowmason_studio/")}
    assert studio & {"flowmason_studio/py.typed", "flowmason_studio/services/py.typed"}


def test_the_licence(wheel: zipfile.ZipFile, metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    (name,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    text = wheel.read(name).decode()
    assert "Apache License" in text
    assert "Version 2.0" in text


def test_the_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "flowmason"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "secrets" in (metadata.get_all("Provides-Extra") or [])
    required = metadata.get_all("Requires-Dist") or []
    extra = {distribution(line) for line in required if re.search(r"extra == .secrets.", line)}
    assert extra == {distribution(line) for line in project()["optional-dependencies"]["secrets"]}
    # Without the extra, nothing is pulled in.
    assert [line for line in required if "extra ==" not in line] == []
    classifiers = metadata.get_all("Classifier") or []
    for minor in range(11, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert wheel.read(name).decode().split("\n") == [
        "[console_scripts]",
        "flowmason-secrets = flowmason_secrets.cli:main",
        "",
    ]


def test_the_wheel_imports_from_where_it_is_installed(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    program = (
        "import flowmason_secrets.cli, flowmason_studio.services.secrets as face\n"
        "print(flowmason_secrets.__file__, face.__file__, flowmason_secrets.__version__)\n"
    )
    # -P and no site: nothing but what was installed, and the dependencies.
    packages = (path for path in sys.path if Path(path).name == "site-packages")
    ended = subprocess.run(
        (sys.executable, "-P", "-S", "-c", program),
        env={"PYTHONPATH": ":".join((str(tmp_path), *packages))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    ours, face, version = ended.stdout.split()
    assert Path(ours) == tmp_path / "flowmason_secrets" / "__init__.py"
    assert Path(face) == tmp_path / "flowmason_studio" / "services" / "secrets.py"
    assert version == project()["version"]


# The extra.


def imports(path: Path) -> set[str]:
    """The top-level modules that a source imports from elsewhere, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            found.add(node.module.partition(".")[0])
    return found - OURS - sys.stdlib_module_names


def test_the_extra_is_what_the_sources_import() -> None:
    declared = {distribution(line) for line in project()["optional-dependencies"]["secrets"]}
    providers = packages_distributions()
    imported = {
        module: {distribution(name) for name in providers[module]}
        for path in SOURCES
        for module in imports(path)
    }
    assert {m: names for m, names in imported.items() if not names & declared} == {}
    # And nothing in vain.
    assert declared - set().union(*imported.values()) == set()


def test_importing_the_program_needs_nothing_but_the_extra() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "import flowmason_secrets.cli, flowmason_secrets.app, flowmason_secrets.blocking\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    loaded = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True
    ).stdout.split()
    developing = {distribution(line) for line in project()["optional-dependencies"]["dev"]}
    providers = packages_distributions()
    used = {distribution(name) for module in loaded for name in providers.get(module, [])}
    assert used & (developing - {"flowmason"}) == set()
    assert {"click", "cryptography"} <= used


# The house.


def functions(path: Path) -> Iterator[Function]:
    """All functions of a source, methods and nested ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def test_there_are_sources() -> None:
    assert len(SOURCES) > 40
    assert DURABLE in SOURCES
    assert CONFIG in SOURCES


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {named(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{named(path)}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in SOURCES
        for function in functions(path)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_every_file_is_named_for_what_it_holds() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "base", "manager"}
    parts = {part for path in SOURCES for part in path.relative_to(SERVICE).with_suffix("").parts}
    assert parts & vague == set()


def test_flowmason_studio_has_no_init() -> None:
    assert list((SERVICE / "flowmason_studio").rglob("__init__.py")) == []


def system_names(path: Path) -> set[str]:
    """What a source uses of `os`, however it got there."""
    tree = ast.parse(path.read_text())
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in ("os", "posix")
    }
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {node.attr} if node.value.id in aliases else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            target, name = node.args[:2]
            if ast.unparse(target) in aliases and isinstance(name, ast.Constant):
                used.add(str(name.value))
    return used


def test_only_durable_syncs_renames_and_unlinks() -> None:
    steps = {
        *("fsync", "fdatasync", "sync", "rename", "renames", "replace", "unlink", "remove"),
        *("rmdir", "removedirs", "truncate", "ftruncate", "link", "pwrite"),
    }
    # The rule is held by something: these are there.
    assert {"fsync", "fdatasync", "replace", "unlink", "pwrite"} <= system_names(DURABLE)
    elsewhere = {named(path): system_names(path) & steps for path in SOURCES if path != DURABLE}
    assert {name: used for name, used in elsewhere.items() if used} == {}


def test_nobody_goes_round_durable_with_pathlib_or_shutil() -> None:
    steps = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "rmtree", "rmdir"}
    found = {
        f"{named(path)}:{node.lineno}: {node.attr}"
        for path in SOURCES
        if path != DURABLE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in steps
    }
    assert found == set()
    assert [named(path) for path in SOURCES if "import shutil" in path.read_text()] == []


def test_only_config_reads_the_environment() -> None:
    readers = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    found = {named(path): system_names(path) & readers for path in SOURCES}
    assert {name: used for name, used in found.items() if used} == {named(CONFIG): {"environ"}}
