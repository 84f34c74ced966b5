"""What a soak reports, from the results of its seeds."""

from __future__ import annotations

import collections
from typing import Any

from benchmarks.common import MIB, table
from benchmarks.soak_faults import TABLE
from benchmarks.soak_watch import MOST_GROWTH

Runs = list[dict[str, Any]]


def report(runs: Runs) -> str:
    """Markdown."""
    operations = total(runs, "operations")
    rows = [[name, f"{count:,}"] for name, count in operations.most_common()]
    failures = [
        f"- seed {run['seed']} on {run['kind']}: {failure}"
        for run in runs
        for failure in run["failures"]
    ]
    parts = [
        "# Soak",
        "Written by `python -m benchmarks.soak --render`.",
        _summary(runs, operations, len(failures)),
        "\n".join(failures),
        "How often each fault has struck (hit a client, or killed what it uses), by server:",
        _matrix(runs),
        table([["operation", "times"], *rows]),
        _reclaimed(runs),
        _growth(runs),
        _seeds(runs),
        _origin(runs),
    ]
    return "\n\n".join(part for part in parts if part)


def total(runs: Runs, what: str) -> collections.Counter[str]:
    """The sums over all runs of what each has counted under a name."""
    return sum((collections.Counter(run[what]) for run in runs), collections.Counter[str]())


def _summary(runs: Runs, operations: collections.Counter[str], failures: int) -> str:
    hours = sum(run["seconds"] for run in runs) / 3600
    struck, missed = (total(runs, what).total() for what in ("faults", "missed"))
    return (
        f"{hours:.2f} hours, {struck:,} faults that struck ({missed:,} more met nothing), "
        f"{operations.total():,} operations, **{failures} failures**."
    )


def _matrix(runs: Runs) -> str:
    # Not those that this machine can have: the runs may come from another one.
    names = list(dict.fromkeys(run["kind"] for run in runs))
    by_kind = {
        kind: total([run for run in runs if run["kind"] == kind], "faults") for kind in names
    }
    rows = [["fault", *names]]
    for strike in TABLE:
        counts = [
            str(by_kind[kind][strike.name]) if kind in strike.kinds else "-" for kind in names
        ]
        rows.append([strike.name, *counts])
    minutes = {
        kind: sum(run["seconds"] for run in runs if run["kind"] == kind) / 60 for kind in names
    }
    rows.append(["minutes", *(f"{minutes[kind]:.0f}" for kind in names)])
    return table(rows)


def _reclaimed(runs: Runs) -> str:
    found = [tuple(each) for run in runs for each in run["reclaimed"]]
    if not found:
        return ""
    objects, longest = sum(count for count, _ in found), max(seconds for _, seconds in found)
    return (
        f"{len(found)} times all references to {objects} objects that dead nodes had spilled ended "
        f"at once: they were gone {longest:.0f} seconds later at the latest."
    )


def _growth(runs: Runs) -> str:
    growth = {name: max(run["io_worker_growth"][name] for run in runs) for name in MOST_GROWTH}
    return (
        f"An IO worker grew by at most {growth['memory'] / MIB:.0f} MiB, {growth['threads']} "
        f"threads and {growth['files']} files and sockets, from when it was first looked at."
    )


def _seeds(runs: Runs) -> str:
    seeds = (f"{run['seed']} ({run['kind']}, {run['seconds'] / 60:.0f} min)" for run in runs)
    return f"Seeds: {', '.join(seeds)}."


def _origin(runs: Runs) -> str:
    """Where and of what the figures are: one sentence for each commit, machine and day."""
    about = "{cpu}, {memory}, kernel {kernel}, Python {python}, Ray {ray}"
    found = {f"Commit {r['commit']}, {r['date']}, {about.format(**r['machine'])}." for r in runs}
    return "\n\n".join(sorted(found))
