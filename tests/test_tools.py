"""Commands that show and remove what is stored: ls, stats, inspect, gc, and the ACL for them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result
from support.cli import cli_runner
from support.proxy import proxy_to
from support.servers import FOREIGN, INDEX, PATIENCE, ROOT, Server, valkey_server, wait_until
from support.stores import Store

from ray_valkey_spill.cli import commands, rendering
from ray_valkey_spill.cli.inspection import parse_target
from ray_valkey_spill.cli.inventory import (
    Figures,
    Inventory,
    NodeFigures,
    Selection,
    Servers,
    Statistics,
    age,
    percent,
    total,
)
from ray_valkey_spill.config import Config, parameters
from ray_valkey_spill.errors import ConfigError, OverflowUnavailableError, SpillError
from ray_valkey_spill.format.codec import Codec
from ray_valkey_spill.format.header import Chunk, Header
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import Request
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.liveness import RunningSession
from ray_valkey_spill.store.object_store import problems
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.base import Stat
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to

SESSIONS = ("session_2025-11-24_15-00-00_123456_4242", "session_2025-11-25_08-30-00_654321_1234567")
NODES = ("ab" * 28, "cd" * 28)
CHUNK = 10_000
KEYS = Keyspace(ROOT)
KIB, MIB = 1 << 10, 1 << 20


def tool(*args: str, color: bool = False, **env: str) -> Result:
    """Run a command in this process. Raises what it raises."""
    runner = cli_runner(env={"COLUMNS": "80", **env})
    result = runner.invoke(commands.cli, args, color=color)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*args: str, **env: str) -> Any:
    result = tool(*args, "--json", **env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def object_id(number: int) -> str:
    return f"{number:048x}01000000"


@dataclass
class Stock:
    """What several nodes have stored, in Valkey and in an overflow."""

    server: Server
    overflow: Path
    urls: list[str] = field(default_factory=list)

    @property
    def options(self) -> list[str]:
        return ["--url", self.server.url, "--overflow-uri", str(self.overflow)]

    def config(self, **params: Any) -> Config:
        given = {"url": self.server.url, "chunk_size": CHUNK}
        return Config.load({**given, "overflow_uri": str(self.overflow), **params}, {})

    @contextlib.contextmanager
    def store(self, session: str, node: str, **params: Any) -> Iterator[Store]:
        with contextlib.closing(Store(self.config(**params), session, node)) as store:
            yield store

    @contextlib.contextmanager
    def ledger(self) -> Iterator[tuple[Ledger, Link]]:
        """The ledger, and a link for the requests that it makes."""
        with contextlib.closing(link_to(self.config())) as link:
            yield Ledger(link, KEYS), link

    def put(self, session: str, node: str, *numbers: int, **params: Any) -> list[str]:
        """Put an object for each number, which is as many kilobytes long, as a living node does."""
        with self.store(session, node, **params) as store:
            store.renew_lease("", lambda: False)
            store.join_overflow()
            urls, failure = store.put([source(number) for number in numbers])
        assert failure is None
        self.urls += urls
        return urls

    def destroy(self) -> None:
        for session in SESSIONS:
            for node in NODES:
                with self.store(session, node) as store:
                    store.destroy(lambda pid: False)


def source(number: int) -> SourceObject:
    data = np.arange(number * 125, dtype=np.int64).tobytes()
    return SourceObject(object_id(number), b"PYTHON", b"\x00owner", memoryview(data))


@pytest.fixture
def stock(server: Server, tmp_path: Path) -> Iterator[Stock]:
    stock = Stock(server, tmp_path / "overflow")
    yield stock
    stock.destroy()


@pytest.fixture
def full(stock: Stock) -> Stock:
    """Two sessions, the first of two nodes, one of which has overflowed."""
    stock.put(SESSIONS[0], NODES[0], 1, 95)
    stock.put(SESSIONS[0], NODES[1], 2)
    stock.put(SESSIONS[0], NODES[1], 96, 3, max_bytes=1)
    stock.put(SESSIONS[1], NODES[0], 4)
    return stock


def calls(server: Server) -> dict[str, int]:
    """How often each command has been carried out since the last `forget_calls`."""
    stats = server.client.info("commandstats")
    named = {name.removeprefix("cmdstat_"): values["calls"] for name, values in stats.items()}
    return {name: n for name, n in named.items() if name not in ("info", "config|resetstat")}


def assert_fits(text: str) -> None:
    """All lines fit 80 columns but those of keys and URLs, and none has a style."""
    lines = [line for line in text.splitlines() if not line.startswith(("key ", "url ", "file "))]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text


# --- figures and text ---


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (KIB, "1.00 KiB"),
        (9.996 * KIB, "10.0 KiB"),
        (99.96 * KIB, "100 KiB"),
        (999.4 * KIB, "999 KiB"),
        (999.5 * KIB, "0.98 MiB"),
        (1.5 * MIB, "1.50 MiB"),
        (20 << 30, "20.0 GiB"),
        (5000 << 60, "5,000 EiB"),
    ],
)
def test_a_size_has_three_digits_and_a_unit(size: float, text: str) -> None:
    assert rendering.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (172_800, "2d"),
        (9e7, "1041d"),
    ],
)
def test_an_age_is_in_the_largest_unit_of_which_there_are_two(
    seconds: float | None, text: str
) -> None:
    assert rendering.age_text(seconds) == text


def test_ratios_and_percentages_of_nothing_are_none() -> None:
    assert Figures(1, 10, 4).ratio == 2.5
    assert Figures().ratio is None
    assert rendering.ratio_text(None) == "-"
    assert [rendering.ratio_text(ratio) for ratio in (2.5, 254.1, 1234.5)] == [
        "2.50",
        "254.10",
        "1,234",
    ]
    assert percent(1, 4) == 25
    assert percent(1, None) is None
    assert percent(1, 0) is None


def test_clocks_that_do_not_agree_make_nothing_younger_than_new() -> None:
    assert age(100.0, 130.0) == 30
    assert age(130.0, 100.0) == 0


def test_figures_add_up_and_keep_the_oldest() -> None:
    def entry(ms: int) -> Entry:
        return Entry(ObjectName("s", "n", "ab", f"{ms:011x}" + 16 * "0", 0), 10, 4)

    old, new = Figures.of([entry(1000), entry(2000)], half_written=1), Figures.of([entry(3000)])
    assert old == Figures(2, 20, 8, 1.0, 1)
    assert new + Figures() == new
    both = old + new
    assert both == Figures(3, 30, 12, 1.0, 1)
    assert both.as_dict(now=61.0) == {
        "objects": 3,
        "logical_bytes": 30,
        "stored_bytes": 12,
        "ratio": 2.5,
        "oldest_age_seconds": 60.0,
        "half_written": 1,
    }
    nodes = [NodeFigures(NodeName("s", "a"), old, new), NodeFigures(NodeName("s", "b"), new)]
    assert total(nodes) == (both, new)


@pytest.mark.parametrize(
    ("renewed", "fresh"), [(None, False), (0.0, True), (cleanup.LEASE, True), (60.1, False)]
)
def test_a_lease_is_fresh_until_it_has_run_out(renewed: float | None, fresh: bool) -> None:
    assert NodeFigures(NodeName("s", "n"), lease_age=renewed).has_fresh_lease is fresh


def test_a_table_aligns_what_is_styled_too_and_closes_up_where_it_is_wide() -> None:
    red = click.style("12", fg="red")
    rows = [["a", red, "x"], "across", ["bcd", "3", ""]]
    lines = [click.unstyle(line) for line in rendering.table(["l", ">right", "end"], rows, 80)]
    assert lines == [
        "l    right  end",
        "a       12  x",
        "across",
        "bcd      3",
    ]
    narrow = [click.unstyle(line) for line in rendering.table(["l", ">right", "end"], rows, 14)]
    assert narrow[0] == "l   right end"


def test_of_many_chunks_the_first_and_last_and_the_one_asked_for_are_shown() -> None:
    assert rendering.shown_chunks(3, None) == [0, 1, 2]
    assert rendering.shown_chunks(100, None) == [0, 1, 2, 3, 4, 97, 98, 99]
    assert rendering.shown_chunks(100, 50) == [0, 1, 2, 3, 4, 50, 97, 98, 99]
    assert rendering.shown_chunks(0, None) == []


# --- ls ---


def test_ls_lists_all_that_is_stored_in_both_tiers(full: Stock) -> None:
    rows = printed("ls", *full.options)
    assert {row["url"] for row in rows} == set(full.urls)
    assert sorted(row["object"] for row in rows) == [object_id(n) for n in (1, 2, 3, 4, 95, 96)]
    for row in rows:
        assert row["logical_bytes"] == int(row["object"][:48], 16) * 1000
        assert 0 <= row["age_seconds"] < 300
        assert row["name"].startswith(f"{row['session']}:{row['node']}:{row['object']}.")
        if row["tier"] == "valkey":
            assert full.server.client.exists(row["key"])
            assert row["path"] is None
        else:
            assert row["key"] is None
            assert Path(row["path"]).stat().st_size == row["stored_bytes"]
    assert [row["tier"] for row in rows].count("overflow") == 2
    with full.ledger() as (ledger, _):
        counted = sum(usage.stored for usage in ledger.usages().values())
    assert counted == sum(row["stored_bytes"] for row in rows if row["tier"] == "valkey")
    # Without the overflow, what is in Valkey.
    assert len(printed("ls", "--url", full.server.url)) == 4


def test_ls_filters_by_how_sessions_and_nodes_begin(full: Stock) -> None:
    def listed(*args: str) -> list[int]:
        return [int(row["object"][:48], 16) for row in printed("ls", *full.options, *args)]

    assert listed("--session", SESSIONS[1]) == [4]
    assert listed("--session", "session_2025-11-24", "--node", "ab") == [1, 95]
    assert listed("--node", "cd") == [2, 3, 96]
    assert listed("--node", "ef") == []
    assert tool("ls", *full.options, "--node", "ef").stdout == "No stored object matches.\n"


def test_ls_filters_by_tier_and_age_sorts_and_limits(full: Stock) -> None:
    def listed(*args: str) -> list[int]:
        return [int(row["object"][:48], 16) for row in printed("ls", *full.options, *args)]

    assert listed("--tier", "overflow") == [3, 96]
    assert listed("--tier", "valkey") == [1, 95, 2, 4]
    assert listed("--sort", "size") == [96, 95, 4, 3, 2, 1]
    assert listed("--sort", "size", "--limit", "2") == [96, 95]
    rows = printed("ls", *full.options, "--sort", "stored")
    sizes = [row["stored_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert listed("--sort", "stored", "--limit", "2") == listed("--sort", "stored")[:2]
    assert listed("--limit", "3") == [1, 95, 2]
    # In the order in which they were put, but for those that were put in one batch.
    assert [{*listed("--sort", "age")[:2]}, listed("--sort", "age")[-1]] == [{1, 95}, 4]
    assert listed("--older-than", "1h") == []
    assert len(listed("--older-than", "0s")) == 6
    text = tool("ls", *full.options, "--sort", "size", "--limit", "2").stdout
    assert text.splitlines()[-1].startswith("2 objects of 187 KiB, stored in ")
    assert text.splitlines()[-1].endswith(", as --limit allows")
    text = tool("ls", *full.options, "--older-than", "1h").stdout
    assert text == "No stored object matches.\n"


def test_ls_finds_objects_of_a_given_age(server: Server) -> None:
    now = server.client.time()[0] * 1000
    node = f"{SESSIONS[0]}:{NODES[0]}"
    ages = {1: 30, 2: 300, 3: 30_000}
    entries = [
        f"{node}:{object_id(i)}.{now - age * 1000:011x}{'0' * 16}.0.10.20"
        for i, age in ages.items()
    ]
    server.client.zadd(KEYS.index, dict.fromkeys(entries, 0))
    try:
        for least, expected in (("10", [1, 2, 3]), ("2m", [2, 3]), ("2h", [3]), ("1d", [])):
            rows = printed("ls", "--url", server.url, "--older-than", least)
            assert [row["object"] for row in rows] == [object_id(i) for i in expected]
        rows = printed("ls", "--url", server.url, "--sort", "age")
        assert [row["object"] for row in rows] == [object_id(i) for i in (3, 2, 1)]
    finally:
        server.client.delete(KEYS.index)


def test_ls_is_readable_at_eighty_columns(full: Stock) -> None:
    result = tool("ls", *full.options)
    assert_fits(result.stdout)
    header, *lines, end = result.stdout.splitlines()
    assert header.split() == ["object", "data", "stored", "age"]
    assert lines[0] == f"{SESSIONS[0]}, node abababababab, Valkey"
    # Whole, so that it can be given to `inspect`.
    assert lines[1].split()[0] == object_id(1)
    assert re.search(" 1000 B| 0.98 KiB", lines[1])
    assert f"{SESSIONS[0]}, node cdcdcdcdcdcd, overflow" in lines
    assert end.startswith("6 objects of 196 KiB, stored in ")


def test_ls_has_a_page_of_the_index_at_a_time(server: Server) -> None:
    node = f"{SESSIONS[0]}:{NODES[0]}"
    entries = [f"{node}:{object_id(i)}.{i:027x}.0.10.20" for i in range(1700)]
    server.client.zadd(KEYS.index, dict.fromkeys(entries, 0))
    try:
        with contextlib.closing(Inventory(Config.load({"url": server.url}, {}))) as inventory:
            server.client.config_resetstat()
            items = inventory.items()
            lines = rendering.listing(items, Selection(), inventory.time())
            assert len(list(zip(range(3), lines))) == 3
            first = calls(server)["zrangebylex"]
            assert len(list(lines)) == 1700
            assert calls(server)["zrangebylex"] == first + 4
        rows = printed("ls", "--url", server.url)
        assert [row["object"] for row in rows] == [object_id(i) for i in range(1700)]
    finally:
        server.client.delete(KEYS.index)


# --- stats ---


def test_stats_adds_up_by_session_node_and_tier(full: Stock) -> None:
    report = printed("stats", *full.options, "--max-bytes", "1000000")
    rows = printed("ls", *full.options)

    def check(figures: dict[str, Any], tier: str, **of: str) -> None:
        wanted = [r for r in rows if r["tier"] == tier and all(r[k] == of[k] for k in of)]
        assert figures["objects"] == len(wanted)
        for sizes in ("logical_bytes", "stored_bytes"):
            assert figures[sizes] == sum(row[sizes] for row in wanted)
        if wanted:
            assert figures["ratio"] == figures["logical_bytes"] / figures["stored_bytes"]
            assert figures["oldest_age_seconds"] <= max(row["age_seconds"] for row in wanted)

    assert [each["session"] for each in report["sessions"]] == list(SESSIONS)
    for tier in ("valkey", "overflow"):
        check(report[tier], tier)
        for session in report["sessions"]:
            check(session[tier], tier, session=session["session"])
            for node in session["nodes"]:
                check(node[tier], tier, session=session["session"], node=node["node"])
                assert node["has_fresh_lease"]
                assert 0 <= node["lease_age_seconds"] < 60
    assert report["overflow"]["objects"] == 2
    assert report["budget"] == {
        "max_bytes": 1_000_000,
        "used_bytes": report["valkey"]["stored_bytes"],
        "used_percent": report["valkey"]["stored_bytes"] / 10_000,
    }
    assert report["grants"] == {"writers": 0, "granted_bytes": 0, "written_bytes": 0}
    assert report["root"] == ROOT


def test_stats_shows_the_servers_memory(server: Server) -> None:
    server.client.config_set("maxmemory", 512 * MIB)
    server.client.config_set("maxmemory-policy", "volatile-lru")
    found = printed("stats", "--url", server.url)["server"]
    assert found["maxmemory_bytes"] == 512 * MIB
    assert found["maxmemory_policy"] == "volatile-lru"
    assert found["used_percent"] == 100 * found["used_bytes"] / (512 * MIB)
    text = tool("stats", "--url", server.url).stdout
    assert re.search(r"memory +[0-9.]+ MiB of 512 MiB used \([0-9]+ %\)\n", text)
    assert re.search(r"policy +volatile-lru: evicts keys with a TTL, never spilled objects\n", text)
    assert re.search(r"topology +single primary, 0 replicas in step\n", text)
    assert "Nothing is stored, and no node has a lease." in text
    server.client.config_set("maxmemory", 0)
    assert printed("stats", "--url", server.url)["server"]["maxmemory_bytes"] is None
    assert "used, without a maxmemory\n" in tool("stats", "--url", server.url).stdout
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    text = tool("stats", "--url", server.url).stdout
    assert re.search(r"policy +allkeys-lru: may evict spilled objects\n", text)


@pytest.mark.parametrize(
    ("mode", "replicas", "service", "shape"),
    [
        ("standalone", [0], None, "single primary, 0 replicas in step"),
        ("standalone", [1], None, "single primary, 1 replica in step"),
        ("standalone", [2], "mine", "primary of 'mine', found by Sentinels, 2 replicas in step"),
        ("cluster", [1, 1, 2], None, "cluster of 3 shards, 4 replicas in step"),
    ],
)
def test_stats_has_the_shape_of_what_serves(
    mode: str, replicas: list[int], service: str | None, shape: str
) -> None:
    memory = MemoryInfo(0, "noeviction", 1, 1, 0)
    infos = [ServerInfo("Valkey", "9", mode, "master", count, False, memory) for count in replicas]
    servers = Servers("valkey://h", infos, service)
    lines = rendering.statistics(Statistics(0.0, servers, ROOT, [], None, 0, []))
    assert f"topology      {shape}" in list(lines)
    assert servers.as_dict()["is_cluster"] == (mode == "cluster")
    assert servers.as_dict()["shards"] == len(replicas)


# --- stats of all namespaces ---


def namespaces(server: Server) -> list[str]:
    return [name.decode() for name in server.client.zrange(KEYS.namespaces, 0, -1)]


def test_stats_finds_all_namespaces_from_one_key(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1, 95)
    other = Keyspace("ray:spill:other-team:")
    elsewhere = Keyspace("ray:elsewhere:x:")
    for keys in (other, elsewhere):
        prefix, name = keys.root[:-1].rsplit(":", 1)
        params = {"namespace": name, "key_prefix": f"{prefix}:"}
        with stock.store(SESSIONS[1], NODES[1], **params) as store:
            store.renew_lease("", lambda: False)
            store.put([source(2)])
    assert namespaces(stock.server) == ["default", "other-team"]
    stock.server.client.config_resetstat()
    found = printed("stats", *stock.options, "--all-namespaces", "--max-bytes", "1GB")
    assert not {"scan", "keys", "dbsize"} & calls(stock.server).keys()
    assert found["key_prefix"] == "ray:spill:"
    objects = {each["namespace"]: each["statistics"] for each in found["namespaces"]}
    assert {name: each["valkey"]["objects"] for name, each in objects.items()} == {
        "default": 2,
        "other-team": 1,
    }
    # What was given is the budget of the one that was given.
    assert objects["default"]["budget"]["max_bytes"] == 10**9
    assert objects["other-team"]["budget"]["max_bytes"] is None
    text = tool("stats", *stock.options, "--all-namespaces").stdout
    assert_fits(text)
    assert re.search(r"\ndefault +Valkey +2 .* 1\nother-team +Valkey +1 .* 1\n", text)
    for keys in (other, elsewhere):
        prefix, name = keys.root[:-1].rsplit(":", 1)
        params = {"namespace": name, "key_prefix": f"{prefix}:"}
        with stock.store(SESSIONS[1], NODES[1], **params) as store:
            store.destroy(lambda pid: False)
        assert stock.server.keys(f"{prefix}:{name}*") == []
    assert namespaces(stock.server) == ["default"]
    stock.destroy()
    assert namespaces(stock.server) == []


@pytest.mark.usefixtures("quick")
def test_a_namespace_is_listed_while_it_has_anything(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1)
    stock.put(SESSIONS[0], NODES[1], 2)
    with stock.store(SESSIONS[0], NODES[1]) as store:
        store.destroy(lambda pid: False)
    assert namespaces(stock.server) == ["default"]
    assert printed("gc", *stock.options)["removed"]
    assert namespaces(stock.server) == []


class Interrupted:
    """A link over which somebody else acts just before a namespace is taken off the list."""

    def __init__(self, link: Link, act: Callable[[], None]) -> None:
        self._link = link
        self._act = act

    def execute(self, *requests: Request) -> list[Any]:
        return self._link.execute(*requests)

    def run(self, requests: list[Request]) -> Iterator[Request]:
        if any(b"ZREM" in bytes(part) for request in requests for part in request.parts):
            self._act()
        return self._link.run(requests)


def test_a_namespace_that_somebody_joins_as_its_last_node_leaves_stays_on_the_list(
    stock: Stock,
) -> None:
    leaving, joining = NodeName(SESSIONS[0], NODES[0]), NodeName(SESSIONS[1], NODES[1])
    with stock.ledger() as (other, link):
        other.renew(leaving, "", new=True)
        acts = []

        def join() -> None:
            acts.append(other.renew(joining, "", new=True))

        ledger = Ledger(Interrupted(link, join), KEYS)  # type: ignore[arg-type]
        ledger.close_account(leaving)
        ledger.unlist_if_empty()
        assert acts == [True]
        assert namespaces(stock.server) == ["default"]
        other.close_account(joining)
        other.unlist_if_empty()
        assert namespaces(stock.server) == []


def test_stats_shows_that_a_namespace_may_not_be_read(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1)
    client = stock.server.client
    client.zadd(KEYS.namespaces, {"of-others": 0, "not:one": 0})
    command, _ = acl_lines()
    client.execute_command(*shlex.split(command))
    options = (*stock.options, "--username", "ray", "--all-namespaces")
    env = {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD}
    try:
        found = printed("stats", *options, **env)["namespaces"]
        assert [each["namespace"] for each in found] == ["default", "of-others"]
        assert found[0]["statistics"]["valkey"]["objects"] == 1
        assert found[1]["statistics"] is None
        assert "\nof-others: this user may not read it\n" in tool("stats", *options, **env).stdout
    finally:
        client.acl_deluser("ray")
        client.zrem(KEYS.namespaces, "of-others", "not:one")


def test_stats_shows_all_namespaces_beside_one_that_cannot_be_read(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1)
    client, other = stock.server.client, Keyspace("ray:spill:broken:")
    client.zadd(KEYS.namespaces, {"broken": 0})
    client.set(other.index, "x")
    try:
        broken, own = printed("stats", *stock.options, "--all-namespaces")["namespaces"]
        assert own["statistics"]["valkey"]["objects"] == 1 and own["failure"] is None
        assert broken["statistics"] is None
        assert "WRONGTYPE" in broken["failure"]
        assert "\nbroken: WRONGTYPE" in tool("stats", *stock.options, "--all-namespaces").stdout
    finally:
        client.delete(other.index)
        client.zrem(KEYS.namespaces, "broken")


def test_who_may_not_list_a_namespace_spills_all_the_same(stock: Stock) -> None:
    client = stock.server.client
    rules = preflight.acl_rules(Config.load({}, {})).replace(f" ~{KEYS.namespaces}", "")
    client.execute_command("ACL", "SETUSER", "older", "reset", "on", "nopass", *rules.split())
    try:
        stock.put(SESSIONS[0], NODES[0], 1, username="older")
        assert namespaces(stock.server) == []
        options = (*stock.options, "--username", "older")
        assert len(printed("ls", *options)) == 1
        with stock.store(SESSIONS[0], NODES[0], username="older") as store:
            store.destroy(lambda pid: False)
        assert stock.server.our_keys() == []
    finally:
        client.acl_deluser("older")


def test_stats_shows_grants_half_written_objects_and_leases_that_ran_out(full: Stock) -> None:
    owner = NodeName(SESSIONS[0], NODES[0])
    name = ObjectName(*owner, object_id(7), "0" * 27, 3)
    file = full.overflow / ROOT.rstrip(":") / owner.session / owner.node
    file.mkdir(parents=True)
    (file / f"{object_id(8)}.{'0' * 27}.3.30000.part").write_bytes(b"x")
    with full.ledger() as (ledger, link):
        link.execute(*ledger.registrations([name]))
        before = ledger.time()
        link.execute(ledger.reservation(owner, "1-ab", Grant(5000, 3000), 0, 0, None, None))
        full.server.client.zadd(KEYS.leases, {f"{owner}:": before - 100_000})
        found = printed("stats", *full.options)
        text = tool("stats", *full.options, "--max-bytes", "100000").stdout
        ledger.release(owner, ["1-ab"])
    assert {row["url"] for row in printed("ls", *full.options)} == set(full.urls)
    for number, tier in ((7, "valkey"), (8, "overflow")):
        report = damaged(full, object_id(number))
        assert (report["tier"], report["state"]) == (tier, "half-written")
        assert report["problems"] == ["it is being written, or its writer was killed meanwhile"]
    node = found["sessions"][0]["nodes"][0]
    assert (node["valkey"]["half_written"], node["overflow"]["half_written"]) == (1, 1)
    assert not node["has_fresh_lease"]
    assert 100 <= node["lease_age_seconds"] < 200
    assert found["grants"] == {"writers": 1, "granted_bytes": 5000, "written_bytes": 3000}
    assert found["budget"]["used_bytes"] == found["valkey"]["stored_bytes"] + 5000
    assert "4.88 KiB to 1 writer, of which 2.93 KiB are written" in text
    assert re.search("half-written +2\n", text)
    assert re.search(r"abababababab +Valkey .* silent 1[0-9][0-9]s\n", text)


def test_stats_says_which_nodes_are_dead_and_what_they_have(full: Stock) -> None:
    """By the word of the GCS whose address a lease has; it is asked once in a while."""
    dead, living = NodeName(SESSIONS[0], NODES[0]), NodeName(SESSIONS[0], NODES[1])
    asked = []

    def ask(address: str) -> RunningSession:
        asked.append(address)
        return RunningSession(SESSIONS[0], frozenset({NODES[1]}))

    with full.ledger() as (ledger, _), contextlib.closing(Inventory(full.config(), ask)) as found:
        full.server.client.delete(KEYS.leases)
        for name in (dead, living):
            full.server.client.zadd(KEYS.leases, {f"{name}:10.0.0.1:6379": ledger.time() - 100_000})
        statistics = [found.statistics() for _ in range(2)][-1]
    assert asked == ["10.0.0.1:6379"]
    states = {node.node_name: node.state for node in statistics.nodes}
    assert (states.pop(dead), {*states.values()}) == ("dead", {"silent"})
    (node,) = statistics.dead_nodes
    assert statistics.as_dict()["dead_nodes"] == {"nodes": 1, "stored_bytes": node.stored}
    text = "\n".join(map(click.unstyle, rendering.statistics(statistics)))
    assert re.search(r"\ndead nodes +1 node, [0-9.]+ KiB stored \([0-9]+ %\)\n", text)
    assert re.search(r"abababababab +Valkey .* dead 1[0-9][0-9]s\n", text)
    assert_fits(text)


def test_stats_shows_a_policy_that_it_does_not_know(server: Server) -> None:
    with proxy_to(server.port) as proxy:
        proxy.to_client.replaced[b"noeviction"] = b"some-other"
        text = tool("stats", "--url", proxy.url).stdout
    assert re.search(r"policy +some-other: not known to this version\n", text)


def test_stats_asks_the_gcs_of_all_sessions_at_once(full: Stock) -> None:
    """Where a host does not answer, each question takes seconds."""
    together = threading.Barrier(len(SESSIONS))

    def ask(address: str) -> RunningSession | None:
        together.wait(PATIENCE)
        return None

    with full.ledger() as (ledger, _), contextlib.closing(Inventory(full.config(), ask)) as found:
        full.server.client.delete(KEYS.leases)
        for number, session in enumerate(SESSIONS):
            lease = f"{NodeName(session, NODES[0])}:10.0.0.{number}:6379"
            full.server.client.zadd(KEYS.leases, {lease: ledger.time() - 100_000})
        assert {node.state for node in found.statistics().nodes} == {"silent"}
    assert len(SESSIONS) > 1 and not together.broken


def test_stats_is_readable_at_eighty_columns(full: Stock) -> None:
    text = tool("stats", *full.options, "--max-bytes", "1000000").stdout
    assert_fits(text)
    lines = text.splitlines()
    assert lines[0].startswith("server        Valkey 9")
    assert f"keys          {ROOT}*" in lines
    assert re.search(r"budget +[0-9.]+ KiB of 977 KiB used \([0-9]+ %\)", text)
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == [
        *("node", "tier", "objects", "data", "stored", "ratio", "oldest", "lease")
    ]
    assert table[1] == SESSIONS[0]
    assert any(re.match("  2 nodes +Valkey +3 ", line) for line in table)
    assert any(re.match("2 sessions +Valkey +4 ", line) for line in table)
    assert re.match(" +overflow +2 ", table[-1])


def test_a_second_look_reads_only_what_has_changed(full: Stock) -> None:
    server = full.server
    with contextlib.closing(Inventory(full.config())) as inventory:
        costs = []
        found = []
        for step in range(4):
            if step == 2:
                full.put(SESSIONS[0], NODES[0], 9)
            server.client.config_resetstat()
            found.append(inventory.statistics())
            costs.append(calls(server)["zrangebylex"])
    again = [[node.valkey for node in each.nodes] for each in found]
    assert again[0] == again[1]
    assert again[2][0].objects == again[0][0].objects + 1
    assert again[2][1:] == again[0][1:]
    whole, unchanged, one_changed, unchanged_again = costs
    pages_of_an_owner = 2  # the second is empty
    assert whole == unchanged + 3 * pages_of_an_owner
    assert one_changed == unchanged + pages_of_an_owner
    assert unchanged_again == unchanged


@contextlib.contextmanager
def watching(server: Server, **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`stats --watch` in a process of its own, as from a shell."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_valkey_spill", "stats", "--url", server.url, "--watch", "0.1"],
        stdin=subprocess.DEVNULL,
        **popen,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(fd: int, is_enough: Callable[[bytes], bool]) -> bytes:
    text = b""

    def enough() -> bool:
        nonlocal text
        if select.select([fd], [], [], 0)[0]:
            text += os.read(fd, 1 << 16)
        return is_enough(text)

    wait_until(enough)
    return text


def test_stats_watched_without_a_terminal_prints_again_until_interrupted(server: Server) -> None:
    with watching(server, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = read_until(process.stdout.fileno(), lambda text: text.count(b"budget ") >= 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
        process.stdout.close()
    assert b"\x1b" not in text


@pytest.mark.parametrize("no_color", ["", "1"])
def test_stats_watched_on_a_terminal_is_redrawn_in_place(stock: Stock, no_color: str) -> None:
    stock.put(SESSIONS[0], NODES[0], 1)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    try:
        with watching(
            stock.server, stdout=end, env={**environment, "NO_COLOR": no_color}
        ) as process:
            text = read_until(terminal, lambda text: text.count(b"\x1b[H") >= 4)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE) == 130
    finally:
        os.close(terminal)
        os.close(end)
    _, *frames, _ = text.split(b"\x1b[H")
    for frame in frames[1:]:
        # No line more than the terminal has, or it would scroll; and each replaces what was there.
        assert frame.count(b"\n") == 9
        assert frame.count(b"\x1b[K") == 9
        assert frame.endswith(b"\x1b[J")
        assert b"stored" in frame
        assert (b"\x1b[1m" in frame) == (not no_color)


def test_stats_watched_as_json_is_a_line_for_each_look(server: Server) -> None:
    args = ("stats", "--url", server.url, "--watch", "0.1", "--json")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_valkey_spill", *args], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        text = read_until(process.stdout.fileno(), lambda text: text.count(b"\n") >= 2)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [json.loads(line)["root"] for line in text.splitlines()[:2]] == [ROOT, ROOT]


# --- inspect ---


def test_inspect_finds_an_object_by_any_of_its_names(full: Stock) -> None:
    (row,) = (row for row in printed("ls", *full.options) if row["object"] == object_id(95))
    key = row["key"]
    found = [
        printed("inspect", *full.options, name)
        for name in (key, f"{key}:9", row["name"], row["url"], row["object"], row["object"].upper())
    ]
    for each in found:
        del each[0]["age_seconds"]
    assert all(each == found[0] for each in found)
    (report,) = found[0]
    assert report["is_whole"]
    assert report["problems"] == []
    assert (report["key"], report["url"]) == (key, row["url"])
    assert report["state"] == "stored"
    assert report["writer"] == os.getpid()
    assert report["counted_bytes"] == row["stored_bytes"]
    header = report["header"]
    assert header["version"] == 1
    assert header["ray_metadata"] == "PYTHON"
    assert bytes.fromhex(header["owner_address"]) == b"\x00owner"
    assert (header["logical_bytes"], header["chunk_bytes"]) == (95_000, CHUNK)
    assert header["codecs"] == {"lz4": 10}
    assert [chunk["number"] for chunk in header["chunks"]] == list(range(10))
    for number, chunk in enumerate(header["chunks"]):
        size = full.server.client.strlen(f"{key}:{number}")
        assert chunk["stored_bytes"] == chunk["found_bytes"] == size
    assert header["stored_bytes"] == sum(chunk["stored_bytes"] for chunk in header["chunks"])
    assert header["ratio"] == 95_000 / header["stored_bytes"]


def test_inspect_finds_what_is_in_the_overflow(full: Stock) -> None:
    (row,) = (row for row in printed("ls", *full.options) if row["object"] == object_id(96))
    for name in (row["url"], row["url"].partition("?")[0], row["name"], row["object"]):
        (report,) = printed("inspect", *full.options, name)
        assert report["is_whole"]
        assert (report["tier"], report["path"]) == ("overflow", row["path"])
        assert report["header"]["logical_bytes"] == 96_000
        assert report["header"]["chunks"][0]["found_bytes"] is None
    text = tool("inspect", *full.options, row["url"]).stdout
    assert_fits(text)
    assert f"file          {row['path']}\n" in text
    assert "on the server" not in text
    with pytest.raises(OverflowUnavailableError, match="Give --overflow-uri"):
        tool("inspect", "--url", full.server.url, row["url"])
    with pytest.raises(SpillError, match="If there is an overflow, give --overflow-uri"):
        tool("inspect", "--url", full.server.url, row["name"])
    os.truncate(row["path"], 100)
    assert damaged(full, row["url"])["problems"] == ["its header is cut off (0 bytes)"]


def test_what_is_in_an_overflow_that_is_not_there_is_not_taken_for_nothing(
    full: Stock, tmp_path: Path
) -> None:
    server = ("--url", full.server.url)
    for command in ("ls", "stats"):
        assert tool(command, *full.options).stderr == ""
        for option, fix in (
            ((), "give its --overflow-uri"),
            (("--overflow-uri", str(tmp_path / "typo")), "it is not there now"),
        ):
            told = " ".join(tool(command, *server, *option).stderr.split())
            sessions = f"{SESSIONS[0]} and 1 other session"
            assert told == f"Not counted: what {sessions} may have in an overflow: {fix}."
    assert tool("ls", *server, "--tier", "valkey").stderr == ""
    with pytest.raises(SpillError, match="no overflow is given"):
        tool("ls", *server, "--tier", "overflow")


def test_inspect_of_what_is_in_valkey_needs_no_overflow(full: Stock, tmp_path: Path) -> None:
    (tmp_path / ROOT.rstrip(":")).touch()  # which can be no directory then
    options = ("--url", full.server.url, "--overflow-uri", str(tmp_path))
    assert printed("inspect", *options, full.urls[0])
    with pytest.raises(OverflowUnavailableError):
        tool("inspect", *options, object_id(1))


def test_inspect_shows_every_attempt_of_an_object(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 5)
    stock.put(SESSIONS[0], NODES[0], 5)
    stock.put(SESSIONS[1], NODES[1], 5)
    stock.put(SESSIONS[1], NODES[1], 5, max_bytes=1)
    stock.put(SESSIONS[1], NODES[1], 6)
    found = printed("inspect", *stock.options, object_id(5))
    assert {each["url"] for each in found} == set(stock.urls[:4])
    text = tool("inspect", *stock.options, object_id(5)).stdout
    assert text.count(f"object        {object_id(5)}\n") == 4


def test_inspect_does_not_look_for_millions_of_chunks_that_a_forged_name_claims(
    stock: Stock,
) -> None:
    stock.put(SESSIONS[0], NODES[0], 1)
    (member,) = stock.server.client.zrange(INDEX, 0, -1)
    name = Entry.parse(member.decode()).name._replace(object_id="f" * 56, chunks=1 << 26)
    forged = str(Entry(name, 1, 1))
    stock.server.client.zadd(INDEX, {forged: 0})
    try:
        with pytest.raises(SpillError, match="its header is gone from the server"):
            tool("inspect", *stock.options, name.object_id)
    finally:
        stock.server.client.zrem(INDEX, forged)


def test_inspect_is_readable_at_eighty_columns(full: Stock) -> None:
    (url,) = (url for url in full.urls if object_id(95) in url)
    key = url.partition("?")[0]
    text = tool("inspect", *full.options, url).stdout
    assert_fits(text)
    assert f"key           {key}\n" in text
    assert f"url           {url}\n" in text
    assert "format        version 1\n" in text
    assert "owner address 006f776e6572\n" in text
    assert "chunks        10 of 9.77 KiB each: 10 lz4\n" in text
    table = text[text.index("chunk ") :].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["0", "1", "2", "3", "4", "…", "7", "8", "9"]
    assert table[0].split()[1] == "10,000"
    assert all(line.endswith("  there") for line in table if line != "…")
    asked = tool("inspect", *full.options, f"{key}:5").stdout
    assert re.search(r"\n +5  10,000 ", asked)


def damaged(stock: Stock, name: str) -> dict[str, Any]:
    """The report of `inspect` on an object that is not whole, after its text said so too."""
    runner = cli_runner(env={"COLUMNS": "80"})
    result = runner.invoke(commands.cli, ["inspect", *stock.options, name, "--json"])
    assert isinstance(result.exception, SpillError)
    (report,) = json.loads(result.stdout)
    assert not report["is_whole"]
    assert report["problems"][0] in str(result.exception)
    shown = runner.invoke(commands.cli, ["inspect", *stock.options, name])
    assert_fits(shown.stdout)
    assert f"problem       {report['problems'][0][:40]}" in shown.stdout
    return report


def test_inspect_shows_what_is_missing_or_wrong(stock: Stock) -> None:
    client = stock.server.client
    (url,) = stock.put(SESSIONS[0], NODES[0], 95)
    key = url.partition("?")[0]
    chunk = client.get(f"{key}:3")
    client.delete(f"{key}:3")
    client.append(f"{key}:4", b"x")
    client.delete(f"{key}:5")
    client.lpush(f"{key}:5", "another type")
    report = damaged(stock, url)
    size = len(client.get(f"{key}:4"))
    assert report["problems"] == [
        "chunk 3 of 10 is gone from the server",
        f"chunk 4 has {size} bytes, not {size - 1}",
        "chunk 5 of 10 is gone from the server",
    ]
    found = [each["found_bytes"] for each in report["header"]["chunks"]]
    assert (found[2] > 0, found[3:6]) == (True, [0, size, 0])
    client.set(f"{key}:3", chunk)

    assert "bytes, not 7" in damaged(stock, url.replace("size=95000", "size=7"))["problems"][0]
    client.setrange(key, 10, b"\xff")
    assert damaged(stock, url)["problems"] == ["its header is damaged (wrong checksum)"]
    client.delete(key)
    report = damaged(stock, url)
    assert report["problems"] == ["its header is gone from the server"]
    assert (report["header"], report["state"]) == (None, "stored")


def test_inspect_checks_what_lies_beside_its_header(stock: Stock) -> None:
    (url,) = stock.put(SESSIONS[0], NODES[0], 2)
    (report,) = printed("inspect", *stock.options, url)
    assert report["header"]["inline"]
    assert report["header"]["chunks"][0]["found_bytes"] is None
    text = tool("inspect", *stock.options, url).stdout
    assert "chunks        1 beside the header, in its key: 1 lz4\n" in text
    key = url.partition("?")[0]
    client = stock.server.client
    client.setrange(key, client.strlen(key) - 30, b"\xff\xff\xff")
    assert damaged(stock, url)["problems"] == ["its data are damaged (wrong checksum)"]


def test_inspect_knows_what_is_half_written_and_what_is_not_in_the_ledger(stock: Stock) -> None:
    (url,) = stock.put(SESSIONS[0], NODES[0], 95)
    key = url.partition("?")[0]
    (row,) = printed("ls", *stock.options)
    owner = NodeName(SESSIONS[0], NODES[0])
    with stock.ledger() as (ledger, link):
        name = ObjectName.parse(row["name"])
        link.execute(*ledger.forget([name]))
        (report,) = printed("inspect", *stock.options, key)
        assert (report["state"], report["is_whole"]) == ("not in the ledger", True)
        link.execute(*ledger.registrations([name]))
        report = damaged(stock, key)
        assert report["state"] == "half-written"
        assert report["header"]["logical_bytes"] == 95_000
        assert damaged(stock, object_id(95))["name"] == row["name"]
        link.execute(*ledger.settlements(owner, [Entry(name, 95_000, 5)]))


def test_all_that_is_wrong_is_reported_at_once() -> None:
    name = ObjectName("s", "n", "ab", "0" * 27, 3)
    header = Header("cd", b"", b"", 20, 10, [Chunk(10, Codec.RAW, 0), Chunk(10, Codec.RAW, 0)])
    found = [*problems(name, "ab", header, memoryview(b""), Stat(b"", [10, 9]), [20, 21])]
    assert found == [
        "its header is that of object cd",
        "its header gives 20 bytes, not 21",
        "its header gives 2 chunks, not 3",
        "chunk 1 has 9 bytes, not 10",
    ]
    found = [*problems(name, "ab", header, memoryview(b""), Stat(b"", [], payload=19), [])]
    assert found[-1] == "its file has 19 bytes of chunks, not 20"


NAME = f"s:n:ab.{'0' * 27}.3"


@pytest.mark.parametrize(
    "text",
    [
        *(key.decode() for key in FOREIGN),
        f"ray:spill:other:{NAME}",
        f"ray:spill:other:{NAME}?offset=0&size=1",
        f"overflow:ray:spill:other:{NAME}?offset=0&size=1",
        INDEX,
        f"{ROOT}{NAME}:3",
        f"{ROOT}{NAME}:-1",
        f"{ROOT}{NAME}:x",
        f"{ROOT}{NAME}?offset=1&size=1",
        "",
        "*",
    ],
)
def test_what_names_no_object_of_the_namespace_is_refused_and_not_looked_up(
    server: Server, text: str
) -> None:
    with pytest.raises(ConfigError, match=f"Give a key below {ROOT} "):
        parse_target(text, KEYS)
    server.client.config_resetstat()
    with pytest.raises(ConfigError):
        tool("inspect", "--url", server.url, "--", text)
    assert calls(server) == {}


def test_inspect_of_what_is_not_there_says_so(server: Server) -> None:
    with pytest.raises(SpillError, match=f"nothing of object abcd is stored below {ROOT}"):
        tool("inspect", "--url", server.url, "abcd")
    # However many chunks a name tells of.
    server.client.config_resetstat()
    with pytest.raises(SpillError, match="nothing of s:n:ab"):
        tool("inspect", "--url", server.url, f"s:n:ab.{'0' * 27}.60000000")
    assert calls(server)["strlen"] == 1


# --- gc ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases run out at once, and one look shows that."""
    for name, seconds in {"LEASE": 0.0, "CONFIRMATION": 0.0, "BETWEEN_LOOKS": 0.01}.items():
        monkeypatch.setattr(cleanup, name, seconds)


