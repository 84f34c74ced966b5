from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.clock import Clock
from support.proxy import Proxy, answering, proxy_to
from support.servers import (
    PRODUCTS,
    Server,
    acl_user,
    dead_port,
    server_of,
    unix_socket_server,
    valkey_server,
    wait_until,
)

from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    RedirectError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
    TransientError,
)
from ray_valkey_spill.protocol.connection import Connection
from ray_valkey_spill.protocol.link import Link, Sharing
from ray_valkey_spill.protocol.resp import ReplyReader, Request, command, fetch, store
from ray_valkey_spill.protocol.server_info import ServerInfo
from ray_valkey_spill.protocol.topology import Cluster
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.units import MIB

pytestmark = pytest.mark.usefixtures("no_thread_left")

KEY = "ray:spill:default:test"


def config(url: str, **params: Any) -> Config:
    return Config.load({"url": url, **params}, {})


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    link = link_to(config(server.url))
    yield link
    link.close()
    server.client.delete(KEY, *server.our_keys())


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxy_to(server.port) as proxy:
        yield proxy


def test_replies_of_every_kind(link: Link) -> None:
    assert link.execute(
        command("SET", KEY, b"a\r\nb"),
        command("GET", KEY),
        command("STRLEN", KEY),
        command("GET", f"{KEY}:none"),
        command("MGET", KEY, f"{KEY}:none"),
        command("SET", KEY, ""),
        command("GET", KEY),
    ) == [b"OK", b"a\r\nb", 4, None, [b"a\r\nb", None], b"OK", b""]


def test_a_value_is_stored_from_its_parts_and_received_in_place(link: Link) -> None:
    parts = [b"head", memoryview(bytes(range(256)) * 5000), bytearray(b"tail")]
    value = b"".join(parts)
    link.execute(store(KEY, parts))
    target = bytearray(len(value))
    (request,) = link.run([fetch(KEY, into=memoryview(target))])
    assert request.result() == len(value)
    assert target == value


@pytest.mark.parametrize("length", [0, 1, 7, 99])
def test_a_shorter_value_than_expected_is_returned_whole(link: Link, length: int) -> None:
    link.execute(store(KEY, [b"x" * length]))
    requests = [fetch(KEY, into=memoryview(bytearray(100))) for _ in range(3)]
    assert [bytes(r.result()) for r in link.run(requests)] == [b"x" * length] * 3


@pytest.mark.parametrize("length", [101, 8192, 8193, 70_000, 20 * MIB])
def test_a_longer_value_than_expected_is_received_and_dropped(link: Link, length: int) -> None:
    """It takes no memory, and what follows it is in step."""
    link.execute(store(KEY, [bytes(length)]), command("SET", f"{KEY}:short", "short"))
    tracemalloc.start()
    try:
        requests = [
            fetch(KEY, into=memoryview(bytearray(100))),
            fetch(f"{KEY}:short", most=100),
            fetch(KEY, most=100),
            fetch(f"{KEY}:short", most=100),
        ]
        assert [r.result() for r in link.run(requests)] == [b"", b"short", b"", b"short"]
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (command("PING"), None),
        (command("GET", KEY), None),
        (command("MGET", KEY, KEY), 2),
        (command("EVAL", "return {1, 2}", 1, KEY), 3),
    ],
)
def test_a_reply_that_is_not_of_integers_is_not_valkeys(
    link: Link, request_: Request, count: int | None
) -> None:
    list(link.run([request_]))
    with pytest.raises(NotValkeyError, match=r"(PING|GET|EVAL) has the reply"):
        request_.integers(count)


def test_a_reply_that_is_no_value_is_not_valkeys(link: Link) -> None:
    list(link.run([(number := command("STRLEN", KEY))]))
    with pytest.raises(NotValkeyError, match="STRLEN has the reply '0'"):
        number.value()


def test_missing_values_between_others_keep_replies_in_step(link: Link) -> None:
    link.execute(store(KEY, [b"x" * 100_000]))
    targets = [bytearray(100_000) for _ in range(20)]
    requests = [
        fetch(KEY if i % 3 else f"{KEY}:none", into=memoryview(target))
        for i, target in enumerate(targets)
    ]
    replies = [request.result() for request in link.run(requests)]
    assert replies == [100_000 if i % 3 else None for i in range(20)]
    assert all(target == b"x" * 100_000 for i, target in enumerate(targets) if i % 3)


