"""The alerts of deploy/ fire when they should, and the dashboard shows what there is.

Every expression is parsed, and its metrics and labels are looked up among those that exist. Where
there is a `promtool`, as in CI, Prometheus itself checks the expressions and evaluates the rules.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import AggregateExpr, VectorSelector

from ray_valkey_spill.plugin.metrics import DEFINITIONS

ROOT = Path(__file__).parent.parent
RULES: Any = yaml.safe_load((ROOT / "deploy/prometheus-rules.yaml").read_text())
DASHBOARD: Any = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
PROMTOOL = shutil.which("promtool")

# From Ray, and from the scrape.
LABELS_OF_ALL = {"SessionName", "NodeAddress", "namespace", "ray_io_cluster", "valkey_server"}
OURS = {definition.exported: {*definition.labels} for definition in DEFINITIONS}
OURS |= {
    f"{definition.exported}_bucket": {*definition.labels, "le"}
    for definition in DEFINITIONS
    if definition.kind == "histogram"
}
# From Valkey's exporter, Ray, kubelet, kube-state-metrics and Prometheus: those that are used.
OTHERS: dict[str, set[str]] = {
    "redis_up": set(),
    "redis_instance_info": {"maxmemory_policy"},
    "redis_db_keys": {"db"},
    "redis_db_keys_expiring": {"db"},
    "redis_evicted_keys_total": set(),
    "redis_memory_used_bytes": set(),
    "redis_memory_used_rss_bytes": set(),
    "redis_memory_max_bytes": set(),
    "redis_net_input_bytes_total": set(),
    "redis_net_output_bytes_total": set(),
    "redis_commands_processed_total": set(),
    "redis_connected_clients": set(),
    "redis_rdb_last_bgsave_status": set(),
    "redis_rdb_last_save_timestamp_seconds": set(),
    "ray_spill_manager_objects_bytes": {"State"},
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
    "kube_pod_container_info": {"container"},
    "up": {"container"},
}
RUNBOOK = "https://github.com/ray-valkey-spill/ray-valkey-spill/blob/main/docs/runbook.md"
# What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h"}
VARIABLES |= dict.fromkeys(("$namespace", "$cluster", "$session"), ".*") | {"$server": ".+"}


def alerts() -> dict[str, Any]:
    return {rule["alert"]: rule for group in RULES["spec"]["groups"] for rule in group["rules"]}


def panels() -> list[Any]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def filled_in(target: Any) -> str:
    """The expression of a panel's target, with values for Grafana's variables."""
    expression: str = target["expr"]
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def dashboard_expressions() -> dict[str, str]:
    """By panel and target."""
    return {
        f"{panel['title']} ({panel['id']}), {target['refId']}": filled_in(target)
        for panel in panels()
        for target in panel["targets"]
    }


EXPRESSIONS = {name: rule["expr"] for name, rule in alerts().items()} | dashboard_expressions()


def parts(expression: str) -> list[Any]:
    """The nodes of its syntax tree."""
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return found


def metrics_in(expression: str) -> set[str]:
    return {str(part.name) for part in parts(expression) if isinstance(part, VectorSelector)}


# --- expressions ---


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expressions_are_on_metrics_and_labels_that_exist(expression: str) -> None:
    known = OURS | OTHERS
    labels = LABELS_OF_ALL.union(*(known[metric] for metric in metrics_in(expression)))
    for part in parts(expression):
        if isinstance(part, VectorSelector):
            matchers = {matcher.name for matcher in part.matchers.matchers}
            assert matchers <= LABELS_OF_ALL | known[str(part.name)]
        if isinstance(part, AggregateExpr) and part.modifier:
            assert {*part.modifier.labels} <= labels


@pytest.mark.parametrize(
    "wrong", ["sum by (x (up)", "rate(ray_valkey_spill_connected)", "1 +", "nothing(up)"]
)
def test_a_wrong_expression_would_be_found(wrong: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse(wrong)


# --- alerts ---


def test_alerts_are_for_the_operator_of_prometheus() -> None:
    assert (RULES["apiVersion"], RULES["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert RULES["metadata"]["namespace"] == "ai-ml"
    (monitor,) = yaml.safe_load_all((ROOT / "deploy/podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    # As they are called in Prometheus, which has no dots and slashes there.
    assert {re.sub(r"\W", "_", each) for each in monitor["spec"]["podTargetLabels"]} < LABELS_OF_ALL


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_says_what_it_is_and_where_to_read_on(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOK}#{alert.lower()}"
    text = " ".join(rule["annotations"].values())
    # A label that the expression has not would be an empty place in the text.
    by = {
        label
        for part in parts(rule["expr"])
        if isinstance(part, AggregateExpr) and part.modifier
        for label in part.modifier.labels
    }
    assert {*re.findall(r"\$labels\.(\w+)", text)} <= by


def test_the_page_lists_the_alerts() -> None:
    page = (ROOT / "deploy/README.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (critical|warning) \|", page, re.MULTILINE))
    assert listed == {name: rule["labels"]["severity"] for name, rule in alerts().items()}


def test_commands_in_alerts_are_among_those_of_the_pages() -> None:
    """Which are tested."""
    texts = " ".join(rule["annotations"]["description"] for rule in alerts().values())
    pages = (ROOT / "docs/operations.md").read_text() + (ROOT / "deploy/README.md").read_text()
    commands = {*re.findall(r"`(ray-valkey-spill .+?)`", texts)}
    assert commands
    assert [command for command in commands if command not in pages] == []


# --- alerts, evaluated ---

NODE = 'SessionName="s",NodeAddress="10.0.0.1"'
WORKER, OTHER = f'{NODE},WorkerId="a"', f'{NODE},WorkerId="b"'
SESSION = 'SessionName="s",NodeAddress="10.0.0.2",WorkerId="c"'


# The labels of raycluster.yaml's pods, and of its server's exporter.
SERVER = 'namespace="ai-ml",valkey_server="valkey.ai-ml"'
ELSEWHERE = 'namespace="ai-ml",valkey_server="other.ai-ml"'


def series(name: str, labels: str, values: str) -> dict[str, str]:
    metric = name if name in OTHERS else f"ray_valkey_spill_{name}"
    return {f"{metric}{{{labels}}}": values}


@dataclass(frozen=True)
class Scenario:
    """What is scraped every 15 s, four times a minute, and which alerts fire at which minutes.

    The server's exporter is there, and says that it is up, unless the scenario has it otherwise.
    Values are in promtool's notation: `0x4` is 0 and four more, `0+15x4` rises by 15 each time, `_`
    is not there, `stale` is there no more.
    """

    scraped: dict[str, str]
    firing: dict[float, str]


def budget(used: str, limit: str = "100x120") -> dict[str, str]:
    return series("budget_used_bytes", WORKER, used) | series("budget_limit_bytes", WORKER, limit)


def memory(used: str, maxmemory: str = "100x120", labels: str = SERVER) -> dict[str, str]:
    """As an IO worker reports it, of a server that is known by these labels."""
    return {
        **series("server_used_memory_bytes", f"{WORKER},{labels}", used),
        **series("server_maxmemory_bytes", f"{WORKER},{labels}", maxmemory),
    }


def keys(expiring: int, labels: str = SERVER) -> dict[str, str]:
    """As a server's exporter counts them: of 1,000, so many have a TTL."""
    return {
        **series("redis_db_keys", f'{labels},db="db0"', "1000x120"),
        **series("redis_db_keys_expiring", f'{labels},db="db0"', f"{expiring}x120"),
    }


