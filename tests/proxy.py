"""A TCP proxy between a client and a server that does what networks do: cut, stall, lose bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator


class Proxy:
    """Forwards to `port` on loopback; counts what passes.

    Attributes:
        cut_after: close a connection once it has carried this many bytes to the client (set to
            None after it has happened once).
        cut_after_sent: the same for bytes to the server.
        refuse_after_sent: the same, and from then on `refusing`.
        throttle: seconds that every 64 KiB to the server take longer.
        refusing: while True new connections are closed at once.
        connections: how many there have been.
        round_trips: how many times the client spoke after the server had.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_after: int | None = None
        self.cut_after_sent: int | None = None
        self.refuse_after_sent: int | None = None
        self.throttle = 0.0
        self.refusing = False
        self.connections = 0
        self.round_trips = 0
        self.bytes_to_server = 0
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    def forward_to(self, port: int) -> None:
        """Connect to another server from the next connection on."""
        self._upstream = port

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Reset every connection there is."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.flow()
        # Closing alone would leave accept() waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refusing:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self._upstream))
                except OSError:
                    client.close()
                    continue
                self.connections += 1
                self._sockets |= {client, server}
                for source, target, note in (
                    (client, server, self._note_request),
                    (server, client, self._note_reply),
                ):
                    thread = threading.Thread(target=self._pump, args=(source, target, note))
                    self._threads.append(thread)
                    thread.start()

    def _pump(
        self, source: socket.socket, target: socket.socket, note: Callable[[int], int]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if note == self._note_reply:
                    self._flowing.wait()
                elif self.throttle:
                    time.sleep(self.throttle)
                allowed = note(len(data))
                target.sendall(data[:allowed])
                if allowed < len(data):
                    break
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        source.close()
        self._sockets.discard(source)

    _last_was_reply = True

    def _note_request(self, size: int) -> int:
        self.round_trips += self._last_was_reply
        self._last_was_reply = False
        self.bytes_to_server += size
        allowed = self._allowed("refuse_after_sent", size)
        self.refusing |= allowed < size
        return min(allowed, self._allowed("cut_after_sent", size))

    def _note_reply(self, size: int) -> int:
        self._last_was_reply = True
        return self._allowed("cut_after", size)

    def _allowed(self, limit: str, size: int) -> int:
        left: int | None = getattr(self, limit)
        if left is None:
            return size
        setattr(self, limit, left - size if size <= left else None)
        return min(size, left)


@contextlib.contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