def test_an_error_reply_fails_its_command_alone(link: Link) -> None:
    first, second = link.run([command("GET"), command("STRLEN", KEY)])
    with pytest.raises(ServerError, match="wrong number of arguments"):
        first.result()
    assert second.result() == 0


def test_a_command_that_the_server_lacks_is_named_without_its_arguments(link: Link) -> None:
    with pytest.raises(ServerError, match="check` lists what the server lacks") as caught:
        link.execute(command("NO-SUCH", "script", "x"))
    assert caught.value.message == "ERR unknown command 'NO-SUCH'"


def test_what_a_server_says_does_not_control_a_terminal(link: Link) -> None:
    with pytest.raises(ServerError, match=r"unknown command '\\x1b\[2J'") as caught:
        link.execute(command("\x1b[2J"))
    assert str(caught.value).isprintable()


def test_a_key_of_another_type_is_said_to_be_another_programs(server: Server, link: Link) -> None:
    server.client.set(KEY, "x")
    with pytest.raises(ServerError, match=r"WRONGTYPE.*Another program writes below"):
        link.execute(command("ZREM", KEY, "x"))


def test_requests_are_pipelined(proxy: Proxy) -> None:
    link = link_to(config(proxy.url))
    link.execute(command("STRLEN", KEY))
    before = proxy.round_trips
    assert link.execute(*[command("STRLEN", KEY) for _ in range(100)]) == [0] * 100
    assert proxy.round_trips == before + 1
    link.close()


def test_requests_are_drawn_only_as_far_ahead_as_the_window_allows(link: Link) -> None:
    drawn = 0

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for _ in range(100):
            drawn += 1
            yield store(KEY, [bytes(1 << 20)])

    # The window has at most 8 MiB, where the server is far or the machine is busy.
    for done, _ in enumerate(link.run(requests())):
        assert drawn - done <= 10


def drawn_ahead(link: Link) -> int:
    """How many values of 64 KiB are drawn before there is a reply to the first one."""
    drawn, ahead = 0, 0

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for _ in range(200):
            drawn += 1
            yield store(KEY, [bytes(64 << 10)])

    for done, _ in enumerate(link.run(requests())):
        ahead = ahead if done else drawn
    return ahead


