"""Connections to the server: pipelining and retries. The only module that imports valkey.

valkey-py opens a connection, authenticates and selects the database; from then on a `Link` moves
bytes itself. valkey-py's own command path copies every value at least once and waits for each
reply, which costs most of the wire's speed; `Link.run` sends scatter-gather from the buffers it is
given, many requests ahead of their replies, and receives values right where they are wanted.

Every request a link may be given is safe to repeat (SET, GET, UNLINK, ZADD, …): when the connection
breaks, the requests without a reply are sent again on a new one.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey.exceptions as client_errors
from valkey.connection import Connection, UnixDomainSocketConnection

from ray_valkey_spill import __version__
from ray_valkey_spill.config import Address, Config
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.format import Buffer
from ray_valkey_spill.resp import ReplyReader, Request, TransientError, command

__all__ = ["Link", "MemoryInfo", "ServerInfo"]

# Bytes under way before replies are waited for: enough to fill the wire until a reply comes, and
# within that no more than two chunks of the default size, because what is between two processes
# of a machine should fit their cores' caches. What is asked for and not yet read lies in the
# server's memory, outside its maxmemory, so this also bounds what one IO worker costs the server.
_SMALLEST_WINDOW = 1 << 20
_LARGEST_WINDOW = 8 << 20
_FASTEST_WIRE = 4e9  # bytes per second
# Requests are gathered into one system call up to this many bytes, less than a chunk of the default
# size, and this many buffers, which is below Linux's IOV_MAX.
_BATCH = 448 << 10
_MAX_PARTS = 1000
# `tcpi_rtt`, microseconds, in Linux's `struct tcp_info` (linux/tcp.h).
_TCP_RTT = slice(68, 72)
_MAX_REQUESTS = 300
# Seconds without a single byte moving after which a server counts as stalled.
_STALL_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 5.0
_SHORTEST_TIMEOUT = 1.0
# Seconds between attempts, doubled each time and drawn from the upper half of that.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0


# --- what the server says of itself ---


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """How much memory the server has; sizes in bytes, `maxmemory` 0 for no bound.

    Attributes:
        keys: how many there are in all databases.
        volatile: how many of them have a TTL.
    """

    maxmemory: int
    policy: str
    used: int
    keys: int
    volatile: int

    @property
    def evicts_all(self) -> bool:
        """Whether the policy may evict keys that have no TTL, as spilled chunks have none."""
        return self.policy.startswith("allkeys-")

    @property
    def evicts_volatile(self) -> bool:
        """Whether it evicts those that have one, and no others."""
        return self.policy.startswith("volatile-")

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> MemoryInfo:
        if not all(values.get(name, "0").isdigit() for name in ("maxmemory", "used_memory")):
            raise NotValkeyError("its INFO has sizes that are no numbers")
        databases = [text for name, text in values.items() if re.fullmatch("db[0-9]+", name)]
        keys, volatile = (
            sum(
                int(match[1])
                for text in databases
                if (match := re.search(f"{name}=([0-9]+)", text))
            )
            for name in ("keys", "expires")
        )
        return cls(
            maxmemory=int(values.get("maxmemory", 0)),
            policy=values.get("maxmemory_policy", "noeviction"),
            used=int(values.get("used_memory", 0)),
            keys=keys,
            volatile=volatile,
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What `INFO` tells that matters here."""

    product: str
    version: str
    mode: str
    role: str
    cluster: bool
    memory: MemoryInfo

    @classmethod
    def parse(cls, text: str) -> ServerInfo:
        values = _fields(text)
        if "redis_version" not in values and "valkey_version" not in values:
            raise NotValkeyError("it answers INFO, but not as a Valkey does")
        is_valkey = "valkey_version" in values
        return cls(
            product="Valkey" if is_valkey else "Redis",
            version=values["valkey_version" if is_valkey else "redis_version"],
            mode=values.get("server_mode", values.get("redis_mode", "standalone")),
            role=values.get("role", "master"),
            cluster=values.get("cluster_enabled", "0") == "1",
            memory=MemoryInfo.parse(values),
        )


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, _, value in lines}


# --- the connection ---