@pytest.mark.usefixtures("quick")
def test_gc_lists_first_and_then_removes_what_the_dead_have_left(full: Stock) -> None:
    stored = full.server.spilled_keys()
    rows = printed("ls", *full.options)
    listed = printed("gc", *full.options, "--dry-run")
    assert listed["dry_run"]
    assert [(each["session"], each["node"]) for each in listed["remains"]] == [
        (SESSIONS[0], NODES[0]),
        (SESSIONS[0], NODES[1]),
        (SESSIONS[1], NODES[0]),
    ]
    assert all(each["session_is_dead"] for each in listed["remains"])
    assert sum(each["objects"] for each in listed["remains"]) == 4
    assert listed["remains"][1]["files"] == 2
    in_files = sum(row["stored_bytes"] for row in rows if row["tier"] == "overflow")
    assert listed["remains"][1]["file_bytes"] == in_files
    assert (listed["removed"], listed["notes"]) == (False, [])

    result = tool("gc", *full.options, "--dry-run")
    text = result.stdout
    assert_fits(text)
    assert f"{SESSIONS[0]} is dead\n" in text
    assert re.search(r"\n  cdcdcdcdcdcd +1 .* 2 ", text)
    assert "half-written" not in text
    told = r"Would remove 4 objects \(.* KiB\) and 2 files \(.*\) of 3 dead nodes\.$"
    assert re.search(told, " ".join(text.split()))
    assert result.stderr == "Watching the leases of 3 nodes: up to 0 s\n"
    assert full.server.spilled_keys() == stored
    assert printed("ls", *full.options) != []

    text = tool("gc", *full.options).stdout
    assert re.search(r" Removed 4 objects .* of 3 dead nodes\.$", " ".join(text.split()))
    assert full.server.our_keys() == []
    assert not list(full.overflow.rglob("*.*"))
    assert tool("gc", *full.options).stdout == "Nothing to remove.\n"
    assert printed("gc", *full.options) == NOTHING


