"""Run all benchmarks and write RESULTS.md, with pictures, beside this file (or elsewhere)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import memory_pressure, scaling, wire
from benchmarks.common import note

BENCHMARKS = {"wire": wire, "memory_pressure": memory_pressure, "scaling": scaling}

_PREFACE = """
Written by `python -m benchmarks.report`. Contenders run in turn, after a warm-up, and figures are
medians. What each benchmark does stands at the head of its file.
""".strip()


def run(name: str, quick: bool) -> dict[str, Any]:
    """Results of one benchmark, from a process of its own."""
    note(f"--- {name} ---")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] * quick)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="a directory")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run just this one")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    raw = options.into / "results.json"
    results = json.loads(raw.read_text()) if options.only and raw.exists() else {}
    for name in options.only or BENCHMARKS:
        results[name] = run(name, options.quick)
        results[name]["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
        raw.write_text(json.dumps(results, indent=1) + "\n")
    (options.into / "RESULTS.md").write_text(_document(results, options.into))


def _document(results: dict[str, Any], directory: Path) -> str:
    parts = [
        "# Benchmark results",
        _PREFACE,
    ]
    for name, found in results.items():
        module = BENCHMARKS[name]
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        pictures = module.pictures(found, directory)
        parts += [
            f"## {name}",
            f"{found['date']}; {machine}",
            module.tables(found),
            *(f"![{path.stem}]({path.name})" for path in pictures),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
