"""SETs and GETs of chunks over one socket, as fast as Python's socket allows: the limit of a wire.

`python -m benchmarks.raw_loop HOST PORT` serves it as a process, which can be run elsewhere.
"""

from __future__ import annotations

import random
import socket
import sys
import time

from benchmarks.serving import serve

__all__ = ["WINDOW", "RawLoop"]

WINDOW = 8


class RawLoop:
    """Moves chunks over a connection, `window` of them under way."""

    def __init__(self, sock: socket.socket, window: int = WINDOW) -> None:
        self._sock = sock
        self._window = window

    def store(self, values: list[memoryview], keys: list[bytes]) -> None:
        outstanding = 0
        for key, value in zip(keys, values):
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            self._send_all([memoryview(head), value, memoryview(b"\r\n")])
            outstanding += len(b"+OK\r\n")
            while outstanding > self._window * 5:
                outstanding -= len(self._sock.recv(65536))
        while outstanding:
            outstanding -= len(self._sock.recv(65536))

    def fetch(self, targets: list[memoryview], keys: list[bytes]) -> None:
        requests = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]
        self._sock.sendall(b"".join(requests[: self._window]))
        tail = memoryview(bytearray(2))
        for number, target in enumerate(targets):
            head = memoryview(bytearray(len(b"$%d\r\n" % len(target))))
            parts = [head, target, tail]
            while parts:
                got = self._sock.recvmsg_into(parts)[0]
                while parts and got >= len(parts[0]):
                    got -= len(parts.pop(0))
                if got:
                    parts[0] = parts[0][got:]
            if number + self._window < len(requests):
                self._sock.sendall(requests[number + self._window])

    def _send_all(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self._sock.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]


class _Served:
    """One connection, which is used by loops of several windows."""

    def __init__(self, host: str, port: int) -> None:
        self._sock = socket.create_connection((host, port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = memoryview(b"")

    def open(self, size: int, chunk: int) -> None:
        """Store and fetch `size` bytes in chunks of `chunk`, from now on."""
        self._data = memoryview(random.Random(0).randbytes(size))
        target = memoryview(bytearray(size))
        starts = range(0, size, chunk)
        self._values = [self._data[start : start + chunk] for start in starts]
        self._targets = [target[start : start + chunk] for start in starts]
        self._keys = [b"raw:%d" % start for start in starts]

    def store(self, window: int) -> float:
        start = time.perf_counter()
        RawLoop(self._sock, window).store(self._values, self._keys)
        return time.perf_counter() - start

    def fetch(self, window: int) -> float:
        start = time.perf_counter()
        RawLoop(self._sock, window).fetch(self._targets, self._keys)
        return time.perf_counter() - start

    def delete(self) -> None:
        self._sock.sendall(b"UNLINK %b\r\n" % b" ".join(self._keys))
        while not self._sock.recv(65536).endswith(b"\r\n"):
            pass


if __name__ == "__main__":
    serve(_Served(sys.argv[1], int(sys.argv[2])))
