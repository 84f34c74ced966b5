"""The layers of the package: each imports only layers below it. Reads imports with `ast`."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "ray_valkey_spill"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the top. Layers of one floor do not import each other.
FLOORS = [
    {"cli"},
    {"plugin"},
    {"store"},
    {"tiers"},
    {"format", "protocol"},
    {"config"},
    {"errors", "backoff"},
    {"units"},
]
# What users, Python and Ray import. Every layer may import these too, for the version and the names
# of Ray's functions: they import nothing else at that time.
FACE = {"", "_startup", "__main__"}
# What the face imports, but not when it is imported: `_startup` imports it in the function that Ray
# calls, the package in `__getattr__` (PEP 562).
LAZY = {
    ("_startup", "errors"),
    ("_startup", "plugin.registration"),
    ("", "plugin.spilling_config"),
    ("", "plugin.storage"),
}
# A Ray program of its own, which shows the plug-in at work.
RAY_PROGRAMS = {"cli.demo"}


def modules() -> dict[str, Path]:
    """The files, by the names of their modules below the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(source: str, package: str = PACKAGE) -> Iterator[str]:
    """What a module of `package` imports, anywhere in it, by full names.

    Of `from a import b` both `a` and `a.b`, since `b` may be a module. Also strings that
    name modules of this package, since `importlib` takes them.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{PACKAGE}."):
            yield str(node.value)


def imports_of(name: str) -> set[str]:
    """The modules of this package that one of them imports, not the packages that hold them."""
    is_package = MODULES[name].name == "__init__.py"
    parts = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    package = ".".join(parts if is_package else parts[:-1])
    found = {
        full.removeprefix(PACKAGE).removeprefix(".")
        for full in imported(MODULES[name].read_text(), package)
        if full == PACKAGE or full.startswith(f"{PACKAGE}.")
    }
    found &= MODULES.keys()
    return {each for each in found if not any(other.startswith(f"{each}.") for other in found)} - {
        name
    }


IMPORTS = {name: imports_of(name) for name in MODULES}


def floor(name: str) -> int:
    layer = name.partition(".")[0]
    (number,) = (number for number, layers in enumerate(FLOORS) if layer in layers)
    return number


def leads_down(name: str, other: str) -> bool:
    if other in FACE or name == "__main__":
        return True
    if name in FACE:
        return False
    is_same = name.partition(".")[0] == other.partition(".")[0]
    return is_same or floor(name) < floor(other)


def test_every_module_lies_in_a_layer() -> None:
    layers = {layer for layers in FLOORS for layer in layers}
    assert {name.partition(".")[0] for name in MODULES.keys() - FACE} == layers


def test_imports_lead_only_downwards() -> None:
    upward = {
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if not leads_down(name, other)
    }
    assert upward == LAZY


def test_there_is_no_circle_of_imports() -> None:
    without_lazy = {
        name: {other for other in others if (name, other) not in LAZY}
        for name, others in IMPORTS.items()
    }
    graphlib.TopologicalSorter(without_lazy).prepare()  # raises CycleError


def test_only_the_plugin_imports_ray() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if "ray" in {full.partition(".")[0] for full in imported(path.read_text())}
    }
    assert {name for name in users if not name.startswith("plugin.")} == RAY_PROGRAMS


@pytest.mark.parametrize(
    "source",
    [
        "import ray_valkey_spill.cli.check",
        "import ray_valkey_spill.cli.check as it",
        "from ray_valkey_spill.cli.check import run",
        "from ray_valkey_spill.cli import check",
        "from .cli import check",
        "from .cli.check import run as it",
        "def f():\n    from ray_valkey_spill.cli import check",
        "if TYPE_CHECKING:\n    from ray_valkey_spill.cli.check import Finding",
        "import_module('ray_valkey_spill.cli.check')",
    ],
)
def test_an_import_is_found_wherever_it_stands(source: str) -> None:
    assert f"{PACKAGE}.cli.check" in set(imported(source))


def test_a_relative_import_is_found_from_within_a_layer() -> None:
    source = "from ..cli.check import run\nfrom . import budget"
    assert {f"{PACKAGE}.cli.check", f"{PACKAGE}.tiers.budget"} <= {
        *imported(source, f"{PACKAGE}.tiers")
    }