def volume(claim: str, node: str, available: str) -> dict[str, str]:
    """Of 100 bytes, as the kubelet of a node reports it."""
    labels = f'namespace="ai-ml",persistentvolumeclaim="{claim}",instance="{node}"'
    return {
        **series("kubelet_volume_stats_available_bytes", labels, available),
        **series("kubelet_volume_stats_capacity_bytes", labels, "100x120"),
    }


def scraped_ray(up: str) -> dict[str, str]:
    return series("up", 'namespace="ai-ml",container="ray-worker",pod="a"', up) | series(
        "kube_pod_container_info", 'namespace="ai-ml",container="ray-worker",pod="a"', "1x120"
    )


SCENARIOS = {
    # Losses.
    "the first loss of an IO worker": Scenario(
        series("lost_objects_total", f'{WORKER},reason="missing"', "_x20 1x100"),
        {4: "", 6: "ObjectsLost", 14: "ObjectsLost", 17: ""},
    ),
    "one more loss": Scenario(
        series("lost_objects_total", f'{WORKER},reason="damaged"', "1x80 2x80"),
        {15: "", 21: "ObjectsLost", 35: ""},
    ),
    "losses for two reasons": Scenario(
        series("lost_objects_total", f'{WORKER},reason="missing"', "_x20 1x100")
        | series("lost_objects_total", f'{OTHER},reason="damaged"', "_x20 1x100"),
        {6: "ObjectsLost ObjectsLost"},
    ),
    "an old loss, and a Prometheus that was away": Scenario(
        series("lost_objects_total", f'{WORKER},reason="missing"', "5x80 _x39 5x80"),
        {20: "", 31: "", 36: "", 45: ""},
    ),
    # Budget.
    "a budget that is nearly used": Scenario(
        budget("50x19 95x59 50x60"), {4: "", 9: "", 11: "BudgetNearlyUsed", 30: ""}
    ),
    "a budget that has room": Scenario(budget("89x120"), {15: ""}),
    "a budget that is told of now and then": Scenario(
        budget("95 stale _x2 " * 25, "100 stale _x2 " * 25), {15: "BudgetNearlyUsed"}
    ),
    "no budget": Scenario(series("budget_used_bytes", WORKER, "95x120"), {15: ""}),
    "a budget that is nearly used, beside an overflow": Scenario(
        budget("95x120") | series("overflow_used_bytes", OTHER, "0x120"), {15: ""}
    ),
    # The overflow.
    "an overflow that hangs": Scenario(
        series("failures_total", f'{WORKER},operation="spill",reason="overflow"', "_ 0+0.5x119"),
        {4: "", 15: "OverflowFailing"},
    ),
    "an overflow that failed twice": Scenario(
        series("failures_total", f'{WORKER},operation="restore",reason="overflow"', "0x20 2x100"),
        {6: "", 10: "", 15: ""},
    ),
    "an overflow that is nearly full, on two nodes": Scenario(
        volume("ray-spill-overflow", "a", "50x19 5x100")
        | volume("ray-spill-overflow", "b", "50x19 5x100"),
        {4: "", 11: "OverflowNearlyFull"},
    ),
    "an overflow that has room": Scenario(volume("ray-spill-overflow", "a", "20x120"), {15: ""}),
    # The server's memory.
    "a server that is nearly full": Scenario(memory("95x120"), {3: "", 15: "ServerNearMaxmemory"}),
    "a server that has room": Scenario(memory("80x120"), {15: ""}),
    "a server without a limit": Scenario(memory("95x120", "0x120"), {15: ""}),
    "a server that is full of caches": Scenario(memory("99x120") | keys(expiring=900), {15: ""}),
    "a server that is full of what cannot be evicted": Scenario(
        memory("99x120") | keys(expiring=90), {15: "ServerNearMaxmemory"}
    ),
    "a full server beside another one that is full of caches": Scenario(
        memory("99x120") | keys(expiring=90) | keys(expiring=900, labels=ELSEWHERE),
        {15: "ServerNearMaxmemory"},
    ),
    "a full server that no exporter knows by its label": Scenario(
        memory("99x120", labels='namespace="ai-ml"') | keys(expiring=900, labels='namespace="x"'),
        {15: "ServerNearMaxmemory"},
    ),
    # Retries.
    "an IO worker that fails every two seconds": Scenario(
        series("failures_total", f'{WORKER},operation="spill",reason="full"', "0+7.5x120"),
        {3: "", 15: "RetryStorm"},
    ),
    "many IO workers that fail now and then": Scenario(
        series("failures_total", f'{WORKER},operation="spill",reason="full"', "0+3x120")
        | series("failures_total", f'{OTHER},operation="recover",reason="full"', "0+3x120"),
        {15: "RetryStorm"},
    ),
    "a few failures": Scenario(
        series("failures_total", f'{WORKER},operation="spill",reason="full"', "0x20 10x100"),
        {6: "", 15: ""},
    ),
    "an IO worker that fails every ten seconds": Scenario(
        series("failures_total", f'{WORKER},operation="recover",reason="full"', "0+1.5x120"),
        {15: ""},
    ),
    "connections that break all the time": Scenario(
        series("connection_breaks_total", WORKER, "0+15x120")
        | series("connection_breaks_total", OTHER, "0+15x120"),
        {3: "", 15: "ConnectionsBreak"},
    ),
    "connections that break now and then": Scenario(
        series("connection_breaks_total", WORKER, "0+6x120"), {15: ""}
    ),
    "connections that break at a failover": Scenario(
        series("connection_breaks_total", WORKER, "0x20 160x100"), {6: "", 10: "", 15: ""}
    ),
    # Connection and lease.
    "a node that cannot use the server": Scenario(
        series("connected", WORKER, "1x20 0x100"), {5: "", 7.75: "", 10: "NotConnected"}
    ),
    "a node whose other IO worker can": Scenario(
        series("connected", WORKER, "1x20 0x100") | series("connected", OTHER, "1x120"), {10: ""}
    ),
    "a node that came back": Scenario(
        series("connected", WORKER, "1x20 0x40 1x60"), {14: "NotConnected", 17: ""}
    ),
    "two nodes, one of which cannot": Scenario(
        series("connected", WORKER, "0x120") | series("connected", SESSION, "1x120"),
        {10: "NotConnected"},
    ),
    "a lease that is not renewed": Scenario(
        series("lease_renewed_timestamp_seconds", WORKER, "0+15x20 300x100"),
        {7: "", 11: "LeaseNotRenewed"},
    ),
    "a lease that never was": Scenario(
        series("lease_renewed_timestamp_seconds", WORKER, "_x40 0x80"),
        {10: "", 13: "LeaseNotRenewed"},
    ),
    "a lease that another IO worker renews": Scenario(
        series("lease_renewed_timestamp_seconds", WORKER, "0+15x20 300x100")
        | series("lease_renewed_timestamp_seconds", OTHER, "0+15x120"),
        {11: ""},
    ),
    "a node that has ended": Scenario(
        series("lease_renewed_timestamp_seconds", WORKER, "0+15x20 300x2 stale")
        | series("connected", WORKER, "1x22 stale"),
        dict.fromkeys((quarter / 4 for quarter in range(20, 60)), ""),
    ),
    # Metrics.
    "a node that spills elsewhere": Scenario(
        series("ray_spill_manager_objects_bytes", f'{NODE},{SERVER},State="Spilled"', "0x20 9x100"),
        {10: "", 20: "MetricsAbsent"},
    ),
    "a node that spills, and reports it": Scenario(
        series("ray_spill_manager_objects_bytes", f'{NODE},{SERVER},State="Spilled"', "9x120")
        | series("lease_renewed_timestamp_seconds", f"{WORKER},{SERVER}", "0+15x120"),
        {20: ""},
    ),
    "a node that has not spilled": Scenario(
        series("ray_spill_manager_objects_bytes", f'{NODE},{SERVER},State="Spilled"', "0x120"),
        {20: ""},
    ),
    "a Ray that is not meant to spill to Valkey": Scenario(
        series("ray_spill_manager_objects_bytes", f'{NODE},State="Spilled"', "9x120"), {20: ""}
    ),
    "Ray's pods, not scraped": Scenario(scraped_ray("1x20 0x100"), {10: "", 20: "MetricsAbsent"}),
    "Ray's pods, scraped": Scenario(scraped_ray("1x120"), {20: ""}),
    # Valkey, by its exporter.
    "a server that is down": Scenario(
        series("redis_up", SERVER, "1x20 0x40 1x60"),
        {5: "", 5.75: "", 7: "ValkeyDown", 14: "ValkeyDown", 16: ""},
    ),
    "somebody else's server that is down": Scenario(
        series("redis_up", 'namespace="other"', "0x120"), {15: ""}
    ),
    "an exporter that is gone": Scenario(
        series("redis_up", SERVER, "1x20 stale"), {5: "", 9: "", 11: "ValkeyExporterAbsent"}
    ),
    "a policy that may evict anything": Scenario(
        series("redis_instance_info", f'{SERVER},maxmemory_policy="volatile-lru"', "1x20 stale")
        | series(
            "redis_instance_info", f'{SERVER},maxmemory_policy="allkeys-lru"', "_x20 1x40 stale"
        ),
        {4: "", 6: "ValkeyEvictionPolicyUnsafe", 20: ""},
    ),
    "caches that keep being evicted": Scenario(
        series("redis_evicted_keys_total", SERVER, "0+30x120"), {10: "", 22: "ValkeyEvictions"}
    ),
    "caches that are evicted now and then": Scenario(
        series("redis_evicted_keys_total", SERVER, "0x20 3000x40 3100x60"), {10: "", 22: ""}
    ),
    # Dead nodes.
    "dead nodes whose objects are referenced for long": Scenario(
        series("dead_nodes_bytes", WORKER, "60x200")
        | series("budget_used_bytes", WORKER, "80x200"),
        {29: "", 32: "DeadNodesHoldMuch"},
    ),
    "dead nodes whose objects go": Scenario(
        series("dead_nodes_bytes", WORKER, "60x100 0x100")
        | series("budget_used_bytes", WORKER, "80x200"),
        {20: "", 24: "", 32: ""},
    ),
    # Snapshots.
    "a snapshot that failed": Scenario(
        series("redis_rdb_last_bgsave_status", SERVER, "1x20 0x60 1x40"),
        {4: "", 7: "", 15: "ValkeySnapshotFails", 25: ""},
    ),
    "somebody else's snapshot that failed": Scenario(
        series("redis_rdb_last_bgsave_status", 'namespace="other"', "0x120"), {15: ""}
    ),
    "a volume without room for a snapshot": Scenario(
        volume("valkey", "a", "50x19 14x100"), {4: "", 11: "ValkeyVolumeNearlyFull"}
    ),
    "a volume that has room": Scenario(
        volume("valkey", "a", "16x120") | volume("else", "a", "1x120"), {15: ""}
    ),
}


