"""A TCP proxy between a client and a server that does what networks do: cut, stall, trickle, …

It knows the commands that clients send, so that a test can interfere between any two of them.

And a listener that is no Valkey.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from support.servers import PATIENCE

_PIECE = 1 << 16
_HEAD = re.compile(rb"\*(\d+)\r\n\$(\d+)\r\n([^\r]+)\r\n")
_ARGUMENT = re.compile(rb"\$(\d+)\r\n")
_RESET = struct.pack("ii", 1, 0)  # struct linger


class Hold:
    """A command that is kept back, with all that the same client sends after it."""

    def __init__(self) -> None:
        self._reached, self._ended = threading.Event(), threading.Event()
        self._is_cut = False

    @property
    def is_reached(self) -> bool:
        """Whether the command has come. Those before it are on their way to the server by then."""
        return self._reached.is_set()

    def wait(self) -> None:
        """Wait until the command has come."""
        assert self._reached.wait(timeout=PATIENCE), "the command never came"

    def release(self) -> None:
        """Let it through, and all after it."""
        self._ended.set()

    def cut(self) -> None:
        """Drop it, and all after it, and reset the connection."""
        self._is_cut = True
        self._ended.set()

    def __call__(self) -> bool:
        self._reached.set()
        self._ended.wait()
        return not self._is_cut


class _Trap:
    """Springs once, before one command or in it; see `Proxy.before`."""

    def __init__(self, act: Callable[[], object], command: bytes, number: int, within: int) -> None:
        self.act = act
        self.within = within
        self._command = command
        self._left = number

    def is_sprung_by(self, command: bytes) -> bool:
        if self._command in (b"", command):
            self._left -= 1
        return self._left == 0


class _Commands:
    """Finds the commands in what one client sends; what is none, as under TLS, passes as it is.

    Args:
        begun: is given the name of each command that begins. Where it returns a number, what comes
            after so many bytes of the command is a piece of its own.
    """

    def __init__(self, begun: Callable[[bytes], int | None]) -> None:
        self._begun = begun
        self._unread = b""
        self._arguments = 0  # of the command, that are still to come
        self._bytes = 0  # of the argument, likewise
        self._is_opaque = False

    def pieces(self, data: bytes) -> list[bytes]:
        """`data`, cut before what `begun` wants apart; a head that is not whole waits for more."""
        data, self._unread = self._unread + data, b""
        pieces: list[bytes] = []
        start = at = 0
        while at < len(data) and not self._is_opaque:
            if self._bytes:
                passed = min(self._bytes, len(data) - at)
                self._bytes -= passed
                at += passed
                continue
            match = (_ARGUMENT if self._arguments else _HEAD).match(data, at)
            if match is None:
                self._is_opaque = data[at : at + 1] != (b"$" if self._arguments else b"*")
                break
            if self._arguments:
                self._arguments -= 1
                self._bytes = int(match[1]) + len(b"\r\n")
            else:
                self._arguments = int(match[1]) - 1
                within = self._begun(match[3].upper())
                if within is not None:
                    pieces.append(data[start : at + within])
                    start = at + within
            at = match.end()
        if self._is_opaque:
            at = len(data)
        self._unread = data[at:]
        return [*pieces, data[start:at]]


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
        stalled: pieces that have had to wait because nothing was let through.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.piece = _PIECE
        self.reset_after: int | None = None
        self.refuse_after: int | None = None
        self.most: int | None = None
        self.replaced: dict[bytes, bytes] = {}
        self.bytes = 0
        self.stalled = 0
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
        self.stalled += not self._flowing.is_set()
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
        unknown: the names of commands at which the connection is reset.
        connections: how many there have been.
        refused: how many there would have been, but for `refusing` or a server that was away.
        round_trips: how many times a client spoke after it had heard of the server.
        commands: the names of those that clients have sent.
        swallowed: bytes that came over forgotten connections.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.to_server, self.to_client = Way(), Way()
        self.refusing = False
        self.unknown: frozenset[bytes] = frozenset()
        self.connections = self.refused = 0
        self.round_trips = 0
        self.commands: list[bytes] = []
        self._trap: _Trap | None = None
        self._holds: list[Hold] = []
        self._last_way: Way | None = None
        self.swallowed = 0
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self._forgotten: set[tuple[socket.socket, socket.socket]] = set()
        self._threads: set[threading.Thread] = set()
        self._acceptor = self._start(self._accept)

    def forget(self) -> None:
        """Pass nothing on of the connections there are, as a NAT that has forgotten them.

        Neither end learns of it. New connections work.
        """
        self._forgotten |= self._open

    def before(
        self, act: Callable[[], object], command: bytes = b"", number: int = 1, within: int = 0
    ) -> None:
        """Call `act` before a command is passed on, and cut its connection if that returns False.

        Args:
            act: is called once, in the thread that passes on what this client sends.
            command: the name; empty for any.
            number: which of those that clients send from now on.
            within: how many bytes of the command are passed on before, of its first ones.
        """
        self._trap = _Trap(act, command, number, within)

    def hold(self, command: bytes = b"", number: int = 1, within: int = 0) -> Hold:
        """Keep a command back, given as to `before`, until that is released or cut."""
        hold = Hold()
        self._holds.append(hold)
        self.before(hold, command, number, within)
        return hold

    def disarm(self) -> None:
        """Do nothing before any command."""
        self._trap = None

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
        self.disarm()
        for hold in self._holds:
            hold.cut()
        self.flow()
        # Closing alone would leave accept() waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        # It starts the others, so there are no new ones from then on.
        self._acceptor.join()
        self._listener.close()
        self.reset()
        for thread in list(self._threads):
            thread.join()

    def _start(self, run: Callable[..., None], *args: object) -> threading.Thread:
        def work() -> None:
            with contextlib.suppress(OSError):
                run(*args)
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=work)
        self._threads.add(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self.refusing:
                self.refused += 1
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                self.refused += 1
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
        traps: list[_Trap] = []

        def begun(command: bytes) -> int | None:
            self.commands.append(command)
            if command in self.unknown:
                traps.append(_Trap(lambda: False, command, number=1, within=0))
                return 0
            trap = self._trap
            if trap is None or not trap.is_sprung_by(command):
                return None
            self._trap = None
            traps.append(trap)
            return trap.within

        commands = _Commands(begun)
        try:
            while data := source.recv(way.piece):
                if ends in self._forgotten:
                    self.swallowed += len(data)
                    continue
                if to_server:
                    self.round_trips += self._last_way is not way
                    self._last_way = way
                for word, other in way.replaced.items():
                    data = data.replace(word, other)
                first, *others = commands.pieces(data) if to_server else [data]
                for piece, trap in [(first, None), *zip(others, traps)]:
                    if trap is not None and trap.act() is False:
                        _reset(*ends)
                        return
                    allowed, refuse = way.pass_on(len(piece)) if piece else (0, False)
                    self.refusing |= refuse
                    if not to_server:
                        self._last_way = way
                    target.sendall(piece[:allowed])
                    carried += allowed
                    if allowed < len(piece) or (way.most is not None and carried > way.most):
                        _reset(*ends)
                        return
                traps.clear()
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
