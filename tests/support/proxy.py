"""A TCP proxy between a client and a server that does what networks do: cut, stall, trickle, …

And a listener that is no Valkey.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

_PIECE = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # struct linger


class Way:
    """One direction of all connections, and what is done to the bytes that go it.

    Attributes:
        delay: seconds that every piece takes longer.
        piece: bytes that are forwarded at a time, at most.
        reset_after: reset the connection that carries the byte after this many, once.
        refuse_after: the same, and have the proxy refuse new connections from then on.
        most: reset each connection that carries more bytes than this.
        replaced: what stands for other bytes of the same length, as far as these come in one piece:
            a command whose name is replaced is one that the server does not know.
        bytes: how many went this way.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.piece = _PIECE
        self.reset_after: int | None = None
        self.refuse_after: int | None = None
        self.most: int | None = None
        self.replaced: dict[bytes, bytes] = {}
        self.bytes = 0
        self._flowing = threading.Event()
        self._flowing.set()

    def stall(self) -> None:
        """Let nothing through, and break nothing."""
        self._flowing.clear()

    def flow(self) -> None:
        """Let everything through again, as fast as it comes."""
        self.delay, self.piece = 0.0, _PIECE
        self._flowing.set()

    def pass_on(self, size: int) -> tuple[int, bool]:
        """Take the time that `size` bytes take; how many get through, and whether to refuse."""
        self._flowing.wait()
        if self.delay:
            time.sleep(self.delay)
        refused = self._allowed("refuse_after", size)
        allowed = min(refused, self._allowed("reset_after", size))
        self.bytes += allowed
        return allowed, refused < size

    def _allowed(self, limit: str, size: int) -> int:
        left: int | None = getattr(self, limit)
        if left is None:
            return size
        setattr(self, limit, left - size if size <= left else None)
        return min(size, left)


class Proxy:
    """Forwards connections to `port` on loopback.

    Attributes:
        to_server, to_client: what happens to the bytes of all connections.
        refusing: while True new connections are closed at once.
        connections: how many there have been.
        round_trips: how many times a client spoke after the server had.
        swallowed: bytes that came over forgotten connections.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.to_server, self.to_client = Way(), Way()
        self.refusing = False
        self.connections = 0
        self.round_trips = 0
        self._last_way: Way | None = None
        self.swallowed = 0
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self._forgotten: set[tuple[socket.socket, socket.socket]] = set()
        self._threads: set[threading.Thread] = set()
        self._start(self._accept)

    def forget(self) -> None:
        """Pass nothing on of the connections there are, as a NAT that has forgotten them.

        Neither end learns of it. New connections work.
        """
        self._forgotten |= self._open

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        return len(self._open)

    def forward_to(self, port: int) -> None:
        """Connect to another server from the next connection on."""
        self._upstream = port

    def stall(self) -> None:
        self.to_server.stall()
        self.to_client.stall()

    def flow(self) -> None:
        self.to_server.flow()
        self.to_client.flow()

    def reset(self) -> None:
        """Reset every connection there is."""
        for client, server in list(self._open):
            _reset(client, server)

    def close(self) -> None:
        self.flow()
        # Closing alone would leave accept() waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
        for thread in list(self._threads):
            thread.join()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        def work() -> None:
            with contextlib.suppress(OSError):
                run(*args)
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=work)
        self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
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
            self._open.add((client, server))
            self._start(self._pump, client, server, self.to_server)
            self._start(self._pump, server, client, self.to_client)

    def _pump(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        to_server = way is self.to_server
        ends = (source, target) if to_server else (target, source)
        carried = 0
        try:
            while data := source.recv(way.piece):
                if ends in self._forgotten:
                    self.swallowed += len(data)
                    continue
                self.round_trips += to_server and self._last_way is not way
                self._last_way = way
                for word, other in way.replaced.items():
                    data = data.replace(word, other)
                allowed, refuse = way.pass_on(len(data))
                self.refusing |= refuse
                target.sendall(data[:allowed])
                carried += allowed
                if allowed < len(data) or (way.most is not None and carried > way.most):
                    _reset(*ends)
                    break
        except OSError:
            pass
        finally:
            self._open.discard(ends)
            if source.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_RESET)) != _RESET:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
            source.close()


def _reset(client: socket.socket, server: socket.socket) -> None:
    """Have the threads that read from these wake up and close them, the client's by a reset."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        client.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


@contextlib.contextmanager
def answering(reply: bytes, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The url of a listener that answers whatever comes with `reply`, and closes."""
    with socket.create_server((host, port)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"valkey://{host}:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
