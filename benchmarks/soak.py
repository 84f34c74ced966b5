"""Hours of random work on a Ray that spills, with random faults; nothing may be lost or hang.

Two drivers, their actors and the tasks of two nodes put, read and drop objects, several times what
the object stores hold, and compare every byte that they read. Meanwhile one fault after the other
strikes the connections, the servers, the overflow, and Ray's processes. Each seed runs on the next
kind of server; the faults of a kind come in rounds, in each of which all of them strike. In which
order, when, and for how long follows from the seed, and from how often they have struck before.

`python -m benchmarks.soak --minutes 20 --seeds 1 2 3 --lines soak.jsonl` fails if an object came
back wrong, or not at all without data having been destroyed; if anything waited for five minutes;
or if two minutes after the end keys, files, threads, sockets or memory are left that should not be.
It adds a line to the file for each seed; `--render` reports on the lines of such files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.clusters import cluster
from support.servers import wait_until

from benchmarks.common import note, origin, results_only
from benchmarks.soak_driver import HANG
from benchmarks.soak_faults import NOTICED_WITHIN, RECLAIMED_WITHIN, Scene, Strike, a_round
from benchmarks.soak_kinds import kinds, target
from benchmarks.soak_report import report, total
from benchmarks.soak_watch import Watch

DRIVERS = 2
# Seconds by which a fault is held longer, at most, for a client to meet it.
UNTIL_STRUCK = 20.0


@dataclass
class Run:
    """One seed's faults, and how often each has struck.

    Attributes:
        longest: seconds that a fault lasts, at most, if it has struck by then.
        before: how often each fault has struck in earlier runs of the kind.
        struck, missed: how often, by fault; one that nothing has met is missed.
    """

    scene: Scene
    kind: str
    longest: float
    before: collections.Counter[str]
    struck: collections.Counter[str] = field(default_factory=collections.Counter)
    missed: collections.Counter[str] = field(default_factory=collections.Counter)
    _next: list[Strike] = field(default_factory=list)

    def go_on_for(self, seconds: float) -> list[str]:
        """Ends as soon as something goes wrong; returns that, unless a driver knows it."""
        scene = self.scene
        while len(scene.drivers) < DRIVERS:
            scene.add_driver()
        wait_until(lambda: all(each.job or each.failure() for each in scene.drivers), HANG)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(scene.random.uniform(0.5, 4))
            if any(driver.failure() for driver in scene.drivers) or scene.failures:
                return []  # `end` says what
            if not self._next:
                self._next = a_round(self.kind, scene.random, self.before + self.struck)
            strike = self._next.pop()
            if time.monotonic() + strike.takes > deadline:
                continue
            try:
                self._strike(strike)
            except Exception as error:
                # Whatever a fault stumbles over is a result, as much as what it does to Ray.
                traceback.print_exc()
                return [f"while this struck: {strike.name}: {error!r}"]
        return []

    def end(self) -> list[str]:
        """Stop the drivers; returns what went wrong with them, and what is left."""
        failures = self.scene.failures
        for driver in self.scene.drivers:
            self.scene.operations += driver.stop()
            failures += [driver.failed] if driver.failed else []
        try:
            wait_until(lambda: not self.scene.left(), RECLAIMED_WITHIN + NOTICED_WITHIN)
        except AssertionError:
            left = self.scene.left()
            return [*failures, f"keys and files are left: {left[:5]}, {len(left)} in all"]
        return failures

    def _strike(self, strike: Strike) -> None:
        choices = self.scene.random
        lasts = choices.choice([0, 1, 1, 3, 15, 40]) * choices.uniform(0.5, 1)
        lasts = min(lasts, self.longest) if strike.lasts else 0
        note(f"{time.strftime('%H:%M:%S')} {strike.name}, for {lasts:.1f} s")
        if strike.destroys:
            self.scene.destroyed.write_text("inf")
        with strike.fault(self.scene) as has_struck:
            time.sleep(lasts)
            with contextlib.suppress(AssertionError):
                wait_until(has_struck, UNTIL_STRUCK)
            counter = self.struck if has_struck() else self.missed
            counter[strike.name] += 1
        if strike.destroys:
            self.scene.destroyed.write_text(str(time.monotonic()))


def soak(
    kind: str, seed: int, minutes: float, longest: float, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run one seed after `earlier` ones; `failures` of the result is empty if all went well."""
    choices = random.Random(seed)
    about = origin()
    with tempfile.TemporaryDirectory(prefix="rvs-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        servers = stack.enter_context(target(kind, directory, seed))
        destroyed = directory / "destroyed"
        destroyed.write_text("0")
        params = {**servers.params, "retry_timeout": choices.choice([1, 5, 30])}
        nodes = stack.enter_context(cluster(io_workers=2, **params))
        watch = Watch()
        watch.start()
        before = total([each for each in earlier if each["kind"] == kind], "faults")
        run = Run(Scene(servers, nodes, destroyed, choices), kind, longest, before)
        start = time.monotonic()
        failures: list[str] = []
        try:
            failures += run.go_on_for(60 * minutes)
        finally:
            failures += run.end()
            watch.stop()
    return {
        "seed": seed,
        "kind": kind,
        "retry_timeout": params["retry_timeout"],
        "seconds": time.monotonic() - start,
        "faults": dict(run.struck.most_common()),
        "missed": dict(run.missed.most_common()),
        "operations": dict(run.scene.operations.most_common()),
        "reclaimed": run.scene.reclaimed,
        "io_worker_growth": watch.growth,
        "failures": failures + watch.failures(),
        **about,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """The results in a file of lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="for each seed")
    parser.add_argument("--longest", type=float, default=40, help="seconds of a fault, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[random.getrandbits(32)])
    parser.add_argument("--kinds", nargs="+", default=kinds(), choices=kinds(), help="in turn")
    parser.add_argument("--lines", type=Path, help="add a line of JSON to this file for each seed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    parser.add_argument("--render", type=Path, nargs="+", help="report on these files instead")
    options = parser.parse_args()
    if options.render:
        print(report([run for path in options.render for run in _read(path)]))
        return
    runs: list[dict[str, Any]] = []
    with results_only() as output:
        for number, seed in enumerate(options.seeds):
            kind = options.kinds[number % len(options.kinds)]
            note(f"seed {seed} on {kind}")
            earlier = _read(options.lines) if options.lines else runs
            runs.append(soak(kind, seed, options.minutes, options.longest, earlier))
            note(json.dumps(runs[-1], indent=2))
            if options.lines:
                with options.lines.open("a") as lines:
                    lines.write(json.dumps(runs[-1]) + "\n")
        print(json.dumps({"runs": runs}) if options.json else report(runs), file=output)
    sys.exit(any(run["failures"] for run in runs))


if __name__ == "__main__":
    main()
