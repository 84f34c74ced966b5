"""Data that version 0.1 has written, as they were on its server and in its overflow."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.cli import cli_runner
from support.clock import Clock
from support.samples import METADATA, noise, object_id
from support.servers import Server
from support.stores import Store

from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import Config
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.cleanup import CleanUp

SAMPLES = json.loads((Path(__file__).parent / "data" / "version_0_1.json").read_text())
# The objects of each sample, in the order of their ids.
DATA = {"inline": bytes(range(100)), "compressed": bytes(9000), "raw": noise(5000, 1), "empty": b""}


class Left:
    """A sample, put on a server and into an overflow."""

    def __init__(self, kind: str, server: Server, directory: Path) -> None:
        sample: Mapping[str, Any] = SAMPLES["kinds"][kind]
        self.urls: dict[str, str] = sample["urls"]
        self.client = server.client
        self.overflow = directory / "overflow"
        self.params: dict[str, Any] = {"url": server.url}
        for key, value in sample["keys"].items():
            self._write(key, value)
        for name, content in sample["files"].items():
            path = self.overflow / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        if kind == "overflow":
            self.params["overflow_uri"] = self.overflow.as_uri()
        if kind == "sealed":
            key_file = directory / "key"
            key_file.write_text(SAMPLES["key"] + "\n")
            key_file.chmod(0o600)
            self.params["encryption_key_file"] = str(key_file)

    def _write(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            self.client.set(key, base64.b64decode(value))
        elif isinstance(value, dict):
            self.client.hset(key, mapping=value)
        else:
            self.client.zadd(key, dict(value))

    def files(self) -> list[Path]:
        return [path for path in self.overflow.rglob("*") if path.is_file()]

    def run(self, *arguments: str) -> Result:
        options = [
            word for name, value in self.params.items() for word in (_option(name), str(value))
        ]
        return cli_runner().invoke(cli, [*arguments, *options])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.fixture(params=[*SAMPLES["kinds"]])
def left(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[Left]:
    yield Left(request.param, server, tmp_path)
    for key in server.our_keys():
        server.client.delete(key)
    server.client.delete("ray:spill:namespaces")


@pytest.fixture
def store(left: Left) -> Iterator[Store]:
    """A node of a session of this version in the same namespace."""
    made = Store(Config.load(left.params, {}), "session_2", "cd" * 28)
    with contextlib.closing(made):
        yield made
        made.destroy(lambda pid: False)


def test_objects_of_version_0_1_are_restored_and_deleted(left: Left, store: Store) -> None:
    for number, (name, data) in enumerate(DATA.items()):
        found = store.find(left.urls[name], object_id(number))
        target = bytearray(found.header.size)
        store.fill(found, memoryview(target))
        assert bytes(target) == data
        assert found.header.ray_metadata == METADATA
        assert found.header.owner_address == b"owner%d" % number
    store.delete(left.urls.values())
    session = left.urls["raw"].split(":")[-3].encode()
    assert [key for key in left.client.keys(b"*%b*" % session) if b"{" not in key] == []
    assert [path for path in left.files() if "place." not in path.name] == []


def test_commands_read_what_version_0_1_has_written(left: Left, store: Store) -> None:
    listed = json.loads(left.run("ls", "--json").stdout)
    assert len(listed) == len(DATA)
    stats = left.run("stats")
    assert stats.exit_code == 0, stats.output
    for url in left.urls.values():
        inspected = left.run("inspect", url.partition("?")[0])
        assert inspected.exit_code == 0, inspected.output
        assert "version 1" in inspected.stdout


def test_a_dead_session_of_version_0_1_is_removed(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "time", Clock())
    with contextlib.closing(CleanUp(Config.load(left.params, {}), lambda address: None)) as look:
        look.remove(look.find())
        look.recount()
    assert left.client.keys("ray:spill:default:*") == []
    assert left.files() == []
