"""One connection to one server. valkey-py opens it; from then on this moves bytes itself.

valkey-py's own command path copies every value at least once and waits for each reply, which costs
most of the wire's speed. Here requests go out scatter-gather from the buffers they are given, many
ahead of their replies, and values are received right where they are wanted.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections import deque
from typing import Any

from ray_valkey_spill import __version__
from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
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
from ray_valkey_spill.protocol.roles import HELLO, QUESTIONS, Question, Role, hello_fields
from ray_valkey_spill.units import KIB, MIB, Buffer

__all__ = ["Connection"]

# Bytes under way before replies are waited for: at least two chunks, within bounds, and at first as
# much as fills the fastest wire for a round trip; `pacing` finds how much is needed. What is asked
# for and not yet read lies in the server's memory, and counts for its maxmemory, so the upper bound
# is also that of what one IO worker costs the server.
_CHUNKS_UNDER_WAY = 2
_SMALLEST_WINDOW, _SMALL_WINDOW = 256 * KIB, 1 * MIB
_LARGEST_WINDOW = 8 * MIB
_FASTEST_WIRE = 4e9  # bytes per second
# What is smaller does not show which way the data are going.
_DATA = 4 * KIB
# Seconds after which the round trip is looked at again, and how much longer it can have become.
_BETWEEN_LOOKS, _GROWTH = 1.0, 1.25
# Requests are gathered into one system call up to this many bytes, less than a chunk of the default
# size, and this many buffers, which is below Linux's IOV_MAX.
_BATCH = 448 * KIB
_MAX_PARTS = 1000
# `tcpi_min_rtt`, microseconds, in Linux's `struct tcp_info` (linux/tcp.h): how long the wire takes,
# where the latest round trip is also how busy both sides have been.
_TCP_MIN_RTT = slice(148, 152)
_MAX_REQUESTS = 300
_RESET = struct.pack("ii", 1, 0)  # struct linger
# Seconds without a single byte moving after which a server counts as stalled.
_STALL_TIMEOUT = 10.0
_SHORTEST_TIMEOUT = 1.0
# There are other Sentinels to ask, and what they do takes no time.
_SENTINEL_TIMEOUT = 0.5


class Connection:
    """An open connection, and the requests that were given to it and have no reply yet.

    For one thread at a time. After any error it is closed.

    Args:
        config: credentials, TLS, and how long chunks are.
        endpoint: the server.
        patience: seconds after which a server that does not answer may be given up.
        sentinel: whether it is a Sentinel, which has no databases, and may know no users.

    Attributes:
        waiting: in the order in which their replies will come.
        used: when something was last sent, by `time.monotonic()`.
        turn_began: since when its user has kept it from others, by the same.
        weight: bytes that these have under way.
        mode: "standalone", "cluster" or "sentinel".
        role: of the server when the connection was opened. Where a proxy does not know HELLO, one
            more exchange finds it out. A Sentinel has none.

    Raises:
        OSError, TransientError: another attempt may cure it.
        ServerRefusedError, NotValkeyError, ConfigError: it will not.
    """

    def __init__(
        self, config: Config, endpoint: Endpoint, patience: float, *, sentinel: bool = False
    ) -> None:
        self.endpoint = endpoint
        self.closed = False
        self.waiting: deque[Request] = deque()
        self.used = self.turn_began = time.monotonic()
        self._unsent: list[Request] = []
        self._unsent_length = self.weight = 0
        timeout = (
            _SENTINEL_TIMEOUT if sentinel else min(_STALL_TIMEOUT, max(_SHORTEST_TIMEOUT, patience))
        )
        self._client = dial(config, endpoint, timeout, sentinel)
        self._sock: Any = self._client._sock
        self._stream: Any = self._sock
        if config.address.tls:
            self._stream = tls.TlsSocket(self._sock)
        else:
            _have_kernel_time_out(self._sock, timeout)
        self._least_window = min(
            max(_SMALLEST_WINDOW, _CHUNKS_UNDER_WAY * config.chunk_size), _SMALL_WINDOW
        )
        # When a small request was sent alone, until its reply comes; the shortest time that one
        # took since the latest look at the round trip.
        self._asked_at: float | None = None
        self._shortest = self._round_trip = float("inf")
        self._begin_to_pace(self._least_window)
        self._replies = ReplyReader(self._stream)
        self._question: Question | None = None
        try:
            self.mode, self.role = self._hello(config)
            self._look_at_round_trip()
        except NotValkeyError as error:
            raise not_valkey(endpoint, error) from error
        except TooManyClientsError:
            raise
        except OSError as error:
            # With TLS 1.3 a server tells only now what it thinks of a client's certificate.
            raise tls.refusal(error, endpoint) or does_not_answer(error) from error

    def _hello(self, config: Config) -> tuple[str, Role]:
        hello = HELLO.ask()
        self.add(hello)
        if config.address.username is None:
            # Shown by CLIENT LIST. A user with few permissions may not set it, and the server would
            # note that in its ACL LOG each time.
            self.add(command("CLIENT", "SETINFO", "LIB-NAME", "ray-valkey-spill"))
            self.add(command("CLIENT", "SETINFO", "LIB-VER", __version__))
        while self.waiting:
            self.read()
        # A proxy may not know it, and what has one before it looks like a single server.
        mode = hello_fields(hello.reply).get("mode", "standalone")
        if mode == "sentinel":
            return mode, Role.UNKNOWN
        for question in QUESTIONS:
            role = question.role(hello.reply if question is HELLO else self._ask(question))
            if role is not Role.UNKNOWN:
                self._question = question
                return mode, role
        return mode, Role.UNKNOWN

    def current_role(self) -> Role:
        """Ask for the server's role again; everything sent before must have its reply.

        Errors as `read`.
        """
        if self._question is None:
            return Role.UNKNOWN
        return self._question.role(self._ask(self._question))

    def _ask(self, question: Question) -> Any:
        """The reply; None for an error."""
        request = question.ask()
        self.add(request)
        return self.read().reply

    def has_room(self, depth: int = 1) -> bool:
        """Whether more may be sent ahead of the replies to what is under way.

        With `depth`, that may be so many times as much as keeps the wire busy.
        """
        requests = len(self.waiting)
        is_batch_open = self._unsent_length > 0 and self._pacer is self._sending
        if is_batch_open or requests < _CHUNKS_UNDER_WAY:
            return True
        weight = self.weight + self._batch
        return weight <= depth * self._pacer.limit and requests <= _MAX_REQUESTS // 2

    def add(self, request: Request) -> None:
        """Take `request`, which is sent now, or together with those that follow.

        Raises:
            OSError: the connection broke.
            ProtocolError: the server refused what it was sent, and closed the connection.
        """
        self.waiting.append(request)
        self._unsent.append(request)
        self.weight += request.weight
        self._unsent_length += request.length
        if request.weight >= _DATA:
            self._pacer = self._receiving if request.is_received else self._sending
        if self._unsent_length >= self._batch or len(self._unsent) >= _MAX_REQUESTS // 2:
            self.flush()

    def flush(self) -> None:
        """Send all that was taken. Errors as `add`."""
        if self._unsent:
            parts = [part for request in self._unsent for part in request.parts]
            is_small = self._unsent_length < _DATA and len(self.waiting) == len(self._unsent)
            self._unsent, self._unsent_length = [], 0
            self.used = time.monotonic()
            self._asked_at = self.used if is_small else None
            if self.used - self._looked_at > _BETWEEN_LOOKS:
                self._look_at_round_trip()
            try:
                self._send(parts)
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
        """Raise what the server said about this connection before it closed it.

        What cannot be sent any more is found out before that has been read; Linux keeps it.
        """
        with contextlib.suppress(OSError):
            for request in self.waiting:
                # Requests without a reply are sent again, and must come to that as they are.
                self._replies.read(Request([], request.key))

    def read(self) -> Request:
        """Fill in the reply of the first request that waits, and return it.

        Raises:
            OSError: the connection broke.
            TransientError: the server cannot serve now.
            ProtocolError: as `add`.
            NotValkeyError: what it sends is no reply.
        """
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
            # Others of its addresses may be those of servers that do serve.
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
        """Note that a request is done; before its weight is taken off."""
        if self.weight + self._batch > self._pacer.limit:
            self._pacer.deliver(request.weight, time.monotonic())
        else:
            self._pacer.interrupt()

    @property
    def _batch(self) -> int:
        """Bytes that are gathered before they are sent."""
        return min(_BATCH, self._pacer.limit // 2)

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
        enough = int(min(self._round_trip * _FASTEST_WIRE, _LARGEST_WINDOW))
        start = max(enough, self._least_window)
        if not self._start / 2 < start < self._start * 2:
            self._begin_to_pace(start)

    def _begin_to_pace(self, start: int) -> None:
        """Look for the limits from `start` bytes on."""
        self._start = start
        self._looked_at = time.monotonic()
        self._sending = Pacer(self._least_window, _LARGEST_WINDOW, start)
        self._receiving = Pacer(self._least_window, _LARGEST_WINDOW, start)
        self._pacer = self._sending

    def close(self) -> None:
        """What has not left this machine yet is dropped too (by SO_LINGER), or it could be carried
        out after whatever is sent next.
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

    def _send(self, parts: list[Buffer]) -> None:
        while parts:
            try:
                sent = self._stream.sendmsg(parts[:_MAX_PARTS])
            except BlockingIOError:
                raise TimeoutError("it takes no more bytes") from None
            done = 0
            while done < len(parts) and sent >= len(parts[done]):
                sent -= len(parts[done])
                done += 1
            del parts[:done]
            if sent:
                parts[0] = memoryview(parts[0])[sent:]


def _have_kernel_time_out(sock: Any, seconds: float) -> None:
    """Give `sock` a timeout that costs nothing: Python's own costs a `poll` for every transfer."""
    interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _round_trip(sock: Any) -> float:
    """Seconds that a byte takes to `sock`'s peer and back; 0 if it is no TCP socket."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_MIN_RTT.stop)
    except OSError:
        return 0.0
    return int.from_bytes(info[_TCP_MIN_RTT], sys.byteorder) / 1e6