def full_name(alert: str) -> str:
    return alert if alert in alerts() else f"RayValkeySpill{alert}"


def unit_test(scenario: Scenario) -> dict[str, Any]:
    """A scenario, as promtool has it."""
    expected = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{60 * minute:g}s",
            "exp_samples": [
                {"labels": f'{{alertname="{full_name(alert)}"}}', "value": number}
                for alert, number in Counter(firing.split()).items()
            ],
        }
        for minute, firing in scenario.firing.items()
    ]
    there = series("redis_up", SERVER, "1x240") | scenario.scraped
    scraped = [{"series": name, "values": values} for name, values in there.items()]
    return {"interval": "15s", "input_series": scraped, "promql_expr_test": expected}


def test_there_is_a_scenario_for_each_alert() -> None:
    fired = {
        full_name(alert)
        for scenario in SCENARIOS.values()
        for firing in scenario.firing.values()
        for alert in firing.split()
    }
    assert fired == alerts().keys()


def output_of_promtool(directory: Path, *command: str, **files: Any) -> str:
    """Of one that has succeeded, in a directory with these YAML files."""
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(content))
    result = subprocess.run(
        [str(PROMTOOL), *command], cwd=directory, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="there is no promtool here")


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path, scenario: Scenario) -> None:
    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "15s",
        "tests": [unit_test(scenario)],
    }
    output_of_promtool(tmp_path, "test", "rules", "tests.yaml", rules=RULES["spec"], tests=tests)


