"""Writes into the pages what the code says: `python docs/render.py`.

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ray_valkey_spill.config import ENV_PREFIX, parameters

PAGES = [Path(__file__).parents[1] / "README.md", *sorted(Path(__file__).parent.glob("*.md"))]


def parameter_table() -> str:
    rows = ["| name | default | meaning, and what it has to be |", "| --- | --- | --- |"]
    for parameter in parameters():
        default = "none" if parameter.default is None else f"`{_json(parameter.default)}`"
        meaning = f"{parameter.meaning}. *{parameter.expected}*"
        rows.append(f"| `{parameter.name}` | {default} | {meaning} |")
    return "\n".join(rows)


def environment() -> str:
    return "`, `".join(ENV_PREFIX + parameter.name.upper() for parameter in parameters())


TABLES: dict[str, Callable[[], str]] = {"parameters": parameter_table}


def rendered(page: str) -> str:
    """`page` with all that is made from the code."""
    for name, make in TABLES.items():
        pattern = f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        page = re.sub(pattern, lambda match: f"{match[1]}{make()}\n{match[2]}", page, flags=re.DOTALL)
    return page


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