NOTHING = {
    "dry_run": False,
    "removed": False,
    "remains": [],
    "reclaimed": {"objects": 0, "stored_bytes": 0},
    "notes": [],
}


@pytest.mark.usefixtures("quick")
def test_gc_leaves_other_sessions_alone_if_one_is_named(full: Stock) -> None:
    result = tool("gc", *full.options, "--session", SESSIONS[0][:18])
    assert f"{SESSIONS[0]} is dead\n" in result.stdout
    assert SESSIONS[1] not in result.stdout
    assert result.stderr == "Watching the leases of 2 nodes: up to 0 s\n"
    (row,) = printed("ls", *full.options)
    assert row["session"] == SESSIONS[1]
    assert [each["session"] for each in printed("stats", *full.options)["sessions"]] == [
        SESSIONS[1]
    ]
    assert tool("gc", *full.options, "--session", "other").stdout == "Nothing to remove.\n"


@pytest.mark.usefixtures("quick")
def test_gc_says_that_nodes_had_nothing_stored(stock: Stock) -> None:
    with stock.store(SESSIONS[0], NODES[0]) as store:
        store.renew_lease("", lambda: False)
    text = tool("gc", *stock.options).stdout
    assert text == "Removed the metadata of 1 dead node, which had nothing stored.\n"


