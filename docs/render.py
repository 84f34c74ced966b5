"""Write into the pages what the code says: `python docs/render.py`.

Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ray_valkey_spill.config import Parameter, parameters
from ray_valkey_spill.plugin.metrics import markdown_table

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *("url", "namespace", "max_bytes", "overflow_uri"),
    *("username", "password_file", "tls_ca_file", "encryption_key_file"),
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parameter_table() -> str:
    rows = ["| name | default | meaning | has to be |", "| --- | --- | --- | --- |"]
    for parameter in parameters():
        rows.append(
            f"| `{parameter.name}` | {_default(parameter)} | {parameter.meaning} "
            f"| {parameter.kind.expected} |"
        )
    return "\n".join(rows)


def settings_table() -> str:
    """The parameters that most users set."""
    rows = ["| name | default | meaning |", "| --- | --- | --- |"]
    by_name = {parameter.name: parameter for parameter in parameters()}
    for name in SETTINGS:
        parameter = by_name[name]
        rows.append(f"| `{name}` | {_default(parameter)} | {parameter.meaning} |")
    return "\n".join(rows)


def requirements() -> str:
    """What pyproject.toml asks of Python and of Ray, and what the tests need of a server."""
    project = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    (ray,) = re.findall(r'"ray>=([\d.]+)"', project)
    return (
        f"**Requirements:** Linux; Python {pythons[0]} to {pythons[-1]}; Ray {ray} or newer; "
        "Valkey 7.2 or newer, or Redis 7.0 or newer."
    )


TEXTS: dict[str, Callable[[], str]] = {
    "metrics": markdown_table,
    "parameters": parameter_table,
    "requirements": requirements,
    "settings": settings_table,
}


def rendered(page: str) -> str:
    """`page` with all that is made from the code."""
    names = "|".join(TEXTS)
    return re.sub(
        rf"(<!-- ({names}) -->\n).*?(<!-- end of \2 -->)",
        lambda match: f"{match[1]}{TEXTS[match[2]]()}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _default(parameter: Parameter) -> str:
    """As JSON and the environment have it."""
    default = parameter.default
    if default is None:
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
