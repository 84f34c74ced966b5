"""A Ray under memory pressure, as the dashboard of deploy/ shows it.

Runs a job of some minutes with faults in it beside a cache, while a Prometheus scrapes Ray's
endpoint and an exporter of Valkey. Then it draws each panel of the dashboard from the panel's own
queries. It needs `ray[default]`, and on the PATH the programs of Debian's packages `prometheus` and
`prometheus-redis-exporter`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import re
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import valkey
from support.clusters import ray_with

from benchmarks.common import MIB, valkey_server
from ray_valkey_spill import system_config

DEPLOY = Path(__file__).parents[1] / "deploy"
OBJECT = 8 * MIB
STEP = 2  # seconds between scrapes, and points
# As the manifests of deploy/ label what is scraped.
SERVER = {"namespace": "ai-ml", "valkey_server": "valkey.ai-ml"}
RAY = {**SERVER, "ray_io_cluster": "ray"}
# Grafana's palette, by its names; and those of it that stand for a series' name.
COLOURS = {
    "dark-blue": "#1F60C4",
    "light-blue": "#8AB8FF",
    "dark-green": "#37872D",
    "light-green": "#96D98D",
    "dark-orange": "#FA6400",
    "light-orange": "#FFB357",
    "red": "#F2495C",
    "purple": "#B877D9",
    "orange": "#FF9830",
}
BY_NAME = ["#7EB26D", "#EAB839", "#6ED0E0", "#EF843C", "#1F78C1", "#BA43A9", "#705DA0", "#508642"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--into", type=Path, default=DEPLOY / "dashboard.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rvs-") as directory, valkey_server() as urls:
        client = valkey.from_url(urls["tcp"], socket_timeout=60)  # longer than it stands still
        client.config_set("maxmemory", 512 * MIB)
        with (
            _ray(urls["tcp"], f"{directory}/overflow"),
            _exporter(urls["tcp"]) as exporter,
            _prometheus(Path(directory), exporter) as prometheus,
        ):
            start = time.time()
            _press(client, options.seconds)
            _draw(prometheus, start, time.time(), options.into)


# --- what is looked at ---


def _ray(url: str, overflow: str) -> AbstractContextManager[None]:
    params = {"max_bytes": 300 * MIB, "overflow_uri": overflow, "retry_timeout": 3.0}
    config = {**system_config(url, **params), "metrics_report_interval_ms": 1000}
    return ray_with(config, object_store=200 * MIB)


def _press(client: valkey.Valkey, seconds: int) -> None:
    """Keep more and less than Valkey and the object store hold, and strike at three times."""
    faults = {0.35: _break_connections, 0.5: _stand_still, 0.75: _lose_one}
    start, generator = time.monotonic(), np.random.default_rng(0)
    kept: list[Any] = []
    for n in itertools.count():
        if (share := (time.monotonic() - start) / seconds) >= 1:
            return
        client.set(f"emb:{n}", bytes(MIB // 2), ex=3600)  # another tenant's cache
        kept.append(ray.put(generator.integers(0, 1 << 24, OBJECT // 8)))
        del kept[: -110 if 0.2 < share < 0.8 else -35]
        ray.get(random.choice(kept))
        for due in [due for due in faults if due < share]:
            faults.pop(due)(client, kept)
        time.sleep(0.1)


def _break_connections(client: valkey.Valkey, kept: list[Any]) -> None:
    for ref in kept[:5]:
        client.client_kill_filter(_type="normal", skipme=True)
        ray.get(ref)


def _stand_still(client: valkey.Valkey, kept: list[Any]) -> None:
    client.client_pause(15_000)


def _lose_one(client: valkey.Valkey, kept: list[Any]) -> None:
    for ref in kept:
        keys = list(client.scan_iter(f"ray:spill:*{ref.hex()}*", count=10_000))
        try:
            ray.get(ref if keys and client.delete(*keys) else [])
        except ray.exceptions.ObjectLostError:
            kept.remove(ref)
            return


@contextlib.contextmanager
def _running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _free_address() -> str:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{chosen.getsockname()[1]}"


@contextlib.contextmanager
def _exporter(url: str) -> Iterator[str]:
    """The address of an exporter of the server."""
    address, server = _free_address(), url.replace("valkey://", "redis://")
    command = ["prometheus-redis-exporter", "-redis.addr", server, "-web.listen-address", address]
    with _running(*command, "-config-command", "-"):
        yield address


@contextlib.contextmanager
def _prometheus(directory: Path, exporter: str) -> Iterator[str]:
    """The URL of one that scrapes Ray's node and the exporter."""
    (node,) = ray.nodes()
    config = directory / "prometheus.yml"
    scraped = {f"127.0.0.1:{node['MetricsExportPort']}": RAY, exporter: SERVER}
    targets = [{"targets": [target], "labels": labels} for target, labels in scraped.items()]
    scrape = {"job_name": "dashboard", "scrape_interval": f"{STEP}s", "static_configs": targets}
    config.write_text(json.dumps({"scrape_configs": [scrape]}))  # which is YAML
    address = _free_address()
    options = {"config.file": config, "storage.tsdb.path": directory / "tsdb"}
    command = ["prometheus", f"--web.listen-address={address}", "--log.level=error"]
    with _running(*command, *(f"--{name}={value}" for name, value in options.items())):
        yield f"http://{address}"