class _Patience:
    """Paces attempts, from the first failure until something works again or time is up."""

    def __init__(self, address: Address, retry_timeout: float, unreachable_timeout: float) -> None:
        self._address = address
        self._retry_timeout = retry_timeout
        self._unreachable_timeout = unreachable_timeout
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE

    def renew(self) -> None:
        self._failing_since = None
        self._pause = _FIRST_PAUSE

    def wait(self, failure: Exception) -> None:
        """Sleep before the next attempt; the first one after a success comes at once.

        Raises:
            ServerUnavailableError: when time is up.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            return
        answered = isinstance(failure, TransientError)
        limit = self._retry_timeout if answered else self._unreachable_timeout
        left = self._failing_since + limit - now
        if left <= 0:
            raise ServerUnavailableError(
                f"{self._address} {'does not serve' if answered else 'cannot be reached'}: "
                f"{str(failure) or type(failure).__name__} (tried for {limit:g} s)"
            ) from failure
        time.sleep(min(left, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class Link:
    """One connection to one server, opened when first needed, and anew when it breaks.

    For one thread at a time.

    Args:
        config: address, credentials and `retry_timeout`.
        unreachable_timeout: seconds for which a server that does not answer at all is tried,
            `retry_timeout` unless given: Ray's head start has to fail sooner than a spill.
    """

    def __init__(self, config: Config, *, unreachable_timeout: float | None = None) -> None:
        self._config = config
        self._unreachable_timeout = (
            config.retry_timeout if unreachable_timeout is None else unreachable_timeout
        )
        self._connection: Any = None
        self._sock: Any = None
        self._replies: ReplyReader
        self._window = _SMALLEST_WINDOW
        self.breaks = 0  # connections that broke, or could not be had
        # What the latest run waits for replies to.
        self._under_way: deque[Request] = deque()

    @property
    def address(self) -> Address:
        return self._config.address

    def close(self) -> None:
        """Drop the connection; the next request opens a new one.

        What has not left this machine yet is dropped too (by SO_LINGER), or it could be carried out
        after whatever is sent next.
        """
        connection, sock = self._connection, self._sock
        self._connection = self._sock = None
        if connection is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.disconnect()

    def execute(self, *requests: Request) -> list[Any]:
        """Send small commands together and return their replies.

        Raises:
            ServerError: of the first command that failed; all have been sent.
        """
        return [request.result() for request in list(self.run(requests))]

    def info(self) -> ServerInfo:
        return ServerInfo.parse(self._info())

    def memory(self) -> MemoryInfo:
        """A part of `info`, which costs the server much less."""
        return MemoryInfo.parse(_fields(self._info("memory", "keyspace")))

    def _info(self, *sections: str) -> str:
        (text,) = self.execute(command("INFO", *sections))
        if not isinstance(text, bytearray):
            raise NotValkeyError(f"{self.address} answers INFO, but not as a Valkey does")
        return text.decode(errors="replace")

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Send `requests` and yield each once its reply is there, in order.

        `requests` is read only as far ahead as the window allows. A request's buffers must stay
        unchanged until it is yielded. A consumer that stops early, or that runs something else
        before it goes on, costs the connection, which has replies under way.

        Raises:
            ServerUnavailableError: after `retry_timeout` seconds without any reply, through all
                new connections. What was not yielded may or may not have been carried out.
            ServerRefusedError, NotValkeyError: if no connection can be had.
        """
        source = iter(requests)
        in_flight: deque[Request] = deque()
        unsent: list[Request] = []
        weight = 0
        filling, exhausted = True, False
        patience = _Patience(self.address, self._config.retry_timeout, self._unreachable_timeout)
        try:
            while True:
                if filling:
                    fresh = _take(source, _BATCH)
                    exhausted = not fresh
                    in_flight += fresh
                    unsent += fresh
                    weight += sum(request.weight for request in fresh)
                    filling = not exhausted and self._has_room(weight, len(in_flight))
                if not in_flight:
                    return
                request = in_flight[0]
                try:
                    if self._under_way is not in_flight:
                        if self._under_way:
                            self.close()
                        self._under_way = in_flight
                        unsent = list(in_flight)
                    if self._sock is None:
                        self._connect()
                        unsent = list(in_flight)
                    if unsent:
                        self._send([part for request in unsent for part in request.parts])
                        unsent = []
                    if filling:
                        continue
                    self._replies.read(request)
                except (OSError, TransientError) as failure:
                    self.breaks += 1
                    self.close()
                    patience.wait(failure)
                    continue
                patience.renew()
                in_flight.popleft()
                weight -= request.weight
                filling = not exhausted and self._has_room(weight, len(in_flight))
                yield request
        finally:
            if in_flight and self._under_way is in_flight:
                self.close()

    def _has_room(self, weight: int, requests: int) -> bool:
        """Whether another batch may be sent ahead of the replies to what is under way."""
        if requests < 2:
            return True
        return weight + _BATCH <= self._window and requests <= _MAX_REQUESTS // 2

    def _send(self, parts: list[Buffer]) -> None:
        while parts:
            try:
                sent = self._sock.sendmsg(parts[:_MAX_PARTS])
            except BlockingIOError:
                raise TimeoutError("it takes no more bytes") from None
            done = 0
            while done < len(parts) and sent >= len(parts[done]):
                sent -= len(parts[done])
                done += 1
            del parts[:done]
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def _connect(self) -> None:
        """Open a connection ready for commands.

        Raises:
            OSError, TransientError: another attempt may cure it.
            ServerRefusedError, NotValkeyError, ConfigError: it will not.
        """
        address = self.address
        patience = max(_SHORTEST_TIMEOUT, self._unreachable_timeout)
        options: dict[str, Any] = {
            "db": address.db,
            "username": address.username,
            "password": self._password(),
            "socket_timeout": min(_STALL_TIMEOUT, patience),
            "socket_connect_timeout": min(_CONNECT_TIMEOUT, patience),
            # Shown by CLIENT LIST. A user with few permissions may not tell it, and the server
            # would note that in its ACL LOG each time.
            "lib_name": None if address.username else "ray-valkey-spill",
            "lib_version": None if address.username else __version__,
        }
        connection: Any = (
            UnixDomainSocketConnection(path=address.path, **options)
            if address.path
            else Connection(host=address.host, port=address.port, socket_keepalive=True, **options)
        )
        try:
            connection.connect()
        except client_errors.ValkeyError as error:
            connection.disconnect()
            raise _connect_error(address, error) from error
        self._connection = connection
        self._sock = connection._sock
        _have_kernel_time_out(self._sock, options["socket_timeout"])
        self._replies = ReplyReader(self._sock)
        self._window = _window(self._sock)

    def _password(self) -> str | None:
        """Read anew for each connection, so that a rotated password is found."""
        path = self._config.password_file
        if path is None or self.address.password is not None:
            return self.address.password
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"password_file {path!r} cannot be read: {error}") from error


