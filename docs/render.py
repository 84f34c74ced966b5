"""Write into the pages what the code says: `python docs/render.py`.

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ray_valkey_spill.config import parameters
from ray_valkey_spill.plugin.metrics import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parameter_table() -> str:
    rows = ["| name | default | meaning | has to be |", "| --- | --- | --- | --- |"]
    for parameter in parameters():
        default = "none" if parameter.default is None else f"`{_text(parameter.default)}`"
        rows.append(
            f"| `{parameter.name}` | {default} | {parameter.meaning} | {parameter.kind.expected} |"
        )
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {"parameters": parameter_table, "metrics": markdown_table}


def rendered(page: str) -> str:
    """`page` with all that is made from the code."""
    names = "|".join(TABLES)
    return re.sub(
        rf"(<!-- ({names}) -->\n).*?(<!-- end of \2 -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _text(value: object) -> str:
    """A value as JSON and the environment have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
