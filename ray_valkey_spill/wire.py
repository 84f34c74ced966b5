"""Connections to the server: pipelining, retries, errors. The only module that imports valkey.

valkey-py opens a connection, authenticates and selects the database; from then on a `Link` moves
bytes itself. Its own command path copies every value at least once and waits for each reply, which
costs most of the wire's speed; `Link.run` sends scatter-gather from the buffers it is given, many
requests ahead of their replies, and receives values right where they are wanted.

Every request a link may be given is safe to repeat (SET, GET, UNLINK, ZADD, …): when the connection
breaks, the requests without a reply are sent again on a new one.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey.exceptions as client_errors
from valkey.connection import Connection, UnixDomainSocketConnection

from ray_valkey_spill.config import Address, Config
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
)

__all__ = ["Link", "Request", "ServerInfo", "command", "fetch", "store"]

Buffer = bytes | bytearray | memoryview

# Bytes under way before replies are waited for. What is asked for and not yet read lies in the
# server's memory, outside its maxmemory, so this is also what one IO worker may cost the server.
_WINDOW = 4 << 20
# Requests are gathered into one system call up to this many bytes, and this many buffers, which
# is below Linux's IOV_MAX.
_BATCH = 1 << 20
_MAX_PARTS = 1000
_MAX_REQUESTS = 300
_READ_SIZE = 64 << 10
# Seconds without a single byte moving after which a server counts as stalled.
_STALL_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 5.0
_SHORTEST_TIMEOUT = 1.0
# Seconds between attempts, doubled each time and drawn from the upper half of that.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

# Error replies that mean "not now": a server that restarts, fails over or reshards gives them.
_TRANSIENT = {"LOADING", "MASTERDOWN", "READONLY", "TRYAGAIN", "CLUSTERDOWN", "BUSY"}


# --- requests ---


class Request:
    """A command, and its reply once it has arrived.

    Attributes:
        parts: the command as it goes over the wire.
        into: where the reply's value is to be received, if it has exactly that size.
        reply: as the server sent it: bytes for a status, bytearray for a value, int, list or None.
            The length of `into`, if that was filled.
        error: the server's error instead of a reply.
    """

    __slots__ = ("error", "into", "parts", "reply", "weight")

    def __init__(self, parts: list[Buffer], *, into: memoryview | None = None) -> None:
        self.parts = parts
        self.into = into
        self.reply: Any = None
        self.error: ServerError | None = None
        self.weight = sum(map(len, parts)) + (len(into) if into is not None else 0)

    def result(self) -> Any:
        """The reply. Raises the server's error, translated."""
        if self.error is not None:
            raise self.error
        return self.reply


def command(*args: str | bytes | int) -> Request:
    """A small command."""
    encoded = [a if isinstance(a, bytes) else str(a).encode() for a in args]
    pieces = [b"*%d\r\n" % len(encoded)]
    pieces += [b"$%d\r\n%b\r\n" % (len(a), a) for a in encoded]
    return Request([b"".join(pieces)])


def store(key: str, value: Sequence[Buffer]) -> Request:
    """SET `key` to the concatenation of `value`'s buffers, none of which is copied."""
    name = key.encode()
    size = sum(map(len, value))
    head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, size)
    return Request([head, *value, b"\r\n"])


def fetch(key: str, into: memoryview) -> Request:
    """GET `key` into `into`; the reply is the value's length, or the value where that differs."""
    name = key.encode()
    return Request([b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)], into=into)


