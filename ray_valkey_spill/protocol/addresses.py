"""TCP connections to hosts with several addresses, where some may not answer.

An address that does not answer must not cost its timeout on every connection. So the dialer tries
the next address in parallel a moment later (RFC 8305, "happy eyeballs"), and starts with the one
that answered last.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections import deque
from typing import Any

__all__ = ["DIALER", "Dialer"]

# Seconds until the next address is tried in parallel (RFC 8305, section 8).
_STAGGER = 0.25


class Dialer:
    """Opens connections, and remembers which addresses answered. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By host and port. The lowest rank is tried first; unknown addresses have rank 0.
        self._ranks: dict[tuple[str, int], dict[Any, int]] = {}

    def dial(self, host: str, port: int, timeout: float) -> socket.socket:
        """Return a connected socket.

        Each address of the host has `timeout` seconds to answer.

        Raises:
            OSError: the name has no address, or no address answers (TimeoutError if time ran out).
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except ValueError:  # an empty label or one that is too long, for example
            raise socket.gaierror(socket.EAI_NONAME, "It is not a host name") from None
        ranks = self._ranks_of(host, port)
        found.sort(key=lambda info: ranks.get(info[4], 0))
        sock, address = _first_to_answer([(info[0], info[4]) for info in found], timeout)
        self._note(host, port, address, -1)
        return sock

    def avoid(self, host: str, port: int, address: Any) -> None:
        """Try `address` last from now on: it answers, but does not serve."""
        self._note(host, port, address, 1)

    def _ranks_of(self, host: str, port: int) -> dict[Any, int]:
        with self._lock:
            return dict(self._ranks.get((host, port), {}))

    def _note(self, host: str, port: int, address: Any, rank: int) -> None:
        with self._lock:
            ranks = self._ranks.setdefault((host, port), {})
            # At most one is first and one last: a name's old addresses must not accumulate.
            for other in [known for known, its in ranks.items() if its == rank]:
                del ranks[other]
            ranks[address] = rank


# Shared by the whole process.
DIALER = Dialer()


def _first_to_answer(addresses: list[tuple[int, Any]], timeout: float) -> tuple[socket.socket, Any]:
    """Return the first connection to any of `addresses`, pairs of family and socket address."""
    left = deque(addresses)
    deadline = time.monotonic() + timeout + _STAGGER * (len(left) - 1)
    next_start = float("-inf")
    failure: OSError = TimeoutError("timed out")
    with selectors.DefaultSelector() as trying:
        try:
            while left or trying.get_map():
                now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError("timed out")
                if left and (now >= next_start or not trying.get_map()):
                    family, address = left.popleft()
                    try:
                        sock = socket.socket(family, socket.SOCK_STREAM)
                    except OSError as error:  # a name has IPv6 addresses, and this host no IPv6
                        failure = error
                        continue
                    trying.register(sock, selectors.EVENT_WRITE, address)
                    sock.setblocking(False)
                    code = sock.connect_ex(address)
                    if code not in (0, errno.EINPROGRESS):
                        failure = _given_up(trying, sock, code)
                    next_start = now + _STAGGER
                    continue
                until = min(deadline, next_start) if left else deadline
                for key, _ in trying.select(until - now):
                    sock = key.fileobj  # type: ignore[assignment]
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        trying.unregister(sock)
                        return sock, key.data
                    failure = _given_up(trying, sock, code)
                    next_start = now
            raise failure
        finally:
            for key in [*trying.get_map().values()]:
                key.fileobj.close()  # type: ignore[union-attr]


def _given_up(trying: selectors.BaseSelector, sock: socket.socket, code: int) -> OSError:
    trying.unregister(sock)
    sock.close()
    return OSError(code, os.strerror(code))
