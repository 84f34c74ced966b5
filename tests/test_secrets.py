"""No password and no key shows where others can look: logs, command lines, errors, keys, reprs."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from click.testing import CliRunner
from support.clusters import MIB, io_workers, local_ray, spill
from support.servers import INDEX, acl_user, valkey_server, wait_until

from ray_valkey_spill.cli.commands import cli
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.store.object_store import ObjectStore
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import link_to

PASSWORD = "correct-horse-battery-staple"
WRONG = "wrong-horse-battery-staple"
RULES = preflight.acl_rules(Config.load({}, {}))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "spill.key"
    path.write_text(secrets.token_hex(32) + "\n")
    return path


def hidden(key_file: Path) -> re.Pattern[bytes]:
    """What must not be found anywhere: also in part, and as bytes of the key."""
    digits = key_file.read_text().strip()
    words = [PASSWORD, WRONG, digits[:16], digits[-16:]]
    raw = bytes.fromhex(digits)
    return re.compile(b"|".join(map(re.escape, [*(w.encode() for w in words), raw[:8], raw[-8:]])))


def ways_in(url: str, file: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """How a user may give the password: environment and parameters."""
    with_user = url.replace("://", f"://ray:{PASSWORD}@")
    file.write_text(PASSWORD)
    yield {"RAY_VALKEY_SPILL_URL": with_user}, {}
    yield {"RAY_VALKEY_SPILL_PASSWORD": PASSWORD}, {"url": url, "username": "ray"}
    yield {}, {"url": url, "username": "ray", "password_file": str(file)}


@pytest.mark.parametrize("way", range(3), ids=["url", "variable", "file"])
def test_no_repr_and_no_error_shows_a_secret(tmp_path: Path, key_file: Path, way: int) -> None:
    secret = hidden(key_file)
    with valkey_server() as server, acl_user([server.client], RULES, password=PASSWORD):
        environ, params = list(ways_in(server.url, tmp_path / "password"))[way]
        params["encryption_key_file"] = str(key_file)
        config = Config.load(params, environ)
        preflight.run_all(config)
        wrong = Config.load(
            {**params, "password_file": None, "username": "ray", "url": server.url},
            {"RAY_VALKEY_SPILL_PASSWORD": WRONG},
        )
        with pytest.raises(SpillError) as caught:
            preflight.run_all(wrong)
        with contextlib.closing(ObjectStore(config, "session", "node")) as store:
            link = link_to(config)
            seen = [config, config.address, store, vars(store), link, caught.value, vars(link)]
            link.close()
    assert not secret.search("\n".join(map(repr, seen)).encode())
    assert not secret.search(str(caught.value).encode())


def test_what_led_to_an_error_shows_no_secret_either(key_file: Path) -> None:
    with valkey_server(password=PASSWORD) as server:
        config = Config.load({"url": server.url}, {"RAY_VALKEY_SPILL_PASSWORD": WRONG})
        with pytest.raises(SpillError) as caught:
            link_to(config).info()
    chain: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(f"{error!r} {error}")
        error = error.__cause__ or error.__context__
    assert not hidden(key_file).search("\n".join(chain).encode())


@pytest.mark.parametrize("command", ["check", "config", "stats", "ls", "gc"])
def test_no_command_prints_a_secret(
    key_file: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with valkey_server() as server, acl_user([server.client], RULES, password=PASSWORD):
        with_user = server.url.replace("://", f"://ray:{PASSWORD}@")
        monkeypatch.setenv("RAY_VALKEY_SPILL_URL", with_user)
        monkeypatch.setenv("RAY_VALKEY_SPILL_ENCRYPTION_KEY_FILE", str(key_file))
        for options in ([], ["--json"]):
            result = CliRunner().invoke(cli, [command, *options])
            assert result.exit_code == 0, result.output
            assert not hidden(key_file).search(result.output_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["url", "file"])
def test_ray_shows_no_secret_anywhere(
    key_file: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = hidden(key_file)
    with valkey_server() as server, acl_user([server.client], RULES, password=PASSWORD):
        environ, params = list(ways_in(server.url, tmp_path / "password"))[0 if way == "url" else 2]
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        params |= {"encryption_key_file": str(key_file), "retry_timeout": 1}
        with local_ray(params.pop("url", None), **params):
            values = [np.random.default_rng(i).random(MIB // 8) for i in range(8)]
            refs = [ray.put(value) for value in values]
            spill(refs, server)
            for ref, value in zip(refs, values):
                assert np.array_equal(ray.get(ref), value)
            # Ray's object directory has a key and a size of each.
            stored = [*server.our_keys(), *server.client.zrange(INDEX, 0, -1)]
            # A failure is told to drivers and in logs.
            server.client.acl_setuser("ray", enabled=True, reset_passwords=True)
            server.client.client_kill_filter(_type="normal", skipme=True)
            del refs
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            wait_until(lambda: any(b"deletions wait for Valkey" in log for log in logs(session)))
            shown = [
                *logs(session),
                *(arg.encode() for process in processes() for arg in command_line(process)),
                *stored,
            ]
            assert io_workers()
            server.client.acl_setuser("ray", enabled=True, passwords=[f"+{PASSWORD}"])
    assert any(b"raylet" in text for text in shown)
    assert len(stored) > len(values)
    assert not [text for text in shown if secret.search(text)]


def logs(session: Path) -> list[bytes]:
    return [path.read_bytes() for path in session.rglob("*") if path.is_file()]


def processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