# `gc` with leases that run out at once, as `quick` has them.
QUICK_GC = """
import sys
from ray_valkey_spill.store import cleanup
cleanup.LEASE = cleanup.CONFIRMATION = 0.0
cleanup.BETWEEN_LOOKS = 0.01
from ray_valkey_spill.cli import main
sys.argv[1:1] = ["gc"]
main()
"""


def gc_on_a_terminal(script: str, args: Sequence[str], answer: str | None) -> tuple[str, int, str]:
    """Run a script of `gc`, and answer what it asks; None answers nothing.

    Returns what the terminal had up to the question, the exit code, and stdout.
    """
    asked = ""
    terminal, end = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *args], stdin=end, stdout=subprocess.PIPE, stderr=end
        )
        try:
            if answer is not None:
                asked = read_until(terminal, lambda text: b"[y/N]" in text).decode()
                os.write(terminal, f"{answer}\n".encode())
            text = process.communicate(timeout=PATIENCE)[0].decode()
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(terminal)
        os.close(end)
    return asked, process.returncode, text


@pytest.mark.parametrize(
    ("answer", "args", "code", "says", "left"),
    [
        ("n", (), 1, "Removed nothing. Left: 2 objects", 2),
        ("", (), 1, "Removed nothing. Left: 2 objects", 2),
        ("y", (), 0, "Removed 2 objects", 0),
        (None, ("--yes",), 0, "Removed 2 objects", 0),
        (None, ("--dry-run",), 0, "Would remove 2 objects", 2),
    ],
)
def test_gc_asks_on_a_terminal_before_it_removes(
    stock: Stock, answer: str | None, args: tuple[str, ...], code: int, says: str, left: int
) -> None:
    stock.put(SESSIONS[0], NODES[0], 1, 95)
    asked, printed_code, printed_text = gc_on_a_terminal(QUICK_GC, [*stock.options, *args], answer)
    if answer is not None:
        assert re.search(r"Remove 2 objects \(.*\) of 1 dead node\? \[y/N\]", asked)
        # The countdown is gone from the line by then.
        assert "\rWatching the leases of 1 node: up to 0 s" in asked
        assert "\r\x1b[KRemove" in asked
    assert printed_code == code
    assert says in printed_text
    assert len(printed("ls", *stock.options)) == left


