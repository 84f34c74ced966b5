"""Run the benchmarks and write RESULTS.md, with pictures, beside this file (or elsewhere)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import distance, fleet, kinds, memory_pressure, neighbours, scaling, wire
from benchmarks.checkouts import NEW
from benchmarks.common import code_line, commit_of, note, origin_line, table
from benchmarks.memory_pressure import DATA_JOBS, Job

BENCHMARKS = {
    "wire": wire,
    "distance": distance,
    "fleet": fleet,
    "memory_pressure": memory_pressure,
    "scaling": scaling,
    "neighbours": neighbours,
    "kinds": kinds,
}
# These can measure another checkout too.
_COMPARING = ("distance", "fleet", "neighbours")

_PREFACE = """
Written by `python -m benchmarks.report`. Contenders run in turn, after a warm-up, and figures are
medians. What each benchmark does stands at the head of its file; what is known of the goals that
are missed, in [README.md](README.md). What does not measure speed has pages of its own: [nodes that
come and go](CHURN.md), [faults at random](SOAK.md), [failovers](FAILOVER.md), [the
overflow](OVERFLOW.md).
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="a directory")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run just this one")
    parser.add_argument("--render", action="store_true", help="run none, draw what is there anew")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help=f"another checkout, which {', '.join(_COMPARING)} measure too, as the old one",
    )
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    raw = options.into / "results.json"
    keep = (options.only or options.render) and raw.exists()
    results = json.loads(raw.read_text()) if keep else {}
    for name in [] if options.render else options.only or BENCHMARKS:
        against = options.against if name in _COMPARING else None
        results[name] = _run(name, options.quick, against)
        raw.write_text(json.dumps(results, indent=1) + "\n")
    (options.into / "RESULTS.md").write_text(document(results, _draw(results, options.into)))