# --- what the server says of itself ---


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What `INFO` tells that matters here; sizes in bytes."""

    product: str
    version: str
    role: str
    loading: bool
    cluster: bool
    maxmemory: int
    maxmemory_policy: str
    used_memory: int

    @property
    def evicts(self) -> bool:
        """Whether the policy may evict keys that have no TTL, as spilled chunks have none."""
        return self.maxmemory_policy.startswith("allkeys-")

    @classmethod
    def parse(cls, text: str) -> ServerInfo:
        lines = (line.partition(":") for line in text.splitlines() if ":" in line)
        values = {name: value.strip() for name, _, value in lines}
        if "redis_version" not in values and "valkey_version" not in values:
            raise NotValkeyError("it answers INFO, but not as a Valkey does")
        is_valkey = "valkey_version" in values
        return cls(
            product="Valkey" if is_valkey else "Redis",
            version=values["valkey_version" if is_valkey else "redis_version"],
            role=values.get("role", "master"),
            loading=values.get("loading", "0") == "1",
            cluster=values.get("cluster_enabled", "0") == "1",
            maxmemory=int(values.get("maxmemory", 0)),
            maxmemory_policy=values.get("maxmemory_policy", "noeviction"),
            used_memory=int(values.get("used_memory", 0)),
        )


# --- the connection ---


class _TransientError(Exception):
    """A failure that another attempt may cure: its text tells the user what it was."""


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
        answered = isinstance(failure, _TransientError)
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
        self._replies: _ReplyReader
        self.connections = 0  # how many have been opened; more than before means one broke

    @property
    def address(self) -> Address:
        return self._config.address

    def close(self) -> None:
        """Drop the connection; the next request opens a new one."""
        connection, self._connection, self._sock = self._connection, None, None
        if connection is not None:
            connection.disconnect()

    def execute(self, *requests: Request) -> list[Any]:
        """Send small commands together and return their replies.

        Raises:
            ServerError: of the first command that failed; all have been sent.
        """
        return [request.result() for request in list(self.run(requests))]

    def info(self) -> ServerInfo:
        (text,) = self.execute(command("INFO"))
        if not isinstance(text, bytearray):
            raise NotValkeyError(f"{self.address} answers INFO, but not as a Valkey does")
        return ServerInfo.parse(text.decode(errors="replace"))

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Send `requests` and yield each once its reply is there, in order.

        `requests` is read only as far ahead as the window allows. A request's buffers must stay
        unchanged until it is yielded. A consumer that stops early costs the connection, which has
        replies under way.

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
                    full = weight >= _WINDOW or len(in_flight) >= _MAX_REQUESTS
                    filling = not full and not exhausted
                if not in_flight:
                    return
                request = in_flight[0]
                try:
                    if self._sock is None:
                        self._connect()
                        unsent = list(in_flight)
                    if unsent:
                        self._send([part for request in unsent for part in request.parts])
                        unsent = []
                    if filling:
                        continue
                    self._replies.read(request)
                except (OSError, _TransientError) as failure:
                    self.close()
                    patience.wait(failure)
                    continue
                patience.renew()
                in_flight.popleft()
                weight -= request.weight
                # Asking for more only when half of the window is free keeps sends few and large.
                few = weight <= _WINDOW // 2 and len(in_flight) <= _MAX_REQUESTS // 2
                filling = few and not exhausted
                yield request
        finally:
            if in_flight:
                self.close()

    def _send(self, parts: list[Buffer]) -> None:
        while parts:
            sent = self._sock.sendmsg(parts[:_MAX_PARTS])
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
            OSError, _TransientError: another attempt may cure it.
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
            "lib_name": "ray-valkey-spill",
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
        self._replies = _ReplyReader(self._sock)
        self.connections += 1

    def _password(self) -> str | None:
        """Read anew for each connection, so that a rotated password is found."""
        path = self._config.password_file
        if path is None or self.address.password is not None:
            return self.address.password
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"password_file {path!r} cannot be read: {error}") from error


def _take(source: Iterator[Request], weight: int) -> list[Request]:
    """The next requests of together about `weight` bytes; none once `source` is exhausted."""
    taken: list[Request] = []
    for request in source:
        taken.append(request)
        weight -= request.weight
        if weight <= 0 or len(taken) >= _MAX_REQUESTS // 2:
            break
    return taken


class _ReplyReader:
    """Parses RESP2 replies off a socket, and receives values in place where it can."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._start = self._end = 0  # what has been received and not yet parsed
        self._tail = memoryview(bytearray(2))

    def read(self, request: Request) -> None:
        """Fill in the request's `reply` or `error`.

        Raises:
            OSError: the connection broke or stalled.
            _TransientError: the server says "not now".
        """
        if (
            request.into is not None
            and self._start == self._end
            and self._receive_expected(request.into)
        ):
            request.reply = len(request.into)
            return
        reply = self._parse(request.into)
        if isinstance(reply, ServerError):
            request.error = reply
        else:
            request.reply = reply

    def _receive_expected(self, into: memoryview) -> bool:
        """Receive a value of exactly `into`'s size without a copy.

        If the reply is another one, what has been received of it is kept for `_parse`, and the
        result is False.
        """
        expected = b"$%d\r\n" % len(into)
        head = memoryview(bytearray(len(expected)))
        got = 0
        while got < len(head):
            got += self._receive([head[got:], into, self._tail])
            if head[:got] != expected[:got]:
                received = b"".join((head, into, self._tail))[:got]
                self._buffer = memoryview(bytearray(max(received, bytes(_READ_SIZE), key=len)))
                self._buffer[: len(received)] = received
                self._start, self._end = 0, len(received)
                return False
        got -= len(head)
        while got < len(into):
            got += self._receive([into[got:], self._tail])
        while got < len(into) + 2:
            got += self._receive([self._tail[got - len(into) :]])
        return True

    def _parse(self, into: memoryview | None = None) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._bulk(int(rest), into)
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return _reply_error(rest.decode(errors="replace"))
        if kind == b"*":
            return [self._parse() for _ in range(int(rest))] if rest != b"-1" else None
        raise NotValkeyError(f"a reply begins with {line[:20]!r}: this is no Valkey")

    def _bulk(self, size: int, into: memoryview | None) -> Any:
        if size < 0:
            return None
        target = into if into is not None and len(into) == size else memoryview(bytearray(size))
        got = min(size, self._end - self._start)
        target[:got] = self._buffer[self._start : self._start + got]
        self._start += got
        while got < size:
            got += self._receive([target[got:]])
        while self._end - self._start < 2:
            self._fill()
        self._start += 2
        return size if target is into else target.obj

    def _line(self) -> bytes:
        while True:
            # Replies' first lines are short; errors' are the longest.
            line, found, _ = bytes(self._buffer[self._start : self._end]).partition(b"\r\n")
            if found:
                self._start += len(line) + 2
                return line
            self._fill()

    def _fill(self) -> None:
        """Receive more behind what has not been parsed yet."""
        left = self._end - self._start
        if self._end == len(self._buffer) or not left:
            if left == len(self._buffer):
                raise NotValkeyError("a reply's first line has no end")
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left
        self._end += self._receive([self._buffer[self._end :]])

    def _receive(self, buffers: list[memoryview]) -> int:
        count: int = self._sock.recvmsg_into(buffers)[0]
        if not count:
            raise ConnectionResetError("the server closed the connection")
        return count


# --- translation of errors ---


def _reply_error(text: str) -> ServerError:
    """The error for an error reply. Raises `_TransientError` for those that mean "not now"."""
    code = text.partition(" ")[0]
    if code in _TRANSIENT:
        raise _TransientError(text)
    if code == "OOM":
        return ServerFullError(text)
    if code in ("NOPERM", "NOAUTH", "WRONGPASS", "DENIED"):
        return ServerRefusedError(text)
    return ServerError(text)


def _connect_error(address: Address, error: client_errors.ValkeyError) -> Exception:
    """What `valkey.Connection.connect` failed with, in our terms."""
    if isinstance(error, client_errors.BusyLoadingError):
        return _TransientError(f"LOADING {error}")
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
    return ServerRefusedError(f"{address} refuses the connection: {error}")
