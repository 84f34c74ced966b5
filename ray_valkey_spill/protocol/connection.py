"""One connection to one server. valkey-py opens it; from then on this module does the I/O.

valkey-py's command path copies every value at least once and waits for each reply, which costs
most of the wire's speed. This module sends requests scatter-gather from the caller's buffers, many
ahead of their replies, and receives values directly into their destination.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections import deque
from typing import Any

from ray_valkey_spill import __version__
from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
    ClosedAtHelloError,
    ConnectionBrokenError,
    NotValkeyError,
    TooManyClientsError,
    TransientError,
)
from ray_valkey_spill.protocol import tls
from ray_valkey_spill.protocol.addresses import DIALER
from ray_valkey_spill.protocol.dial import dial, does_not_answer, not_valkey
from ray_valkey_spill.protocol.pacing import Pacer
from ray_valkey_spill.protocol.resp import ReplyReader, Request, command
from ray_valkey_spill.protocol.roles import (
    HELLO,
    INFO,
    ROLE,
    Question,
    Role,
    hello_fields,
    info_fields,
)
from ray_valkey_spill.protocol.server_info import mode_of
from ray_valkey_spill.units import KIB, MIB, Buffer

__all__ = ["LARGEST_WINDOW", "SMALLEST_WINDOW", "SMALL_WINDOW", "STALL_TIMEOUT", "Connection"]

# The window: bytes under way before the connection waits for replies. It holds at least two chunks,
# within bounds. It starts with what fills the fastest wire for a round trip; `pacing` adjusts it.
# Replies not yet read occupy the server's memory and count for its maxmemory, so the upper bound
# also limits what one IO worker costs a server.
_CHUNKS_UNDER_WAY = 2
SMALLEST_WINDOW, SMALL_WINDOW = 256 * KIB, 1 * MIB
LARGEST_WINDOW = 8 * MIB
_FASTEST_WIRE = 4e9  # bytes per second
# Bytes; a smaller request does not show the direction of the data.
_DATA = 4 * KIB
# Seconds after which the round trip is looked at again, and how much longer it can have become.
_BETWEEN_LOOKS, _GROWTH = 1.0, 1.25
# Requests are gathered into one system call up to this many bytes, less than a chunk of the default
# size, and this many buffers, which is below Linux's IOV_MAX.
_BATCH = 448 * KIB
_MAX_PARTS = 1000
# `tcpi_min_rtt`, microseconds, in Linux's `struct tcp_info` (linux/tcp.h). It measures the wire
# alone; the latest round trip also includes how busy both sides have been.
_TCP_MIN_RTT = slice(148, 152)
_MAX_REQUESTS = 300
_RESET = struct.pack("ii", 1, 0)  # struct linger
# Seconds without a single byte moving after which a server counts as stalled.
STALL_TIMEOUT = 10.0
_SHORTEST_TIMEOUT = 1.0
# Seconds. Other Sentinels can be asked instead, and their replies take no time.
_SENTINEL_TIMEOUT = 0.5


class Connection:
    """An open connection, and its requests that have no reply yet.

    Not thread-safe. Any error closes it.

    Args:
        config: credentials, TLS and chunk size.
        endpoint: the server.
        patience: seconds to wait for a silent server, within 1 and 10 s. A Sentinel gets 0.5 s.
        sentinel: whether the server is a Sentinel, which has no databases and may have no users.
        plain: whether to send neither HELLO nor CLIENT nor ROLE, but INFO alone.

    Attributes:
        waiting: requests without a reply, in the order in which their replies will come.
        used: time of the latest send, by `time.monotonic()`.
        turn_began: time since which its user has kept it from other clients, by the same clock.
        weight: bytes that the waiting requests have under way.
        mode: "standalone", "cluster" or "sentinel".
        knows_hello: whether HELLO is answered. Some proxies and services do not know it. False for
            a plain connection.
        role: role of the server when the connection was opened. It costs one more exchange where
            HELLO is not known. A Sentinel has none.

    Raises:
        ClosedAtHelloError: a plain connection may be possible.
        OSError, TransientError: another attempt may succeed.
        ServerRefusedError, NotValkeyError, ConfigError: another attempt will fail too.
    """

    def __init__(
        self,
        config: Config,
        endpoint: Endpoint,
        patience: float,
        *,
        sentinel: bool = False,
        plain: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self.closed = False
        self.waiting: deque[Request] = deque()
        self.used = self.turn_began = time.monotonic()
        self._unsent: list[Request] = []
        self._unsent_length = self.weight = 0
        timeout = (
            _SENTINEL_TIMEOUT if sentinel else min(STALL_TIMEOUT, max(_SHORTEST_TIMEOUT, patience))
        )
        self._client = dial(config, endpoint, timeout, sentinel)
        self._sock: Any = self._client._sock
        self._stream: Any = self._sock
        self._readable = select.poll()
        self._readable.register(self, select.POLLIN)
        if config.address.tls:
            self._stream = tls.TlsSocket(self._sock)
        else:
            _have_kernel_time_out(self._sock, timeout)
        self._least_window = min(
            max(SMALLEST_WINDOW, _CHUNKS_UNDER_WAY * config.chunk_size), SMALL_WINDOW
        )
        # When a small request was sent alone, until its reply comes; the shortest time that one
        # took since the latest look at the round trip.
        self._asked_at: float | None = None
        self._looked_at = self.used
        self._shortest = self._round_trip = float("inf")
        self._begin_to_pace(self._least_window)
        self._replies = ReplyReader(self._stream)
        self._question: Question | None = None
        try:
            self.mode, self.role = self._plain_hello() if plain else self._hello(config)
            self._look_at_round_trip()
        except NotValkeyError as error:
            raise not_valkey(endpoint, error) from error
        except TooManyClientsError:
            raise
        except OSError as error:
            # With TLS 1.3 a server rejects a client's certificate only now.
            if (refusal := tls.refusal(error, endpoint)) is not None:
                raise refusal from error
            failure = does_not_answer(error)
            is_closed = isinstance(error, ConnectionBrokenError)
            raise (ClosedAtHelloError(*failure.args) if is_closed else failure) from error

    def _hello(self, config: Config) -> tuple[str, Role]:
        hello = HELLO.ask()
        self.add(hello)
        if config.address.username is None:
            # CLIENT LIST shows it. A user with few permissions may not set it, and the server would
            # add each attempt to its ACL LOG.
            self.add(command("CLIENT", "SETINFO", "LIB-NAME", "ray-valkey-spill"))
            self.add(command("CLIENT", "SETINFO", "LIB-VER", __version__))
        while self.waiting:
            self.read()
        replies = {HELLO: hello.reply}
        mode = hello_fields(hello.reply).get("mode")
        self.knows_hello = mode is not None
        if mode is None:
            replies[INFO] = self._ask(INFO)
            mode = mode_of(info_fields(replies[INFO]))
        if mode == "sentinel":
            return mode, Role.UNKNOWN
        for question in (HELLO, INFO, ROLE):
            reply = replies[question] if question in replies else self._ask(question)
            role = question.role(reply)
            if role is not Role.UNKNOWN:
                self._question = question
                return mode, role
        return mode, Role.UNKNOWN

    def _plain_hello(self) -> tuple[str, Role]:
        self.knows_hello = False
        self._question = INFO
        reply = self._ask(INFO)
        return mode_of(info_fields(reply)), INFO.role(reply)

    def current_role(self) -> Role:
        """Ask for the server's role again. Every request sent before must have its reply.

        Errors as `read`.
        """
        if self._question is None:
            return Role.UNKNOWN
        return self._question.role(self._ask(self._question))

    def _ask(self, question: Question) -> Any:
        """Return the reply; None for an error."""
        request = question.ask()
        self.add(request)
        return self.read().reply

    def has_room(self, request: Request, depth: int = 1) -> bool:
        """Whether the connection takes `request` ahead of the replies it waits for.

        It takes up to `depth` times the bytes that keep the wire busy. Once it is full, it takes
        the next requests only when there is room for a batch, to send them together.
        """
        requests = len(self.waiting)
        is_batch_open = self._unsent_length > 0
        if requests < _CHUNKS_UNDER_WAY or (is_batch_open and self._pacer is self._sending):
            return True
        weight = self.weight + (request.weight if is_batch_open else self._batch)
        return weight <= depth * self._pacer.limit and requests <= _MAX_REQUESTS // 2

    def add(self, request: Request) -> None:
        """Take `request`, and send it now or together with those that follow.

        Raises:
            OSError: the connection broke.
            ProtocolError: the server refused the form of a request, and closed the connection.
        """
        self.waiting.append(request)
        self._unsent.append(request)
        self.weight += request.weight
        self._unsent_length += request.length
        if request.weight >= _DATA:
            pacer = self._receiving if request.is_received else self._sending
            if pacer is not self._pacer:
                self._pace_by(pacer)
        is_enough = self._unsent_length >= self._batch or len(self._unsent) >= _MAX_REQUESTS // 2
        if is_enough or request.urgent:
            self.flush()

    def flush(self) -> None:
        """Send all requests taken so far. Errors as `add`."""
        if self._unsent:
            parts = [part for request in self._unsent for part in request.parts]
            is_small = self._unsent_length < _DATA and len(self.waiting) == len(self._unsent)
            length = self._unsent_length
            self._unsent, self._unsent_length = [], 0
            self.used = time.monotonic()
            self._asked_at = self.used if is_small else None
            if self.used - self._looked_at > _BETWEEN_LOOKS:
                self._look_at_round_trip()
            try:
                self._send(parts, length)
            except TimeoutError:
                self.close()
                raise
            except OSError as error:
                try:
                    self._raise_last_words()
                finally:
                    self.close()
                raise ConnectionBrokenError(str(error)) from error
            except BaseException:
                self.close()
                raise

    def _raise_last_words(self) -> None:
        """Raise the error that the server sent before it closed the connection, if there is one.

        A send fails before that error has been read; Linux still delivers it.
        """
        with contextlib.suppress(OSError):
            for request in self.waiting:
                # A request without a reply is sent again, and must stay unchanged until then.
                self._replies.read(Request([], request.key))

    def read(self) -> Request:
        """Receive the reply to the first waiting request, and return that request.

        Raises:
            OSError: the connection broke.
            TransientError: the server cannot serve now.
            ProtocolError: as `add`.
            NotValkeyError: the server sent something other than a reply.
        """
        if self._unsent:
            self.flush()
        request = self.waiting[0]
        try:
            self._replies.read(request)
        except (TimeoutError, TooManyClientsError):
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ConnectionBrokenError(str(error)) from error
        except TransientError:
            # The host's other addresses may belong to servers that do serve.
            self._avoid()
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        self.waiting.popleft()
        if self._asked_at is not None:
            if request.weight < _DATA:
                self._shortest = min(self._shortest, time.monotonic() - self._asked_at)
            self._asked_at = None
        self._pace(request)
        self.weight -= request.weight
        return request

    def _pace(self, request: Request) -> None:
        """Record that a request is done. Must run before its weight is subtracted."""
        pacer = self._pacer
        limit = pacer.limit
        if self.weight + self._batch > limit:
            pacer.deliver(request.weight, time.monotonic())
            if pacer.limit != limit:
                self._pace_by(pacer)
        else:
            pacer.interrupt()

    def _pace_by(self, pacer: Pacer) -> None:
        """Use a limit, or follow its change."""
        self._pacer = pacer
        # Bytes to gather before a send.
        self._batch = min(_BATCH, pacer.limit // 2)

    def _look_at_round_trip(self) -> None:
        """Begin anew to look for the limits if the server is much nearer or farther than before.

        TCP knows how far its peer is, which may be a proxy beside this process. So what an exchange
        takes counts, too. A busy machine makes it longer, so it is believed to grow only slowly.
        """
        self._looked_at = time.monotonic()
        found = max(_round_trip(self._sock), self._shortest)
        self._shortest = float("inf")
        if found < float("inf"):
            self._round_trip = min(found, self._round_trip * _GROWTH)
        enough = int(min(self._round_trip * _FASTEST_WIRE, LARGEST_WINDOW))
        start = max(enough, self._least_window)
        if not self._start / 2 < start < self._start * 2:
            self._begin_to_pace(start)

    def _begin_to_pace(self, start: int) -> None:
        """Look for the limits from `start` bytes on."""
        self._start = start
        self._sending = Pacer(self._least_window, LARGEST_WINDOW, start)
        self._receiving = Pacer(self._least_window, LARGEST_WINDOW, start)
        self._pace_by(self._sending)

    def close(self) -> None:
        """Close the connection, and drop its waiting requests.

        SO_LINGER also drops bytes that have not left this machine yet: the server could otherwise
        execute them after requests sent later over another connection.
        """
        if not self.closed:
            self.closed = True
            if self.waiting:
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.waiting.clear()
            self.weight = 0
            self._unsent = []
            self._client.disconnect()

    def _avoid(self) -> None:
        if not self.endpoint.path:
            with contextlib.suppress(OSError):
                DIALER.avoid(self.endpoint.host, self.endpoint.port, self._sock.getpeername())

    def fileno(self) -> int:
        return int(self._sock.fileno())

    def is_readable(self) -> bool:
        """Whether the server has sent something that was not read, or closed the connection."""
        return bool(self._readable.poll(0))

    def _send(self, parts: list[Buffer], length: int) -> None:
        while length:
            try:
                sent = self._stream.sendmsg(parts[:_MAX_PARTS])
            except BlockingIOError:
                raise TimeoutError("it takes no more bytes") from None
            length -= sent
            if not length:
                return
            done = 0
            while done < len(parts) and sent >= len(parts[done]):
                sent -= len(parts[done])
                done += 1
            del parts[:done]
            if sent:
                parts[0] = memoryview(parts[0])[sent:]


def _have_kernel_time_out(sock: Any, seconds: float) -> None:
    """Set the kernel's timeouts on `sock`: Python's own costs a `poll` for every transfer."""
    interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _round_trip(sock: Any) -> float:
    """Return the round trip to `sock`'s peer, in seconds; 0 if it is not a TCP socket."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_MIN_RTT.stop)
    except OSError:
        return 0.0
    return int.from_bytes(info[_TCP_MIN_RTT], sys.byteorder) / 1e6