def test_gc_removes_nothing_where_nobody_would_see_its_question(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1, 95)
    terminal, end = pty.openpty()
    try:
        command = [sys.executable, "-c", QUICK_GC, *stock.options]
        result = subprocess.run(
            command, stdin=end, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    finally:
        os.close(terminal)
        os.close(end)
    assert result.returncode == 1
    assert "Give --yes or --dry-run" in " ".join(result.stderr.split())
    assert len(printed("ls", *stock.options)) == 2


def test_gc_without_a_standard_input_removes_without_asking(stock: Stock) -> None:
    stock.put(SESSIONS[0], NODES[0], 1, 95)
    script = f"import os, sys; os.close(0); sys.stdin = None\n{QUICK_GC}"
    command = [sys.executable, "-c", script, *stock.options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert printed("ls", *stock.options) == []


RUNNING = f"""
from ray_valkey_spill.cli import commands
from ray_valkey_spill.store.liveness import RunningSession
commands.running_at = lambda address: RunningSession({SESSIONS[0]!r}, frozenset({{{NODES[1]!r}}}))
"""


@pytest.mark.parametrize("yes", [False, True])
def test_gc_asks_on_a_terminal_before_it_asks_owners_for_what_may_go(
    stock: Stock, yes: bool
) -> None:
    """Of a running session; here its cluster cannot be joined."""
    stock.put(SESSIONS[0], NODES[0], 2, 95)
    with stock.ledger() as (ledger, _):
        ledger.renew(NodeName(SESSIONS[0], NODES[0]), "gcs:1", new=True)
    args = ["--address", "ray://127.0.0.1:10001", *(["--yes"] if yes else [])]
    answer = None if yes else "n"
    asked, code, shown = gc_on_a_terminal(RUNNING + QUICK_GC, [*stock.options, *args], answer)
    if not yes:
        what = r"what nobody needs of 2 objects \(.*\) of dead nodes"
        assert re.search(rf"Remove {what}\? \[y/N\]", asked)
    text = " ".join(shown.split())
    assert code == (0 if yes else 1)
    if yes:
        assert "Kept: 2 objects" in text and "Ray Client" in text and "port 6379" in text
        assert text.endswith("Nothing else to remove.")
    else:
        assert text.endswith("Removed nothing.")
    assert len(printed("ls", *stock.options)) == 2


@pytest.mark.usefixtures("quick")
def test_gc_removes_of_a_running_session_only_what_is_half_written_of_the_dead(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (url,) = stock.put(SESSIONS[0], NODES[0], 1)
    owner = NodeName(SESSIONS[0], NODES[0])
    running = RunningSession(SESSIONS[0], frozenset({NODES[1]}))
    monkeypatch.setattr(commands, "running_at", {"gcs:1": running}.get)
    with stock.ledger() as (ledger, link):
        link.execute(*ledger.registrations([ObjectName(*owner, object_id(7), "0" * 27, 3)]))
        ledger.renew(owner, "gcs:1", new=True)
        ledger.renew(NodeName(SESSIONS[0], NODES[1]), "gcs:1", new=True)
    text = tool("gc", *stock.options).stdout
    assert f"{SESSIONS[0]} runs, and has lost nodes\n" in text
    assert re.search(r"^node +half-written$", text, re.MULTILINE)
    assert re.search(r"\n  abababababab +1\n", text)
    kept = f"Kept: {SESSIONS[0]}:cdcdcdcdcdcd, which is alive according to its GCS"
    assert kept in " ".join(text.split())
    assert "Removed 1 half-written object of 1 dead node.\n" in text
    assert_fits(text)
    (row,) = printed("ls", *stock.options)
    assert row["url"] == url
    assert printed("stats", *stock.options)["valkey"]["half_written"] == 0
    assert tool("gc", *stock.options).stdout.endswith("\nNothing else to remove.\n")


@pytest.mark.usefixtures("quick")
def test_every_command_works_beside_what_is_malformed(stock: Stock) -> None:
    urls = stock.put(SESSIONS[0], NODES[0], 1)
    client = stock.server.client
    base = f"{SESSIONS[0]}:{NODES[0]}:{object_id(1)}"
    for key in (KEYS.index, KEYS.pending):
        client.zadd(key, dict.fromkeys(["", "x", b"\xff", base, f"{base}.x", f"{base}.\n"], 0))
    for key in (KEYS.usage, KEYS.writers, KEYS.overflows):
        client.hset(key, mapping={"": "", "x/": "1 2 3 4", b"\xff": b"\xff", base: "x"})
    client.zadd(KEYS.leases, {f"{SESSIONS[1]}:{NODES[0]}:": float("inf"), "x": 1})
    assert [row["url"] for row in printed("ls", *stock.options)] == urls
    (session,) = printed("stats", *stock.options)["sessions"]
    assert session["valkey"]["objects"] == 1
    (inspected,) = printed("inspect", *stock.options, object_id(1))
    assert inspected["is_whole"]
    (remains,) = printed("gc", *stock.options)["remains"]
    assert remains["session"] == SESSIONS[0]
    assert printed("ls", *stock.options) == []
    assert printed("gc", *stock.options) == NOTHING
    keys = (KEYS.index, KEYS.pending, KEYS.usage, KEYS.writers, KEYS.overflows, KEYS.leases)
    client.delete(*keys, KEYS.totals)


def test_gc_takes_every_parameter_that_a_spilling_config_may_have(server: Server) -> None:
    # As the head start passes them.
    values = {p.name: p.default for p in parameters() if p.default is not None}
    values |= {"url": server.url, "max_bytes": 10, "allow_eviction": True, "retry_timeout": 1.5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    result = tool("gc", *options)
    assert (result.exit_code, result.stdout) == (0, "Nothing to remove.\n")


# --- the ACL ---

PASSWORD = "correct-horse"


def acl_lines(*args: str) -> tuple[str, str]:
    """What is printed for valkey-cli, and for an aclfile, with the password in its place."""
    lines = tool("config", "--acl", *args).stdout.splitlines()
    (command,) = (line for line in lines if line.startswith("ACL SETUSER "))
    (line,) = (line for line in lines if line.startswith("user "))
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    return command.replace("PASSWORD", PASSWORD), line.replace("SHA256", digest)


def as_user(url: str, user: str) -> Config:
    params = {"url": url, "username": user, "retry_timeout": 5}
    return Config.load(params, {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD})


@pytest.mark.parametrize("user", ["ray", "spiller"])
@pytest.mark.parametrize("db", [0, 1])
def test_the_acl_for_valkey_cli_gives_a_user_all_it_needs_and_no_more(
    server: Server, user: str, db: int
) -> None:
    url = server.url.replace("/0", f"/{db}")
    # What it was allowed before does not stay.
    server.client.execute_command("ACL", "SETUSER", user, "on", "nopass", "~*", "&*", "+@all")
    options = () if user == "ray" else ("--username", user)
    command, _ = acl_lines("--url", url, *options)
    try:
        server.client.execute_command(*shlex.split(command))
        preflight.run_all(as_user(url, user))
        allowed = server.client.acl_getuser(user)
    finally:
        server.client.acl_deluser(user)
    assert allowed["keys"] == [f"~{ROOT}*", f"~{KEYS.namespaces}"]
    assert allowed["channels"] == []
    assert "nopass" not in allowed["flags"]
    assert ("+select" in allowed["commands"]) == (db == 1)


def test_the_acl_for_a_file_is_taken_by_a_server(tmp_path: Path) -> None:
    _, line = acl_lines()
    file = tmp_path / "users.acl"
    file.write_text(f"{line}\n")
    with valkey_server(aclfile=file) as server:
        preflight.run_all(as_user(server.url, "ray"))
        assert server.client.acl_getuser("ray")["keys"] == [f"~{ROOT}*", f"~{KEYS.namespaces}"]


def test_the_acl_is_of_the_namespace_that_is_given() -> None:
    command, _ = acl_lines("--namespace", "a", "--key-prefix", "ray:x:")
    assert "~ray:x:a:* ~ray:x:namespaces +" in command
    env = {"RAY_VALKEY_SPILL_NAMESPACE": "b"}
    document = printed("config", "--acl", **env)
    assert document["acl"]["rules"].startswith("~ray:spill:b:* ~ray:spill:namespaces +")
    assert document["acl"]["user"] == "ray"
    assert document["acl"]["command"].startswith("ACL SETUSER ray reset on >PASSWORD ~")
    assert document["acl"]["aclfile"].startswith("user ray reset on #SHA256 ~")
    assert "object_spilling_config" in document
    assert "acl" not in printed("config")
    text = tool("config", "--acl").stdout
    assert "replace PASSWORD by the password" in text
    assert "RAY_VALKEY_SPILL_PASSWORD" in text


@pytest.mark.usefixtures("quick")
def test_every_tool_works_with_no_more_than_the_acl(full: Stock) -> None:
    client = full.server.client
    command, _ = acl_lines()
    client.execute_command(*shlex.split(command))
    options = (*full.options, "--username", "ray")
    env = {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD}
    try:
        client.acl_log_reset()
        assert len(printed("ls", *options, **env)) == 6
        assert printed("stats", *options, **env)["valkey"]["objects"] == 4
        for url in full.urls:
            assert printed("inspect", *options, url, **env)
            assert printed("inspect", *options, object_id(95), **env)
        assert len(printed("gc", *options, **env)["remains"]) == 3
        assert full.server.our_keys() == []
        assert client.acl_log() == []
    finally:
        client.acl_deluser("ray")


# --- how it looks, and how it fails ---


def test_colour_is_for_terminals_and_not_for_those_who_want_none(full: Stock) -> None:
    for command in ("ls", "stats"):
        assert "\x1b[" in tool(command, *full.options, color=True).stdout
        assert "\x1b" not in tool(command, *full.options, color=True, NO_COLOR="1").stdout
        assert "\x1b" not in tool(command, *full.options).stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("inspect", "vllm:kv:x"), 2, "names no spilled object of this namespace"),
        (("inspect", "abcd"), 1, "nothing of object abcd is stored below ray:spill:default:"),
        (("stats", "--max-bytes", "many"), 2, "--max-bytes must be"),
        (("stats", "--max-bytes", "9" * 400), 2, "--max-bytes must be a size in bytes"),
        (("config", "--max-bytes", f"{'9' * 4299}EiB"), 2, "--max-bytes must be a size in bytes"),
        (("ls", "--limit", "0"), 2, "--limit must be a whole number above 0"),
        (("ls", "--limit", "9" * 5000), 2, "above 0, of at most 18 digits"),
        (("ls", "--timeout", "1e300"), 2, "of seconds above 0, and at most 30,000,000"),
        (("stats", "--watch", "1e9"), 2, "of seconds above 0, and at most 30,000,000"),
        (("ls", "--older-than", "soon"), 2, "--older-than must be a duration such as 90s"),
        (("ls", "--timeout", "never"), 2, "--timeout must be a number of seconds above 0"),
        (("ls", "--url", "valkey://127.0.0.1:1", "--timeout", "0.1"), 1, "cannot be reached"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    server: Server, args: tuple[str, ...], code: int, says: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ray_valkey_spill", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_VALKEY_SPILL_URL": server.url},
        check=False,
    )
    assert (result.returncode, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert says in line


# --- beside a million foreign keys ---

FOREIGN_KEYS = 1_000_000


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_tools_work_does_not_grow_with_a_million_foreign_keys(tmp_path: Path) -> None:
    with valkey_server(enable_debug_command="yes", save="") as server:
        stock = Stock(server, tmp_path)

        def use_the_tools() -> dict[str, int]:
            stock.put(SESSIONS[0], NODES[0], 1, 95)
            (url, *_) = stock.put(SESSIONS[1], NODES[1], 50)
            server.client.config_resetstat()
            assert len(printed("ls", *stock.options)) == 3
            assert printed("stats", *stock.options)["valkey"]["objects"] == 3
            assert printed("inspect", *stock.options, url)
            assert printed("inspect", *stock.options, object_id(95))
            assert len(printed("gc", *stock.options, "--dry-run")["remains"]) == 2
            assert len(printed("gc", *stock.options)["remains"]) == 2
            return calls(server)

        alone = use_the_tools()
        server.client.execute_command("DEBUG", "POPULATE", FOREIGN_KEYS, "vllm:kv:layer0", 16)
        assert server.client.dbsize() == FOREIGN_KEYS
        beside_them = use_the_tools()
        assert server.client.dbsize() == FOREIGN_KEYS
    assert beside_them == alone
    searching = {"scan", "keys", "randomkey", "dbsize", "sort"}
    assert not searching & beside_them.keys()
