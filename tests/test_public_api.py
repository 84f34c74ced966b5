"""What others may build on is as `data/public_api.txt` has it, and changes only where that does.

    python tests/test_public_api.py

writes the file anew.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import click
import pytest

import ray_valkey_spill
from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import _NOT_PARAMETERS, ENV_PREFIX, Config, parameters
from ray_valkey_spill.plugin.metrics import DEFINITIONS
from ray_valkey_spill.plugin.spilling_config import spilling_config

ROOT = Path(__file__).parents[1]
PINNED = Path(__file__).parent / "data" / "public_api.txt"
MODULES = ["ray_valkey_spill", "ray_valkey_spill.errors"]
DISTRIBUTION = metadata.distribution("ray-valkey-spill")


def public_api() -> str:
    """All of it, as text."""
    sections = {
        **{f"module {name}": _module(name) for name in MODULES},
        "parameters": _parameters(),
        "command": _command(),
        "metrics": _metrics(),
        "files that others look for": _files(),
    }
    return "\n".join(
        "".join(f"{line}\n" for line in [title, *(f"    {line}" for line in lines)])
        for title, lines in sections.items()
    )


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for public in sorted(module.__all__):
        value = getattr(module, public)
        if inspect.isclass(value):
            yield from _class(value)
        elif inspect.isfunction(value):
            yield f"{public}{_signature(value)}"
        else:
            yield f"{public}: {type(value).__name__}"


def _class(cls: type) -> Iterator[str]:
    yield f"class {cls.__name__}({', '.join(base.__name__ for base in cls.__bases__)})"
    for name, value in sorted(vars(cls).items()):
        if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
            yield f"    {name}{_signature(value)}"
            if name == "__init__" and issubclass(cls, Exception):
                yield from (f"    .{attribute}" for attribute in vars(cls("message", "hint")))


class _Annotation(str):
    """Shown as it is written in a module with `from __future__ import annotations`."""

    __slots__ = ()
    __repr__ = str.__str__


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [
        each
        if each.annotation is each.empty
        else each.replace(annotation=_Annotation(each.annotation))
        for each in signature.parameters.values()
    ]
    returned = _Annotation(signature.return_annotation)
    return str(signature.replace(parameters=bare, return_annotation=returned))


def _parameters() -> Iterator[str]:
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for each in parameters():
        yield f"{each.name}: {types[each.name]} = {each.default!r}; {each.kind.expected}"
    yield f"all also from {ENV_PREFIX}<NAME>, in a config as {spilling_config(namespace='n')}"
    yield from (f"{ENV_PREFIX}{name}" for name in sorted(_NOT_PARAMETERS))


def _command() -> Iterator[str]:
    for entry in DISTRIBUTION.entry_points:
        yield f"{entry.name} = {entry.value} ({entry.group})"
    context = click.Context(cli, **cli.context_settings)
    yield from _options(cli, context)
    for name, command in sorted(cli.commands.items()):
        yield name
        yield from (f"    {line}" for line in _options(command, click.Context(command, context)))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    given = [each for each in command.get_params(context) if not getattr(each, "hidden", False)]
    names = {each.name: [f"--{each.name.replace('_', '-')}"] for each in parameters()}
    of_parameters = [each for each in given if each.opts == names.get(each.name or "")]
    if len(of_parameters) == len(names):
        yield "every parameter, as --NAME VALUE, with dashes in its name"
        given = [each for each in given if each not in of_parameters]
    for each in given:
        if isinstance(each, click.Option):
            value = "" if each.is_flag else f" {each.metavar or 'VALUE'}, {each.type.name}"
            # Older versions of Click have the names of `--help` in no order.
            opts = sorted(each.opts, key=len)
            yield f"{', '.join([*opts, *each.secondary_opts])}{value}"
        else:
            yield f"{each.human_readable_name}{'' if each.required else ', optional'}"


def _metrics() -> Iterator[str]:
    for each in DEFINITIONS:
        labels = f", by {', '.join(each.labels)}" if each.labels else ""
        yield f"{each.exported}: {each.kind}, {each.unit}{labels}"


def _files() -> Iterator[str]:
    """Of the installed package. That the wheel has them is seen in `test_packaging`."""
    site_packages = Path(str(DISTRIBUTION.locate_file("")))
    yield from sorted(path.name for path in site_packages.glob("ray_valkey_spill.*"))
    if resources.files(ray_valkey_spill).joinpath("py.typed").is_file():
        yield "ray_valkey_spill/py.typed"


def test_the_public_api_is_what_was_promised() -> None:
    changes = difflib.unified_diff(
        PINNED.read_text().splitlines(), public_api().splitlines(), "promised", "found", lineterm=""
    )
    if text := "\n".join(changes):
        pytest.fail(
            f"{text}\n\nIf that is meant, say so in CHANGELOG.md, and run: python {__file__}",
            pytrace=False,
        )


def test_the_package_says_which_of_its_modules_are_public() -> None:
    assert ray_valkey_spill.__doc__
    named = re.findall(r"`(ray_valkey_spill[.\w]*)`", ray_valkey_spill.__doc__)
    assert ["ray_valkey_spill", *named] == MODULES


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    version = ray_valkey_spill.__version__
    assert DISTRIBUTION.version == version
    # Not docs/ and benchmarks' results: what they show of a run names what it was made with.
    places = ["*.md", "*.toml", "*.cfg", ".ci/*", "deploy/*.*ml", "*/*.py", "*/*/*.py"]
    alone = re.compile(rf"(?<![\w.]){re.escape(version)}(?![\w.]*\d)")
    found = [
        str(path.relative_to(ROOT))
        for place in places
        for path in ROOT.glob(place)
        if path.is_file() and alone.search(path.read_text())
    ]
    assert found == ["CHANGELOG.md", "ray_valkey_spill/__init__.py"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## (\S+) - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert released
    assert released[1] == version


if __name__ == "__main__":
    PINNED.write_text(public_api())
