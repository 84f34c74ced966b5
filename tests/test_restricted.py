"""Servers, services and proxies that do not run every command.

Objects are put, restored and deleted without those that are not needed. A missing one that is
needed is named by the head start and by `check`, before the first spill.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli import cli_runner
from support.proxy import proxy_to
from support.samples import get, noise, source
from support.servers import Server, acl_user, free_port, valkey_server
from support.stores import Store
from support.topologies import cluster_servers

from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerError, ServerRefusedError, ServerUnavailableError
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

CHUNK = 64 << 10
# Without UNLINK no other that writes is tried.
OTHERS = sorted({*preflight.COMMANDS} - {"INFO", "UNLINK"})
USER = {"username": "ray", "password": "secret"}


@contextlib.contextmanager
def lacking(directory: Path, commands: Iterable[str], **config: Any) -> Iterator[Server]:
    """A server that does not know `commands`."""
    with valkey_server(include=renaming(directory, commands), **config) as server:
        yield server


def renaming(directory: Path, commands: Iterable[str], to: str = "") -> Path:
    """A file for `include` after which there are no such commands, or with the prefix `to`."""
    path = directory / "renaming.conf"
    names = {name: f"{to}{name}" if to else '""' for name in commands}
    path.write_text("".join(f"rename-command {name} {new}\n" for name, new in names.items()))
    return path


def config(url: str, **params: Any) -> Config:
    password = params.pop("password", None)
    environ = {"RAY_VALKEY_SPILL_PASSWORD": password} if password else {}
    given = {"url": url, "retry_timeout": 5, "chunk_size": CHUNK, **params}
    return Config.load(given, environ)


def found_by_check(url: str, **params: Any) -> dict[str, dict[str, str]]:
    """What does not pass, by subject, except for the setting of Ray and what warns of memory."""
    environ = {"RAY_VALKEY_SPILL_PASSWORD": params.pop("password", "")} if params else {}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]
    options += [f"--url={url}", f"--chunk-size={CHUNK}", "--json"]
    result = cli_runner(env=environ).invoke(cli, ["check", *options])
    findings = json.loads(result.stdout)["findings"]
    return {each["subject"]: each for each in findings if each["status"] == "failed"}


def works(url: str, **params: Any) -> None:
    """The head start and `check` find nothing, and whatever a node does works."""
    preflight.run_all(config(url, **params))
    assert found_by_check(url, **params) == {}
    data = [noise(5000), noise(5 * CHUNK + 1, seed=1)]
    with contextlib.closing(Store(config(url, **params), "session_1", "ab" * 28)) as store:
        store.keep_lease("", lambda: False)
        urls, failure = store.put([source(each, i) for i, each in enumerate(data)])
        assert failure is None
        assert [get(store, each, i) for i, each in enumerate(urls)] == data
        store.delete(urls[:1])
        assert store.room().used > 0
        assert store.recover(lambda pid: True) == 0
        store.destroy(lambda pid: False)


# --- what is done without ---


@pytest.mark.parametrize(
    "commands", [["HELLO"], ["CLIENT"], ["HELLO", "CLIENT", "ROLE", "CONFIG", "SCRIPT", "DEL"]]
)
def test_a_server_without_some_commands_will_do(tmp_path: Path, commands: list[str]) -> None:
    with lacking(tmp_path, commands) as server:
        works(server.url)
        assert server.our_keys() == []


def test_a_user_may_lack_what_is_not_needed(server: Server) -> None:
    rules = "~* +@all -hello -client -role -config -script -wait -@dangerous +info"
    with acl_user([server.client], rules):
        works(server.url, **USER)


@pytest.mark.parametrize("params", [{}, {"max_bytes": 8 * MIB}], ids=["free room", "max_bytes"])
def test_info_may_take_no_sections(server: Server, params: dict[str, Any]) -> None:
    server.client.config_set("maxmemory", 48 * MIB)
    with proxy_to(server.port) as proxy:
        # All but the whole of it is a command that the server does not know.
        names = {n: b"*%d\r\n$4\r\nINFO" % n for n in (2, 3, 4)}
        proxy.to_server.replaced = {name: name.replace(b"O", b"_") for name in names.values()}
        works(proxy.url, **params)
        assert b"INFO" in proxy.commands


@pytest.mark.parametrize("unknown", ["HELLO", "CLIENT", "HELLO CLIENT ROLE"])
def test_a_proxy_may_close_the_connection_at_what_it_does_not_know(
    server: Server, unknown: str
) -> None:
    with proxy_to(server.port) as proxy, closing_link(proxy.url) as link:
        proxy.unknown = frozenset(unknown.encode().split())
        works(proxy.url)
        # It is remembered: of a link's connections only the first is closed.
        link.execute(command("PING"))
        link.close()
        proxy.commands.clear()
        link.execute(command("PING"))
        assert proxy.commands == [b"INFO", b"PING"]
        # A proxy that has learnt it is asked as any other, once it has been away.
        proxy.unknown = frozenset([b"INFO"])
        link.close()
        link.execute(command("PING"))
        proxy.commands.clear()
        link.close()
        link.execute(command("PING"))
        assert proxy.commands == [b"HELLO", b"CLIENT", b"CLIENT", b"PING"]
    assert server.our_keys() == []


def test_what_closes_every_connection_is_tried_plainly_once_for_each_attempt(
    server: Server,
) -> None:
    with proxy_to(server.port) as proxy, closing_link(proxy.url) as link:
        proxy.unknown = frozenset([b"HELLO", b"INFO"])
        with (
            pytest.raises(ServerUnavailableError, match="does not answer as Valkey does"),
            link.hurried(0),
        ):
            link.execute(command("PING"))
        assert [each for each in proxy.commands if each != b"CLIENT"] == [b"HELLO", b"INFO"] * 2


@contextlib.contextmanager
def closing_link(url: str) -> Iterator[Link]:
    with contextlib.closing(Link(config(url), b"")) as link:
        yield link


@pytest.mark.slow
def test_a_cluster_may_lack_hello(tmp_path: Path) -> None:
    include = renaming(tmp_path, ["HELLO"])
    with cluster_servers(tmp_path / "nodes", primaries=2, replicas=0, include=include) as cluster:
        works(cluster.url)
        assert cluster.our_keys() == []


@pytest.mark.slow
def test_a_cluster_may_look_like_one_server(tmp_path: Path) -> None:
    """As some proxies have it, which pass on INFO, but neither HELLO nor CLUSTER."""
    path = renaming(tmp_path, ["CLUSTER"], to="OUR")
    path.write_text(f'{path.read_text()}rename-command HELLO ""\n')
    with one_node(path) as server:
        works(server.url)


@contextlib.contextmanager
def one_node(include: Path) -> Iterator[Server]:
    """A cluster of one node, whose CLUSTER is OURCLUSTER."""
    with valkey_server(cluster_enabled=True, cluster_port=free_port(), include=include) as server:
        server.client.execute_command("OURCLUSTER ADDSLOTSRANGE", 0, 16383)
        yield server


# --- what is named ---


@pytest.mark.parametrize("names", [["EVAL"], ["INFO"], ["UNLINK"], OTHERS])
def test_commands_that_a_server_lacks_are_named_together(tmp_path: Path, names: list[str]) -> None:
    with lacking(tmp_path, names) as server:
        with pytest.raises(ServerRefusedError) as raised:
            preflight.run_all(config(server.url))
        found = found_by_check(server.url)
        assert server.our_keys() == []
    (finding,) = found.values()
    for message in (raised.value.message, finding["detail"]):
        named = re.search(r" fails ([A-Z, ]+): ERR unknown command", message)
        assert named is not None
        assert sorted(named[1].split(", ")) == names
    assert finding["hint"] == raised.value.hint
    assert "rename-command" in finding["hint"]
    assert "proxy" in finding["hint"]


@pytest.mark.parametrize("name", ["EVAL", "INFO", "UNLINK"])
def test_a_command_that_a_user_may_not_run_is_named(server: Server, name: str) -> None:
    with acl_user([server.client], f"~* +@all -{name.lower()}"):
        with pytest.raises(ServerRefusedError, match=f"let user 'ray' run {name} on") as raised:
            preflight.run_all(config(server.url, **USER))
        found = found_by_check(server.url, **USER)
    assert f"+{name.lower()} " in raised.value.hint
    assert raised.value.message in {each["detail"] for each in found.values()}


def test_a_cluster_that_hides_its_slots_is_named(tmp_path: Path) -> None:
    with one_node(renaming(tmp_path, ["CLUSTER"], to="OUR")) as server:
        with pytest.raises(ServerError, match="fails CLUSTER SLOTS: ERR unknown command"):
            preflight.run_all(config(server.url))
        assert "CLUSTER SLOTS" in found_by_check(server.url)["server"]["detail"]