# --- how it looks ---


def _query(prometheus: str, expression: str, start: float, end: float) -> list[Any]:
    values = {"$__rate_interval": "15s", "$__range": f"{end - start:.0f}s"}
    values |= dict.fromkeys(("$namespace", "$cluster", "$session", "$server"), ".+")
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    given = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": STEP})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{given}") as reply:
        found: list[Any] = json.load(reply)["data"]["result"]
    return found


def _readable(value: float, unit: str) -> str:
    if unit in ("bytes", "binBps"):
        power = max(p for p in range(4) if p == 0 or value >= 1 << 10 * p)
        size = f"{value / (1 << 10 * power):.3g} {['B', 'KiB', 'MiB', 'GiB'][power]}"
        return size + ("/s" if unit == "binBps" else "")
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "bool_yes_no":
        return {0.0: "no", 1.0: "yes"}.get(value, "")
    suffix = {"ops": "/s", "cps": "/s", "percentunit": " %"}.get(unit, "")
    value = 100 * value if unit == "percentunit" else value
    return (f"{value:.3g}" if value < 1000 else f"{value:,.0f}") + suffix


def _draw(prometheus: str, start: float, end: float, into: Path) -> None:
    from matplotlib import pyplot as plt  # not needed for --help

    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(18, rows * 0.42))
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        if panel["type"] == "timeseries":
            place = (x + 1.2) / 24, 1 - (y + h - 2) / rows, (w - 1.6) / 24, (h - 3) / rows
            _draw_lines(figure.add_axes(place), panel, prometheus, start, end)
            continue
        axes = figure.add_axes((x / 24, 1 - (y + h) / rows, w / 24, h / rows))
        axes.axis("off")
        if panel["type"] == "row":
            axes.text(0.01, 0.3, panel["title"], fontsize=14, fontweight="bold")
            continue
        shown = panel["fieldConfig"]["defaults"]
        found = _query(prometheus, panel["targets"][0]["expr"], start, end)
        last = [_readable(float(each["values"][-1][1]), shown["unit"]) for each in found]
        axes.text(0.5, 0.75, panel["title"], ha="center", fontsize=11)
        axes.text(0.5, 0.3, *last or [shown["noValue"]], ha="center", fontsize=22)
    figure.savefig(into, dpi=80)


def _overridden(panel: Any, name: str, query: str, what: str) -> Any:
    """What the panel has for one series in the place of its default, or None."""
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] in (name, query):
            for each in override["properties"]:
                if each["id"] == what:
                    return each["value"]
    return None


def _colour(panel: Any, name: str, query: str) -> str:
    fixed = _overridden(panel, name, query, "color")
    return COLOURS[fixed["fixedColor"]] if fixed else BY_NAME[zlib.crc32(name.encode()) % 8]


def _draw_lines(axes: Any, panel: Any, prometheus: str, start: float, end: float) -> None:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    defaults = panel["fieldConfig"]["defaults"]
    stepped = defaults["custom"]["lineInterpolation"] == "stepAfter"
    for target in panel["targets"]:
        for found in _query(prometheus, target["expr"], start, end):
            label = re.sub(r"{{(\w+)}}", r"{\1}", target["legendFormat"]).format(**found["metric"])
            values = {round((when - start) / STEP): float(value) for when, value in found["values"]}
            points = range(int((end - start) / STEP))
            dashed = _overridden(panel, label, target["refId"], "custom.lineStyle")
            axes.plot(
                [STEP * i for i in points],
                [values.get(i, math.nan) for i in points],
                label=label,
                color=_colour(panel, label, target["refId"]),
                linestyle="--" if dashed else "-",
                drawstyle="steps-post" if stepped else "default",
            )
    if not axes.lines:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes, color="grey")
    if defaults["custom"]["scaleDistribution"]["type"] == "log":
        axes.set_yscale("log")
    else:
        top = defaults.get("max") or axes.get_ylim()[1]
        axes.set_ylim(-0.02 * top, 1.05 * top)
        if defaults.get("decimals") == 0:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        elif defaults["unit"] in ("bytes", "binBps") and top > 1:
            axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(top / 6))))
    axes.yaxis.set_major_formatter(lambda value, _: _readable(value, defaults["unit"]))
    axes.xaxis.set_major_formatter("{x:.0f} s")
    axes.set_xlim(0, end - start)
    axes.set_title(panel["title"], fontsize=11, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        columns = 1 if any(len(line.get_label()) > 30 for line in axes.lines) else 3
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "frameon": False}
        axes.legend(**below, ncols=columns, fontsize=8)


if __name__ == "__main__":
    main()