def _run(name: str, quick: bool, against: Path | None) -> dict[str, Any]:
    """Results of one benchmark, from a process of its own."""
    note(f"--- {name} ---")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] * quick)]
    if against:
        command += ["--against", str(against)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {**json.loads(result.stdout), **({"against": commit_of(against)} if against else {})}


def _draw(results: dict[str, Any], directory: Path) -> dict[str, list[Path]]:
    """Draw the pictures of each benchmark that has some."""
    if importlib.util.find_spec("matplotlib") is None:
        note("without pictures, because matplotlib is not installed")
        return {}
    drawing = {name: getattr(BENCHMARKS[name], "pictures", None) for name in results}
    return {name: draw(results[name], directory) for name, draw in drawing.items() if draw}


def document(results: dict[str, Any], pictures: Mapping[str, Sequence[Path]]) -> str:
    """Markdown of the results, with the pictures of each benchmark."""
    goals = [*_goals(results)]
    parts = ["# Benchmark results", _PREFACE]
    origins = {name: code_line(found) for name, found in results.items()}
    is_of_one_code = len({*origins.values()}) == 1
    if is_of_one_code:
        dates = [found["date"] for found in results.values()]
        first, last = min(dates), max(dates)
        when = first if first == last else f"{first} to {last}"
        parts.append(f"{when}, {next(iter(origins.values()))}")
    parts += ["## At a glance", _table_of([goal for goal in goals if goal.is_first])]
    parts += ["## Further goals", _table_of([goal for goal in goals if not goal.is_first])]
    for name in (name for name in BENCHMARKS if name in results):
        module, found = BENCHMARKS[name], results[name]
        parts.append(f"## {name}")
        if not is_of_one_code:
            parts.append(origin_line(found))
        if "against" in found:
            parts.append(f"The old code is commit {found['against']}.")
        parts.append(module.tables(found))
        parts += [f"![{path.stem}]({path.name})" for path in pictures.get(name, ())]
    return "\n\n".join(parts) + "\n"


# --- goals ---


@dataclass(frozen=True)
class Goal:
    """A figure, and the bounds that it is to keep.

    Attributes:
        what: what was measured.
        measured: the figure.
        at_least, at_most: the bounds.
        why: what keeps it from them on a machine of two cores, if it is known to miss them.
        is_first: whether it is in the table at the top.
    """

    what: str
    measured: float
    at_least: float = 0
    at_most: float = float("inf")
    why: str = ""
    is_first: bool = False

    @property
    def cells(self) -> list[str]:
        bound = f"≥ {self.at_least:g}" if self.at_least else f"≤ {self.at_most:g}"
        shown = f"{self.measured:.2f}"
        is_met = self.at_least <= self.measured <= self.at_most
        missed = f"missed: {self.why}" if self.why else "missed"
        return [self.what, bound, shown, "" if is_met else missed]


def _table_of(goals: list[Goal]) -> str:
    return table([["what", "goal", "measured", ""], *(goal.cells for goal in goals)])


def _goals(results: dict[str, Any]) -> Iterator[Goal]:
    of = {
        "wire": _wire_goals,
        "distance": _distance_goals,
        "fleet": _fleet_goals,
        "memory_pressure": _ray_goals,
        "scaling": _scaling_goals,
        "neighbours": _neighbour_goals,
    }
    for name, goals in of.items():
        if name in results:
            yield from goals(results[name])


def _wire_goals(found: dict[str, Any]) -> Iterator[Goal]:
    cases = found["cases"]

    def ratio(case: str, way: str, other: str, name: str = "auto") -> float:
        figures = cases[f"tcp, {case}"][way]
        return float(figures[name]["gb_per_s"] / figures[other]["gb_per_s"])

    large = "64 MiB, random floats"
    sums = "the core that the raw limit keeps busy also has the checksums"
    for case, goals in (
        (large, ((0.95, sums), (0.95, sums))),
        ("1 MiB, random floats", ((0.6, ""), (0.6, ""))),
        (
            "128 KiB, random floats",
            (
                (0.55, "two scripts register and settle the object"),
                (0.55, "Python and Arrow take as long as the wire"),
            ),
        ),
        (
            "1,000 x 128 KiB, random floats",
            ((0.75, ""), (0.6, "headers, checksums and a copy take longer than the wire")),
        ),
    ):
        for way, (at_least, why) in zip(("spill", "restore"), goals):
            if f"tcp, {case}" in cases:
                what = f"{case}, {way}, of the raw limit"
                once = ratio(case, way, "raw limit")
                yield Goal(what, once, at_least, why=why, is_first=True)
    for way, times, cpu in (("spill", 5.0, 0.4), ("restore", 1.8, 0.3)):
        why = "it reaches two fifths of the wire itself"
        once = ratio(large, way, "valkey-py")
        yield Goal(f"{large}, {way}, of plain valkey-py", once, times, why=why)
        used = cases[f"tcp, {large}"][way]["auto"]["cpu_s_per_gb"]
        yield Goal("the same, client CPU s/GB", used, at_most=cpu)
        for kind in ("integer columns", "text table"):
            once = ratio(f"64 MiB, {kind}", way, "one lz4 thread")
            why = "the server needs one of the two cores"
            yield Goal(f"64 MiB, {kind}, {way}, of one LZ4 thread", once, 1.7, why=why)
    if "found_ms" in found:
        what = f"`find` of an object of {wire.FOUND / 1e6:g} MB, ms"
        why = "the header names each of its chunks"
        yield Goal(what, found["found_ms"], at_most=0.25, why=why, is_first=True)
    zeros = ratio("64 MiB, zeros", "restore", "raw limit")
    yield Goal("64 MiB, zeros, restore, of the raw limit", zeros, 1.0)
    sampled = ratio(large, "spill", "none")
    yield Goal("64 MiB, random floats, spill, `auto` of `none`", sampled, 0.97)


def _distance_goals(found: dict[str, Any]) -> Iterator[Goal]:
    batches = found["round_trips"]["maxmemory"]["batches"]
    why = "so many bytes take the wire longer than a round trip"
    for size, batch in batches.items():
        is_first = size in ("128 KiB", "900 KiB")
        for way, most in (("spill", 2.0), ("restore", 1.2)):
            what = f"{size}, {way}, round trips, server with `maxmemory`"
            trips = batch["steady"][NEW][way]
            yield Goal(what, trips, at_most=most, why=why, is_first=is_first)
    for case in found["throughput"]["cases"][:1]:
        rates = case["steady"]
        for way in ("spill", "restore"):
            raw = max(rate[way] for name, rate in rates.items() if name.startswith("raw"))
            what = (
                f"64 MiB, {way} at {case['rate'] / 1e9:g} Gbit/s and "
                f"{case['round_trip'] * 1e3:g} ms, of the raw loop"
            )
            yield Goal(what, rates[NEW][way] / raw, 0.9, is_first=True)


def _fleet_goals(found: dict[str, Any]) -> Iterator[Goal]:
    beside = {int(nodes): each[NEW] for nodes, each in found["beside"].items()}
    few, many = min(beside), max(beside)
    for size in beside[many]["operations"]:
        for way in ("spill", "restore"):
            alone, busy = (
                beside[nodes]["operations"][size][f"{way}: cpu"] for nodes in (few, many)
            )
            what = f"server's time of a {way} of {size} beside {many:,} nodes, of that beside {few}"
            why = "from about a hundred nodes on a spill asks for room first" * (way == "spill")
            yield Goal(what, busy / alone, at_most=1.2, why=why, is_first=way == "spill")
    core = 100 * fleet.together(beside[many], many, "cpu")
    yield Goal(f"{many:,} idle nodes, % of the server's core", core, at_most=5, is_first=True)
    nodes = found["nodes"]
    if (idle := found["many"][NEW].get("idle")) is not None:
        objects = found["objects"] // nodes
        what = f"{nodes:,} idle nodes with {objects:,} objects each, % of the server's core"
        yield Goal(what, 100 * fleet.together(idle, nodes, "cpu"), at_most=5)


def _ray_goals(found: dict[str, Any]) -> Iterator[Goal]:
    jobs = found["jobs"]

    def ratio(job: Job, figure: str, other: str = "filesystem") -> float:
        storages = jobs[str(job)]["storages"]
        ours, theirs = (storages[name][figure]["median"] for name in ("valkey", other))
        return float(ours / theirs)

    why = "a file in the page cache is one copy in one process"
    warm, cold, small = Job(), Job(cold_files=True), Job(object_size=1_000_000)
    yield Goal("in Ray, spill, of filesystem's", ratio(warm, "spill_mb_per_s"), 1.3)
    yield Goal("in Ray, restore, of filesystem's", ratio(warm, "restore_mb_per_s"), 0.7, why=why)
    if str(cold) in jobs:
        once = ratio(cold, "restore_mb_per_s")
        cached = "the virtual machine's host may still have the files in memory"
        yield Goal("the same, files' page cache dropped", once, 1.5, why=cached)
    for job, least in ((small, 0.8), (warm, 0.45)):
        if str(job) in jobs:
            what = f"`ray.get` of {job.object_size / 1e6:g} MB, filesystem's time of ours"
            yield Goal(what, 1 / ratio(job, "get_p50_ms"), least, why=why, is_first=True)
    why = "the job computes on both cores, of which the server takes a part"
    for name in DATA_JOBS:
        if str(job := Job(reads=name)) in jobs:
            for other in ("filesystem", "smart_open"):
                what = f"Ray Data {name}, whole job, time of {other}'s"
                once = ratio(job, "job_s", other)
                yield Goal(what, once, at_most=1, why=why, is_first=True)


def _scaling_goals(found: dict[str, Any]) -> Iterator[Goal]:
    destroy = found["live_objects"]["destroy"]
    what = f"destroy {destroy['objects']:,} objects beside {destroy['foreign_keys']:,} keys"
    over, why = destroy["commands_over_10_ms"], "a pause of the machine, or one not known"
    yield Goal(f"{what}: commands over 10 ms", over, at_most=0, why=why)


def _neighbour_goals(found: dict[str, Any]) -> Iterator[Goal]:
    chunk_size = neighbours.Setting().chunk_size
    is_paced = any(each["window"] is None for each in found["settings"])
    # Earlier results have the default only with as many bytes under way as it starts with.
    window = None if is_paced else neighbours.PINNED
    why = "all share two cores, so it waits for a time slice of the scheduler"
    for each in found["settings"]:
        if (each["chunk_size"], each["window"]) == (chunk_size, window):
            yielding = ", and yield" if each["yielding"] else ""
            for way in ("spill", "restore"):
                what = f"a neighbour's GET beside {each['writers']} that {way}{yielding}"
                what = f"{what}: p99, of that beside nobody"
                is_first = each["writers"] == 1
                once = each[way]["of_idle_p99"]
                yield Goal(what, once, at_most=3, why=why, is_first=is_first)


if __name__ == "__main__":
    main()
