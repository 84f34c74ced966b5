"""What the pages show of output, compared with output."""

from __future__ import annotations

import re

# What the page shows of one run, and what another may have in its place.
_GENERAL = [
    ("…", ".*?"),
    ("[0-9a-f]{12,}", "[0-9a-f]+"),
    (r"\d[\d,.]*\d|[1-9]", r"\d[\d,.]*"),
    ("Redis|Valkey", "(?:Redis|Valkey)"),
]


def pattern(shown: str) -> str:
    """Matches output that says the same: other numbers and ids, other line breaks.

    `…` stands for anything, and a 0 for nothing but itself.
    """
    return r"\s+".join(
        "".join(
            next((general for kind, general in _GENERAL if re.fullmatch(kind, part)), None)
            or re.escape(part)
            for part in re.split(rf"({'|'.join(kind for kind, _ in _GENERAL)})", text)
        )
        for text in shown.split()
    )
