"""What the documentation says is so: tables, commands, links."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from servers import Server

from ray_valkey_spill.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("render")


def commands() -> list[str]:
    """Those that are lines of their own."""
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    found = [line.strip() for line in lines if re.match(r"    (ray-valkey-spill|python) ", line)]
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", command) for command in found))


def test_pages_say_what_the_code_says(render: Any) -> None:
    for page in render.PAGES:
        assert render.rendered(page.read_text()) == page.read_text(), "run: python docs/render.py"
    assert "| `url` |" in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize(
    "command", [c for c in commands() if c.startswith("ray-valkey-spill") and "demo" not in c]
)
def test_every_command_of_the_tool_works(server: Server, command: str) -> None:
    _, *arguments = shlex.split(command.partition("&&")[0])
    arguments = [
        a for i, a in enumerate(arguments) if "--url" not in arguments[max(0, i - 1) : i + 1]
    ]
    result = CliRunner().invoke(cli, [*arguments, "--url", server.url])
    assert result.exit_code == 0, result.output


def test_every_benchmark_that_is_named_is_there() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    names = set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert len(names) > 3
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" not in target:
                linked = page.parent / path if path else page
                assert linked.exists(), f"{page}: {target}"
                headings = (
                    re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
                )
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert not anchor or anchor in slugs, f"{page}: {target}"
