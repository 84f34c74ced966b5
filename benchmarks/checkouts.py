"""Runs the code of this checkout, and of another one, side by side.

Each contender is a process of its own that runs `contender.py` of this checkout with
`ray_valkey_spill` of its checkout: both are measured by the same code. A contender is old or new,
by where it comes from: `--against` names the old one.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import origin, origin_line, results_only
from benchmarks.serving import Process

__all__ = ["OLD", "Checkout", "checkouts", "contenders", "heads", "in_turn", "main", "side_by_side"]

HERE = Path(__file__).parent
OLD, NEW = "old", "new"


@dataclass(frozen=True)
class Checkout:
    """A directory that has `ray_valkey_spill`, and the name that tables have for it."""

    name: str
    path: Path

    def environment(self) -> dict[str, str]:
        """What makes a Python process import this checkout's package."""
        return {"PYTHONPATH": str(self.path)}

    def contender(self, kind: str, prefix: Sequence[str] = ()) -> Process:
        """A process that serves a class of `contender.py`, run by the command `prefix`."""
        command = [*prefix, sys.executable, HERE / "contender.py", kind]
        process = Process(command, self.environment())
        imported = Path(process.ask("imported_from"))
        if self.path.resolve() not in imported.parents:
            process.__exit__()
            raise ImportError(f"ray_valkey_spill comes from {imported}, not from {self.path}")
        return process


def checkouts(against: Path | None) -> list[Checkout]:
    """The one that this one is compared with, if there is one, and this one."""
    new = Checkout(NEW, HERE.parent)
    return [new] if against is None else [Checkout(OLD, against), new]


@contextmanager
def contenders(
    of: Sequence[Checkout], kind: str, prefix: Sequence[str] = ()
) -> Iterator[dict[str, Process]]:
    """A process of each checkout, by its name."""
    with ExitStack() as stack:
        yield {each.name: stack.enter_context(each.contender(kind, prefix)) for each in of}


def in_turn(
    actions: Mapping[str, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """The median of each figure that each action returns, in interleaved rounds after a warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in actions}
    for number in range(warm_up + rounds):
        for name, action in actions.items():
            figures = action()
            if number >= warm_up:
                found[name].append(figures)
    return {
        name: {key: statistics.median(each[key] for each in samples) for key in samples[0]}
        for name, samples in found.items()
    }


def side_by_side(values: Mapping[str, float | None], digits: int = 1) -> list[str]:
    """Cells of a row: each contender's value, and the new of the old one, if there is one."""
    cells = ["-" if value is None else f"{value:,.{digits}f}" for value in values.values()]
    if OLD in values:
        old, new = values[OLD], values[NEW]
        cells.append("-" if not old or new is None else f"{new / old:.2f}")
    return cells


def heads(names: Sequence[str], what: str = "") -> list[str]:
    """The heads of the columns of `side_by_side`."""
    if OLD not in names:
        return [what]
    return [*(f"{what} {name}".strip() for name in names), "new / old"]


def main(
    description: str,
    measure: Callable[[bool, Sequence[Checkout]], dict[str, Any]],
    tables: Callable[[dict[str, Any]], str],
) -> None:
    """The command line of a benchmark that compares checkouts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="another checkout of this repository, which is measured too, as the old one",
    )
    options = parser.parse_args()
    # What was started is stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    compared = checkouts(options.against and options.against.resolve())
    with results_only() as output:
        results = {**origin(), **measure(options.quick, compared)}
        if options.json:
            print(json.dumps(results, indent=2), file=output)
            return
        print(origin_line(results), tables(results), sep="\n\n", file=output)