@needs_promtool
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    command = ("check", "rules", "--lint-fatal", "rules.yaml")
    output = output_of_promtool(tmp_path, *command, rules=RULES["spec"])
    assert f"{len(alerts())} rules found" in output


@needs_promtool
def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": "x", "expr": expression, "labels": {"of": name}}
        for name, expression in dashboard_expressions().items()
    ]
    groups = {"groups": [{"name": "dashboard", "rules": rules}]}
    output = output_of_promtool(tmp_path, "check", "rules", "rules.yaml", rules=groups)
    assert f"{len(rules)} rules found" in output


@needs_promtool
def test_the_dashboard_counts_the_losses_of_its_range(tmp_path: Path) -> None:
    """Of an hour: what was lost before, by IO workers that are still there or not, is not."""
    (count,) = [
        panel["targets"][0]
        for panel in panels()
        if (panel["title"], panel["type"]) == ("Objects lost", "stat")
    ]
    scraped = (
        series("lost_objects_total", f'{WORKER},reason="missing"', "5x360 8x200")
        | series("lost_objects_total", f'{OTHER},reason="missing"', "_x400 2x200")
        | series("lost_objects_total", f'{SESSION},reason="damaged"', "7x200 stale")
    )
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": each} for name, each in scraped.items()],
        "promql_expr_test": [
            {
                "expr": filled_in(count),
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": lost}],
            }
            for minute, lost in ((30, 12), (80, 0), (110, 5))
        ],
    }
    tests = {"evaluation_interval": "15s", "tests": [test]}
    output_of_promtool(tmp_path, "test", "rules", "tests.yaml", tests=tests)