def _have_kernel_time_out(sock: Any, seconds: float) -> None:
    """Give `sock` a timeout that costs nothing: Python's own costs a `poll` for every transfer."""
    interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _window(sock: Any) -> int:
    """Bytes under way that keep the fastest wire busy for a round trip to `sock`'s peer."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_RTT.stop)
    except OSError:  # no TCP
        return _SMALLEST_WINDOW
    round_trip = int.from_bytes(info[_TCP_RTT], sys.byteorder) / 1e6
    return int(min(max(_SMALLEST_WINDOW, round_trip * _FASTEST_WIRE), _LARGEST_WINDOW))


def _take(source: Iterator[Request], weight: int) -> list[Request]:
    """The next requests of together about `weight` bytes; none once `source` is exhausted."""
    taken: list[Request] = []
    for request in source:
        taken.append(request)
        weight -= request.weight
        if weight <= 0 or len(taken) >= _MAX_REQUESTS // 2:
            break
    return taken


def _connect_error(address: Address, error: client_errors.ValkeyError) -> Exception:
    """What `valkey.Connection.connect` failed with, in our terms."""
    if isinstance(error, client_errors.BusyLoadingError):
        return TransientError(f"LOADING {error}")
    if isinstance(error, client_errors.AuthenticationError | client_errors.AuthorizationError):
        user = f"user {address.username!r}" if address.username else "the default user"
        return ServerRefusedError(
            f"{address} refuses {user}: {error}",
            "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as the server has them",
        )
    if isinstance(error, client_errors.InvalidResponse):
        return NotValkeyError(
            f"what answers at {address} does not speak the Valkey protocol ({error})",
            "Correct url: it must name a Valkey or Redis server, without TLS",
        )
    if isinstance(error, client_errors.ConnectionError | client_errors.TimeoutError):
        # Met after connecting, in the first exchange: also what a TLS port or a web server gives.
        silent = "closed by server" in str(error) or "reading from" in str(error)
        prefix = "it takes connections, but does not answer as a Valkey does: " if silent else ""
        return ConnectionError(f"{prefix}{error}".rstrip("."))
    mend = "Give a database that it has" if "DB index" in str(error) else ""
    return ServerRefusedError(f"{address} refuses the connection: {error}", mend)
