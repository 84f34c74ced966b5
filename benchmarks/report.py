"""Run all benchmarks and write RESULTS.md, with pictures, beside this file (or elsewhere)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import kinds, memory_pressure, neighbours, scaling, wire
from benchmarks.common import note, table
from benchmarks.memory_pressure import Job

BENCHMARKS = {
    "wire": wire,
    "memory_pressure": memory_pressure,
    "scaling": scaling,
    "neighbours": neighbours,
    "kinds": kinds,
}

_PREFACE = """
Written by `python -m benchmarks.report`. Contenders run in turn, after a warm-up, and figures are
medians. What each benchmark does stands at the head of its file; what is known of the targets that
are missed, in [README.md](README.md).
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="a directory")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run just this one")
    parser.add_argument("--render", action="store_true", help="run none, draw what is there anew")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    raw = options.into / "results.json"
    keep = (options.only or options.render) and raw.exists()
    results = json.loads(raw.read_text()) if keep else {}
    for name in [] if options.render else options.only or BENCHMARKS:
        results[name] = _run(name, options.quick)
        raw.write_text(json.dumps(results, indent=1) + "\n")
    (options.into / "RESULTS.md").write_text(_document(results, options.into))


def _run(name: str, quick: bool) -> dict[str, Any]:
    """Results of one benchmark, from a process of its own."""
    note(f"--- {name} ---")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] * quick)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", **json.loads(result.stdout)}


def _document(results: dict[str, Any], directory: Path) -> str:
    targets = [["what", "target", "measured", ""], *_targets(results)]
    parts = ["# Benchmark results", _PREFACE, "## Targets", table(targets)]
    for name, found in results.items():
        module = BENCHMARKS[name]
        machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        parts += [
            f"## {name}",
            f"{found['date']}; {machine}",
            module.tables(found),
            *(f"![{path.stem}]({path.name})" for path in module.pictures(found, directory)),
        ]
    return "\n\n".join(parts) + "\n"


# --- targets ---


def _targets(results: dict[str, Any]) -> Iterator[list[str]]:
    if "wire" in results:
        yield from _wire_targets(results["wire"]["cases"])
    if "memory_pressure" in results:
        yield from _ray_targets(results["memory_pressure"]["jobs"])
    if "scaling" in results:
        destroy = results["scaling"]["live_objects"]["destroy"]
        what = f"destroy {destroy['objects']:,} objects beside {destroy['foreign_keys']:,} keys"
        yield _target(f"{what}: commands over 10 ms", destroy["commands_over_10_ms"], at_most=0)
    if "neighbours" in results:
        yield from _neighbour_targets(results["neighbours"]["settings"])


def _neighbour_targets(settings: list[dict[str, Any]]) -> Iterator[list[str]]:
    default = neighbours.Setting()
    for found in settings:
        if (found["chunk_size"], found["window"]) == (default.chunk_size, default.window):
            yielding = ", and yield" if found["yielding"] else ""
            for way in ("spill", "restore"):
                what = f"a neighbour's GET beside {found['writers']} that {way}{yielding}"
                times = found[way]["of_idle_p99"]
                yield _target(f"{what}: p99, of that beside nobody", times, at_most=3)


def _wire_targets(cases: dict[str, Any]) -> Iterator[list[str]]:
    def ratio(case: str, way: str, other: str, name: str = "auto") -> float:
        figures = cases[f"tcp, {case}"][way]
        return float(figures[name]["gb_per_s"] / figures[other]["gb_per_s"])

    large, small = "64 MiB, random floats", "1,000 x 128 KiB, random floats"
    for way, times, cpu in (("spill", 5.0, 0.4), ("restore", 1.8, 0.3)):
        yield _target(f"{large}, {way}, of the raw limit", ratio(large, way, "raw limit"), 0.85)
        yield _target("the same, of plain valkey-py", ratio(large, way, "valkey-py"), times)
        used = cases[f"tcp, {large}"][way]["auto"]["cpu_s_per_gb"]
        yield _target("the same, client CPU s/GB", used, at_most=cpu)
        for kind in ("integer columns", "text table"):
            found = ratio(f"64 MiB, {kind}", way, "one lz4 thread")
            yield _target(f"64 MiB, {kind}, {way}, of one LZ4 thread", found, 1.7)
        yield _target(f"{small}, {way}, of the raw limit", ratio(small, way, "raw limit"), 0.5)
    zeros = ratio("64 MiB, zeros", "restore", "raw limit")
    yield _target("64 MiB, zeros, restore, of the raw limit", zeros, 1.0)
    sampled = ratio(large, "spill", "none")
    yield _target("64 MiB, random floats, spill, `auto` of `none`", sampled, 0.97)


def _ray_targets(jobs: dict[str, Any]) -> Iterator[list[str]]:
    def ratio(job: Job, figure: str) -> float:
        storages = jobs[str(job)]["storages"]
        ours, files = (storages[name][figure]["median"] for name in ("valkey", "filesystem"))
        return float(ours / files)

    warm, cold = Job(), Job(cold_files=True)
    yield _target("in Ray, spill, of filesystem's", ratio(warm, "spill_mb_per_s"), 1.3)
    yield _target("in Ray, restore, of filesystem's", ratio(warm, "restore_mb_per_s"), 0.7)
    if str(cold) in jobs:
        found = ratio(cold, "restore_mb_per_s")
        yield _target("the same, files' page cache dropped", found, 1.5)


def _target(
    what: str, measured: float, at_least: float = 0, *, at_most: float = float("inf")
) -> list[str]:
    target = f"≥ {at_least:g}" if at_least else f"≤ {at_most:g}"
    met = at_least <= measured <= at_most
    return [what, target, f"{measured:.2f}", "" if met else "missed"]


if __name__ == "__main__":
    main()