# --- the dashboard ---


def test_the_dashboard_shows_every_metric() -> None:
    shown = {
        metric.removesuffix("_bucket")
        for expression in dashboard_expressions().values()
        for metric in metrics_in(expression)
    }
    assert shown - OTHERS.keys() == {definition.exported for definition in DEFINITIONS}


def test_variables_choose_source_namespace_cluster_session_and_server() -> None:
    kinds = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    chosen = ("namespace", "cluster", "session", "server")
    assert kinds == {"datasource": "datasource", **dict.fromkeys(chosen, "query")}
    for each in DASHBOARD["templating"]["list"][1:]:
        assert each["query"]["query"] == each["definition"]
        metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", each["definition"]).groups()
        assert metrics_in(filled_in({"expr": metric})) <= (OURS | OTHERS).keys()
        assert label in LABELS_OF_ALL
        assert f"${each['name']}" not in metric


def chosen_by(metric: str) -> set[str]:
    """How panels select the series of a metric."""
    if metric in OURS:
        return {'namespace=~"$namespace"', 'ray_io_cluster=~"$cluster"', 'SessionName=~"$session"'}
    if metric.startswith("redis_"):
        return {'valkey_server=~"$server"'}
    return {'namespace=~"$namespace"'}


def test_every_panel_shows_what_the_variables_choose() -> None:
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            selectors = re.findall(r"(\w+)\{(.+?)\}", target["expr"])
            found = [p for p in parts(filled_in(target)) if isinstance(p, VectorSelector)]
            assert len(selectors) == len(found)
            for metric, matchers in selectors:
                assert chosen_by(metric) <= {*matchers.split(",")}


