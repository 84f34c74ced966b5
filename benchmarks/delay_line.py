"""Distance on one machine: what is sent arrives a fixed time later, and as fast as it was sent.

A delay line is a process of its own. `proxy` forwards TCP connections. `link` joins two network
namespaces by IP packets, so that both ends' TCP sees the distance, with a rate limit on top; that
needs root, Linux's namespaces, tun devices and `tc tbf`.

The delay says how old bytes are when they arrive, and does not limit how many are on their way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from benchmarks.common import KIB
from benchmarks.serving import Process, serve

__all__ = ["Link", "link", "proxy"]

_PIECE = 256 * KIB

# Of linux/if_tun.h: a packet with the kernel's notes on checksum and segmentation before it, so
# that both kernels hand over 64 KiB at a time though the wire has packets of 1,500 bytes.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_LARGEST_PACKET = 64 * KIB + 128

ADDRESSES = "10.77.0.1", "10.77.0.2"
_BURST, _QUEUE = "256kb", "32mb"


def _carry(receive: Callable[[], bytes], send: Callable[[bytes], object], delay: float) -> None:
    """Send what is received `delay` seconds later, until nothing more comes. Starts two threads."""
    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def receiving() -> None:
        piece = b"begun"
        while piece:
            piece = b""
            with contextlib.suppress(OSError):  # the end, too
                piece = receive()
            under_way.put((time.monotonic() + delay, piece))

    def sending() -> None:
        piece = b"begun"
        while piece:
            due, piece = under_way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                send(piece)

    for work in (receiving, sending):
        threading.Thread(target=work, daemon=True).start()


class _DelayLine:
    """What the process does."""

    def listen(self, port: int, delay: float) -> int:
        """Forward connections to `port` of loopback; returns the port to connect to."""
        listener = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for source, target in ((client, server), (server, client)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _carry(_receiver(source), _sender(target), delay)

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    def join(self, delay: float) -> list[str]:
        """Forward packets between two new devices; returns their names. They end with this."""
        devices = [_tun(), _tun()]
        self._until_closed, until_closed = os.pipe()[::-1]
        for (_, source), (_, target) in (devices, devices[::-1]):
            # A process each: threads of one would wait for each other at this rate.
            if not os.fork():
                os.close(self._until_closed)
                _forward(source, target, delay, until_closed)
        return [name for name, _ in devices]


def _receiver(sock: socket.socket) -> Callable[[], bytes]:
    return lambda: sock.recv(_PIECE)


def _sender(sock: socket.socket) -> Callable[[bytes], object]:
    return lambda piece: sock.sendall(piece) if piece else sock.shutdown(socket.SHUT_WR)


def _forward(source: int, target: int, delay: float, until_closed: int) -> NoReturn:
    """Forward packets as long as the other end of the pipe `until_closed` is open."""
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        left = under_way[0][0] - time.monotonic() if under_way else None
        if left is None or left > 0:
            ready, _, _ = select.select([source, until_closed], [], [], left)
            if until_closed in ready:
                os._exit(0)
            if ready:
                try:
                    packet = os.read(source, _LARGEST_PACKET)
                except OSError:
                    time.sleep(0.01)  # the device is not up yet
                else:
                    under_way.append((time.monotonic() + delay, packet))
                continue
        # What cannot be delivered is lost, as on any wire.
        with contextlib.suppress(OSError):
            os.write(target, under_way.popleft()[1])


def _tun() -> tuple[str, int]:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"rvs%d", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    name = fcntl.ioctl(device, _TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return name, device


# --- a proxy ---


@contextlib.contextmanager
def proxy(ports: Sequence[int], delay: float) -> Iterator[list[int]]:
    """Ports of loopback that lead to `ports`, `delay` seconds away in each direction."""
    with _process() as process:
        yield [process.ask("listen", port=port, delay=delay) for port in ports]


# --- a link between two namespaces ---


@dataclass(frozen=True)
class Link:
    """Two network namespaces, and the wire between them.

    Attributes:
        commands: what runs a command in the first one, and in the second.
    """

    commands: tuple[list[str], list[str]]
    _devices: list[str]

    def limit(self, bits_per_second: float) -> None:
        """Limit the rate of each direction."""
        for command, device in zip(self.commands, self._devices):
            rate = f"{bits_per_second:.0f}bit"
            limit = ["tbf", "rate", rate, "burst", _BURST, "limit", _QUEUE]
            _run([*command, "tc", "qdisc", "replace", "dev", device, "root", *limit])


@contextlib.contextmanager
def link(delay: float) -> Iterator[Link]:
    """Two namespaces that have `ADDRESSES`, `delay` seconds from each other.

    Raises:
        OSError, subprocess.CalledProcessError: this machine, or its user, cannot have it.
    """
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_process())
        devices = process.ask("join", delay=delay)
        commands = []
        for device, ours, theirs in zip(devices, ADDRESSES, reversed(ADDRESSES)):
            holder = stack.enter_context(_namespace())
            command = ["nsenter", f"--net=/proc/{holder}/ns/net"]
            _run(["ip", "link", "set", device, "netns", str(holder)])
            _run([*command, "ip", "address", "add", ours, "peer", theirs, "dev", device])
            _run([*command, "ip", "link", "set", device, "up"])
            _run([*command, "ip", "link", "set", "lo", "up"])
            commands.append(command)
        yield Link((commands[0], commands[1]), devices)


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """The id of a process that keeps a network namespace, which ends with it."""
    # It ends when its input does, so also if this process is killed.
    command = ["unshare", "--net", "sh", "-c", "echo && exec cat"]
    holder: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if not holder.stdout.readline():
            raise OSError("unshare makes no network namespace")
        yield holder.pid
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()


def _process() -> Process:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return Process([sys.executable, "-m", "benchmarks.delay_line"], {"PYTHONPATH": root})


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    serve(_DelayLine())