def test_what_is_under_way_follows_the_round_trip_while_a_connection_lives(
    server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still, but for what the proxy lets pass at each command."""
    clock = Clock()
    for module in ("connection", "link"):
        monkeypatch.setattr(f"ray_valkey_spill.protocol.{module}.time", clock)

    def ahead_after(looks: int, round_trip: float) -> int:
        def take_time() -> None:
            clock.sleep(round_trip)
            proxy.before(take_time)

        proxy.before(take_time)
        for _ in range(looks):
            clock.sleep(1.1)
            wire.execute(command("STRLEN", KEY))
        proxy.disarm()
        return drawn_ahead(wire)

    with contextlib.closing(link_to(config(proxy.url))) as wire:
        near = ahead_after(2, 0.0)
        # A busy machine looks far for a moment, so this is believed only step by step.
        assert ahead_after(2, 0.01) <= 2 * near
        assert ahead_after(40, 0.01) >= 4 * near
        assert ahead_after(2, 0.0) <= 2 * near
    assert proxy.connections == 1
    server.client.delete(KEY)


def test_two_runs_may_alternate(link: Link) -> None:
    link.execute(*[store(f"{KEY}:{i}", [b"%d" % i]) for i in range(100)])
    forth = link.run([fetch(f"{KEY}:{i}") for i in range(100)])
    back = link.run([fetch(f"{KEY}:{i}") for i in reversed(range(100))])
    replies = [(int(one.result()), int(other.result())) for one, other in zip(forth, back)]
    assert replies == [(i, 99 - i) for i in range(100)]


def test_more_buffers_than_one_system_call_takes(link: Link) -> None:
    link.execute(store(KEY, [b"ab"] * 5000))
    assert link.execute(command("GET", KEY)) == [b"ab" * 5000]


def test_a_consumer_that_stops_early_does_not_spoil_what_follows(link: Link) -> None:
    link.execute(store(KEY, [b"x" * 1000]))
    for _ in link.run([command("GET", KEY) for _ in range(50)]):
        break
    assert link.execute(command("STRLEN", KEY)) == [1000]


# --- broken connections ---


@pytest.mark.parametrize("cut_after", [0, 1, 200_000, 1_048_570, 3_000_000])
def test_a_cut_while_receiving_goes_unnoticed(server: Server, proxy: Proxy, cut_after: int) -> None:
    values = [bytes([i]) * (1 << 20) for i in range(8)]
    for i, value in enumerate(values):
        server.client.set(f"{KEY}:{i}", value)
    link = link_to(config(proxy.url))
    link.execute(command("STRLEN", KEY))
    proxy.to_client.reset_after = cut_after
    targets = [bytearray(1 << 20) for _ in values]
    received = [
        request.result()
        for request in link.run(
            fetch(f"{KEY}:{i}", into=memoryview(t)) for i, t in enumerate(targets)
        )
    ]
    assert received == [1 << 20] * 8
    assert targets == values
    assert proxy.connections == 2
    link.close()
    server.client.delete(*server.our_keys())


@pytest.mark.parametrize("cut_after", [0, 1, 200_000, 1_048_640, 3_000_000])
def test_a_cut_while_sending_goes_on_from_where_it_was(
    server: Server, proxy: Proxy, cut_after: int
) -> None:
    values = [bytes([i]) * (1 << 20) for i in range(16)]
    link = link_to(config(proxy.url))
    link.execute(command("STRLEN", KEY))
    proxy.to_server.reset_after = cut_after
    link.execute(*[store(f"{KEY}:{i}", [value]) for i, value in enumerate(values)])
    assert server.client.mget([f"{KEY}:{i}" for i in range(16)]) == values
    assert proxy.connections == 2
    # Only what had no reply yet was sent again.
    assert proxy.to_server.bytes < (16 + 6) << 20
    link.close()
    server.client.delete(*server.our_keys())


def test_an_idle_connection_that_was_closed_is_replaced(proxy: Proxy) -> None:
    link = link_to(config(proxy.url, retry_timeout=0))
    link.execute(command("STRLEN", KEY))
    proxy.reset()
    assert link.execute(command("STRLEN", KEY)) == [0]
    link.close()


def test_an_idle_connection_that_a_nat_has_forgotten_carries_nothing(proxy: Proxy) -> None:
    link = link_to(config(proxy.url), sharing=Sharing(idle=0))
    link.execute(command("STRLEN", KEY))
    proxy.forget()
    assert link.execute(command("STRLEN", KEY)) == [0]
    assert (proxy.swallowed, link.breaks) == (0, 0)
    link.close()


def test_connections_stay_between_the_runs_of_an_operation(proxy: Proxy) -> None:
    link = link_to(config(proxy.url), sharing=Sharing(idle=0))
    with link.operation():
        link.execute(command("STRLEN", KEY))
        link.close_idle()
        link.execute(command("STRLEN", KEY))
    assert proxy.connections == 1
    link.close_idle()
    wait_until(lambda: proxy.open_connections == 0)
    link.close()


def test_connections_are_kept_alive_from_a_minute_on(server: Server) -> None:
    params = config(server.url)
    with (
        contextlib.closing(Connection(params, params.address.endpoints[0], 5)) as connection,
        socket.socket(fileno=os.dup(connection.fileno())) as sock,
    ):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_a_connection_that_the_server_has_closed_for_being_idle_costs_nothing() -> None:
    with valkey_server(timeout=1) as server:
        link = link_to(config(server.url, retry_timeout=0))
        link.execute(command("STRLEN", KEY))
        number = server.client.client_id()
        # A client that asks is not idle.
        wait_until(lambda: [c["id"] for c in server.client.client_list()] == [str(number)])
        assert link.execute(command("STRLEN", KEY)) == [0]
        assert link.breaks == 0
        link.close()


def test_a_server_that_stalls_is_given_up_after_retry_timeout(proxy: Proxy) -> None:
    link = link_to(config(proxy.url, retry_timeout=1))
    link.execute(command("STRLEN", KEY))
    proxy.stall()
    with pytest.raises(ServerUnavailableError, match=r"tried for 1 s"):
        link.execute(command("STRLEN", KEY))
    proxy.flow()
    assert link.execute(command("STRLEN", KEY)) == [0]
    link.close()


def test_a_server_that_comes_back_in_time_is_waited_for(server: Server, proxy: Proxy) -> None:
    link = link_to(config(proxy.url, retry_timeout=30))
    link.execute(command("STRLEN", KEY))
    proxy.refusing = True
    proxy.reset()
    back = threading.Timer(0.7, setattr, (proxy, "refusing", False))
    back.start()
    assert link.execute(command("STRLEN", KEY)) == [0]
    back.join()
    link.close()


def test_nothing_listening_names_the_address_and_the_time() -> None:
    port = dead_port()
    with pytest.raises(ServerUnavailableError, match=rf"127.0.0.1:{port}/0 cannot be reached"):
        link_to(config(f"valkey://127.0.0.1:{port}", retry_timeout=0.3)).execute(command("PING"))


def test_a_unix_socket_works_as_well(tmp_path: Path) -> None:
    with unix_socket_server(tmp_path) as url:
        link = link_to(config(url))
        link.execute(store(KEY, [b"x" * (3 << 20)]))
        target = bytearray(3 << 20)
        (request,) = link.run([fetch(KEY, into=memoryview(target))])
        assert request.result() == 3 << 20
        link.close()


def test_the_database_of_the_url_is_used(server: Server) -> None:
    link = link_to(config(f"valkey://127.0.0.1:{server.port}/5"))
    link.execute(store(KEY, [b"x"]))
    assert server.client.get(KEY) is None
    link.execute(command("UNLINK", KEY))
    link.close()


def test_requests_are_carried_out_in_order_though_the_connection_breaks_between(
    server: Server, link: Link
) -> None:
    link.execute(store(KEY, [b"0"]))
    # In an operation: what is closed before one is replaced unnoticed.
    with link.operation():
        server.client.client_kill_filter(_type="normal", skipme=True)
        # The first that are sent only have the kernel learn that nobody listens any more.
        link.execute(*[store(KEY, [bytes([i]) * 200_000]) for i in range(4)])
    assert server.client.get(KEY) == bytes([3]) * 200_000


# --- hosts with several addresses ---


@dataclass
class Host:
    """A name, and the addresses that it is resolved to."""

    name: str
    addresses: list[str]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that nobody has connected to before, without addresses."""
    host = Host(f"host-{secrets.token_hex(4)}", [])
    resolve = socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *args: Any, **options: Any) -> Any:
        hosts = host.addresses if name == host.name else [name]
        return [info for each in hosts for info in resolve(each, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return host


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that connections were begun to."""
    tried: list[str] = []

    class Counting(socket.socket):
        def connect(self, address: Any) -> None:
            tried.append(address[0])
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            tried.append(address[0])
            return super().connect_ex(address)

    monkeypatch.setattr(socket, "socket", Counting)
    return tried


@contextlib.contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """A host that does not answer: a listener whose backlog is full."""
    with socket.create_server((host, port), backlog=0), contextlib.ExitStack() as full:
        for _ in range(2):
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        yield


def test_of_several_addresses_the_dead_one_is_tried_once(
    server: Server, several: Host, attempts: list[str]
) -> None:
    several.addresses += ["127.0.0.2", "127.0.0.1"]
    with black_hole("127.0.0.2", server.port):
        attempts.clear()
        for _ in range(3):
            link = link_to(config(f"valkey://{several.name}:{server.port}"))
            assert link.execute(command("STRLEN", KEY)) == [0]
            link.close()
    assert attempts == ["127.0.0.2", *["127.0.0.1"] * 3]


def test_an_address_that_this_host_has_no_sockets_for_is_passed_over(
    server: Server, several: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with IPv6 switched off in the kernel, where a name has IPv6 addresses nevertheless."""

    class OnlyIPv4(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **options: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *args, **options)

    monkeypatch.setattr(socket, "socket", OnlyIPv4)
    several.addresses += ["::1", "127.0.0.1"]
    link = link_to(config(f"valkey://{several.name}:{server.port}", retry_timeout=0))
    assert link.execute(command("STRLEN", KEY)) == [0]
    link.close()
    several.addresses.remove("127.0.0.1")
    with pytest.raises(ServerUnavailableError, match="not supported"):
        link.execute(command("STRLEN", KEY))


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_what_can_be_no_host_name_is_an_unknown_one(host: str) -> None:
    with pytest.raises(ServerUnavailableError, match="not a host name"):
        link_to(config(f"valkey://{host}:1", retry_timeout=0)).info()


def test_an_address_that_refuses_is_passed_over(
    server: Server, several: Host, attempts: list[str]
) -> None:
    several.addresses += ["127.0.0.3", "127.0.0.1"]
    link = link_to(config(f"valkey://{several.name}:{server.port}", retry_timeout=0))
    assert link.execute(command("STRLEN", KEY)) == [0]
    link.close()
    several.addresses.remove("127.0.0.1")
    with pytest.raises(ServerUnavailableError, match=r"host-.*refused"):
        link.execute(command("STRLEN", KEY))


def test_an_address_where_a_replica_answers_is_tried_last(
    server: Server, several: Host, attempts: list[str]
) -> None:
    several.addresses += ["127.0.0.4", "127.0.0.1"]
    with answering(b"-READONLY You can't write\r\n" * 4, "127.0.0.4", server.port):
        link = link_to(config(f"valkey://{several.name}:{server.port}", retry_timeout=30))
        assert link.execute(command("STRLEN", KEY)) == [0]
        link.close()
        assert link.execute(command("STRLEN", KEY)) == [0]
        link.close()
    assert attempts[-3:] == ["127.0.0.4", "127.0.0.1", "127.0.0.1"]


# --- servers that refuse ---


@pytest.mark.parametrize("count", [1, 6])
def test_a_value_that_is_too_long_for_the_server_is_refused_as_such(count: int) -> None:
    with valkey_server(proto_max_bulk_len="1mb") as server, proxy_to(server.port) as proxy:
        for url in (server.url, proxy.url):
            link = link_to(config(url, chunk_size=3 << 20, retry_timeout=60))
            with pytest.raises(ServerRefusedError, match=r"bulk length.*proto-max-bulk-len"):
                link.execute(*[store(f"{KEY}:{i}", [bytes(3 << 20)]) for i in range(count)])
            assert link.execute(store(KEY, [b"x"])) == [b"OK"]
            link.close()


def test_a_server_that_breaks_connections_again_and_again_has_its_limits_named(
    tmp_path: Path,
) -> None:
    with server_of(PRODUCTS[-1], tmp_path) as (url, client):
        client.config_set("maxmemory-clients", "500kb")
        link = link_to(config(url, retry_timeout=0.3))
        with pytest.raises(ServerUnavailableError, match=r"maxmemory-clients.*check"):
            link.execute(store(KEY, [bytes(3 << 20)]))
        link.close()


def test_a_wrong_password_is_refused_at_once_and_not_repeated() -> None:
    with valkey_server(password="right") as server:
        for environ in ({}, {"RAY_VALKEY_SPILL_PASSWORD": "wrong-secret"}):
            wrong = Config.load({"url": server.url, "retry_timeout": 60}, environ)
            with pytest.raises(ServerRefusedError, match="RAY_VALKEY_SPILL_PASSWORD") as caught:
                link_to(wrong).info()
            assert "wrong-secret" not in str(caught.value)


def test_the_password_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("right\n")
    with valkey_server(password="right") as server:
        for params, environ in (
            ({}, {"RAY_VALKEY_SPILL_PASSWORD": "right"}),
            ({"password_file": str(file)}, {}),
            ({"username": "default", "password_file": str(file)}, {}),
        ):
            link = link_to(Config.load({"url": server.url, **params}, environ))
            assert link.info().role == "master"
            link.close()


def test_a_password_file_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(ConfigError, match="/no/such/file"):
        link_to(config(server.url, password_file="/no/such/file")).info()


def test_a_missing_permission_is_told_from_other_errors(server: Server) -> None:
    with acl_user([server.client], "~ray:* +get"):
        environ = {"RAY_VALKEY_SPILL_PASSWORD": "secret"}
        link = link_to(Config.load({"url": server.url, "username": "ray"}, environ))
        with pytest.raises(ServerRefusedError, match="NOPERM"):
            link.execute(command("SET", KEY, "x"))
        assert link.execute(command("GET", KEY)) == [None]
        link.close()


def test_a_full_server_is_told_from_other_errors() -> None:
    with valkey_server(maxmemory="3mb") as server:
        link = link_to(config(server.url))
        with pytest.raises(ServerFullError, match="OOM"):
            link.execute(*[store(f"{KEY}:{i}", [bytes(1 << 20)]) for i in range(8)])
        link.close()


@pytest.fixture
def web_server() -> Iterator[str]:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        yield url


@pytest.fixture
def mute_server() -> Iterator[str]:
    with answering(b"") as url:
        yield url


@pytest.fixture
def loading_server() -> Iterator[str]:
    with answering(b"-LOADING Valkey is loading the dataset in memory\r\n" * 4) as url:
        yield url


def test_what_is_not_a_valkey_is_said_to_be_none(web_server: str) -> None:
    with pytest.raises(NotValkeyError, match="does not speak the Valkey protocol"):
        link_to(config(web_server)).info()


@pytest.mark.parametrize(
    "reply",
    [
        *(b"$abc\r\n", b"*x\r\n", b":\r\n", b"$9999999999999999\r\n", b"*99999999999\r\n"),
        *(b"?\r\n", b"$-7\r\n", b"*-5\r\n", b"*1\r\n" * 2000),
    ],
)
def test_garbage_in_the_middle_is_said_to_be_no_valkey(server: Server, reply: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply)
        with pytest.raises(NotValkeyError):
            ReplyReader(ours).read(command("GET", KEY))


@pytest.mark.parametrize("reply", [b"$abc\r\n", b":x\r\n", b"*1\r\n" * 5000])
def test_garbage_in_the_handshake_is_said_to_be_no_valkey(reply: bytes) -> None:
    with answering(reply) as url, pytest.raises(NotValkeyError, match="Valkey protocol") as caught:
        link_to(Config.load({"url": url}, {"RAY_VALKEY_SPILL_PASSWORD": "secret"})).info()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "slots",
    [
        *(None, 5, b"OK", [5], [[]], [[0, 5]], [[0, 5, 7]], [[0, 5, []]], [[0, 5, [b"a", b"x"]]]),
        *(
            [[0, 10**12, [b"a", 1]]],
            [[-1, 5, [b"a", 1]]],
            [[5, 0, [b"a", 1]]],
            [[b"0", 5, [b"a", 1]]],
        ),
        *([[0, 5, [b"\xff", 1]]], [[0, 5, [b"a", 70000]]], [ServerError("x")]),
    ],
)
def test_slots_that_are_none_come_from_no_valkey(slots: Any) -> None:
    with pytest.raises(NotValkeyError, match=r"a:1 answers CLUSTER SLOTS, but not as Valkey does"):
        Cluster(slots, Endpoint("a", 1))


@pytest.mark.parametrize(
    "reply",
    [b"*0\r\n", b"*1\r\n$1\r\na\r\n", b"*2\r\n:1\r\n:1\r\n", b"*2\r\n$1\r\na\r\n$1\r\nx\r\n"],
)
def test_a_sentinel_that_names_no_address_is_none(reply: bytes) -> None:
    hello = b"*2\r\n$4\r\nmode\r\n$8\r\nsentinel\r\n"
    with answering(hello + b"+OK\r\n" * 2 + reply) as url:
        link = link_to(config(url, sentinel_service="service"))
        with pytest.raises(ServerRefusedError, match="is not a Sentinel"):
            link.info()


REDIRECTIONS = [
    (b"MOVED 3999 127.0.0.1:6381", ("127.0.0.1", 6381)),
    (b"MOVED 3999 ::1:6381", ("::1", 6381)),
    (b"MOVED 3999 node-1.valkey.example.:6381", ("node-1.valkey.example.", 6381)),
    (b"ASK 3999 :6381", ("", 6381)),
    (b"ASK 3999 ?:6381", ("", 6381)),
    (b"MOVED 3999 10.0.0.1:6381 and more", ("10.0.0.1", 6381)),
]


@pytest.mark.parametrize(("reply", "address"), REDIRECTIONS)
def test_a_redirection_names_an_address(reply: bytes, address: tuple[str, int]) -> None:
    error = answer_to_get(b"-" + reply + b"\r\n").error
    assert isinstance(error, RedirectError)
    assert (error.host, error.port) == address
    assert error.ask == reply.startswith(b"ASK")


@pytest.mark.parametrize(
    "reply",
    [
        *(b"MOVED", b"ASK", b"MOVED 3999", b"MOVED 3999 ", b"ASK 3999 host", b"ASK x host:6379"),
        *(b"MOVED 3999 host:", b"MOVED 3999 host:port", b"MOVED 3999 host:0", b"ASK 1 host:65536"),
        *(b"MOVED 3999 host:-1", b"MOVED 3999 host:6379x", "MOVED 1 host:٣".encode()),
        *(b"MOVED 1 a..b:6379", b"MOVED 1 " + b"a" * 64 + b":6379", b"MOVED 1 \xff:6379"),
        b"MOVED  3999 host:6379",
    ],
)
def test_a_redirection_to_nowhere_comes_from_no_valkey(reply: bytes) -> None:
    with pytest.raises(NotValkeyError, match="redirects to no address"):
        answer_to_get(b"-" + reply + b"\r\n")


def answer_to_get(reply: bytes) -> Request:
    """A GET to which a server has replied `reply`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply)
        request = command("GET", KEY)
        ReplyReader(ours).read(request)
        return request


NOT_NOW = [
    b"-LOADING Valkey is loading the dataset in memory",
    b"-BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    b"-CLUSTERDOWN Hash slot not served",
    b"-TRYAGAIN Multiple keys request during rehashing of slot",
    b"-NOREPLICAS Not enough good replicas to write.",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    b"-READONLY You can't write against a read only replica.",
    b"-REDIRECT 127.0.0.1:6380",
    b"-UNBLOCKED force unblock from blocking operation, instance state changed",
    b"-ERR WAIT cannot be used with replica instances.",
]


@pytest.mark.parametrize("reply", NOT_NOW, ids=lambda reply: reply.split()[0].decode())
def test_what_means_not_now_is_another_attempts_business(reply: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply + b"\r\n")
        with pytest.raises(TransientError, match=re.escape(reply[1:].decode())):
            ReplyReader(ours).read(command("SET", KEY, "x"))


@pytest.mark.parametrize("clients", ["clients", "clients + cluster connections"])
def test_too_many_clients_are_waited_for_and_then_named(clients: str) -> None:
    with (
        answering(f"-ERR max number of {clients} reached\r\n".encode()) as url,
        pytest.raises(ServerUnavailableError, match=r"max number.*tried for 0\.3 s.*maxclients"),
    ):
        link_to(config(url, retry_timeout=0.3)).info()


def test_what_closes_without_an_answer_is_said_to(mute_server: str) -> None:
    with pytest.raises(ServerUnavailableError, match="does not answer as Valkey does"):
        link_to(config(mute_server, retry_timeout=0.3)).info()


def test_loading_is_waited_for_even_where_the_unreachable_is_not(loading_server: str) -> None:
    link = link_to(config(loading_server, retry_timeout=1), unreachable_timeout=0)
    with pytest.raises(ServerUnavailableError, match=r"LOADING.*tried for 1 s"):
        link.info()


def test_server_info_of_valkey_and_redis() -> None:
    valkey = ServerInfo.parse(
        "# Server\r\nredis_version:7.2.4\r\nvalkey_version:9.1.0\r\nrole:master\r\n"
        "maxmemory:1024\r\nmaxmemory_policy:allkeys-lru\r\nused_memory:512\r\nredis_mode:cluster\r\n"
        "aof_enabled:1\r\nslave0:ip=::1,port=1,state=online,offset=1\r\nslave1:state=wait_bgsave\r\n"
        "db0:keys=7,expires=3,avg_ttl=0\r\ndb2:keys=5,expires=1,avg_ttl=0\r\n"
    )
    assert (valkey.product, valkey.version, valkey.mode) == ("Valkey", "9.1.0", "cluster")
    assert (valkey.role, valkey.replicas, valkey.aof) == ("master", 1, True)
    memory = valkey.memory
    assert (memory.maxmemory, memory.used, memory.keys, memory.volatile) == (1024, 512, 12, 4)
    assert (memory.evicts_all, memory.evicts_volatile) == (True, False)
    redis = ServerInfo.parse("redis_version:7.0.15\r\nmaxmemory_policy:volatile-lru\r\n")
    assert (redis.product, redis.version) == ("Redis", "7.0.15")
    assert (redis.memory.evicts_all, redis.memory.evicts_volatile) == (False, True)
    with pytest.raises(NotValkeyError):
        ServerInfo.parse("hello")
    for number in ("²", "9" * 5000, "-1", ""):
        with pytest.raises(NotValkeyError, match="sizes that are not numbers"):
            ServerInfo.parse(f"redis_version:7.0.15\r\nmaxmemory:{number}\r\n")