def test_a_series_has_one_colour_in_all_panels() -> None:
    colours: dict[str, set[str]] = {}
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "timeseries":
            continue
        # By its name, not by its place among those that happen to be there.
        assert panel["fieldConfig"]["defaults"]["color"] == {"mode": "palette-classic-by-name"}
        names = {target["legendFormat"] for target in panel["targets"]}
        fixed = {
            override["matcher"]["options"]: each["value"]["fixedColor"]
            for override in panel["fieldConfig"]["overrides"]
            if override["matcher"]["id"] == "byName"
            for each in override["properties"]
        }
        assert not fixed.keys() & names
        assert len({*fixed.values()}) == len(fixed)
        for name, colour in fixed.items():
            colours.setdefault(name, set()).add(colour)
    assert {"spill valkey", "restore overflow"} < colours.keys()
    assert all(len(each) == 1 for each in colours.values())


def test_the_dashboard_links_to_the_runbook() -> None:
    assert RUNBOOK in {link["url"] for link in DASHBOARD["links"]}
    linked = [link for panel in panels() for link in panel.get("links", [])]
    assert linked
    for link in linked:
        alert = link["title"].removeprefix("Runbook: ")
        assert link["url"] == alerts()[alert]["annotations"]["runbook_url"]


def test_panels_have_units_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels())
