"""Ray's head starts only with a server that can be trusted, and says why not in one message."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import valkey
from support.clusters import (
    MIB,
    clean_ups,
    end_clean_ups,
    ray_with,
    run_driver,
    starting_ray,
    system_config,
)
from support.proxy import proxy_to
from support.samples import source
from support.servers import (
    PATIENCE,
    PRODUCTS,
    SOON,
    Server,
    acl_user,
    dead_port,
    free_port,
    server_of,
    valkey_server,
    wait_until,
)
from support.stores import Store

from ray_valkey_spill import ValkeyStorage
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.tiers import preflight

# --- the checks themselves ---


def load(server: Server, **params: Any) -> Config:
    return Config.load({"url": server.url, **params}, {})


def test_a_good_server_passes_and_keeps_nothing(server: Server) -> None:
    before = server.client.dbsize()
    assert preflight.run_all(load(server)).product == "Valkey"
    assert server.client.dbsize() == before


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_an_evicting_policy_is_refused_unless_accepted(server: Server, policy: str) -> None:
    server.client.config_set("maxmemory-policy", policy)
    with pytest.raises(ConfigError, match=rf"{policy}.*volatile-lru.*allow_eviction"):
        preflight.run_all(load(server))
    preflight.run_all(load(server, allow_eviction=True))


@pytest.mark.parametrize(
    "policy", ["noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"]
)
def test_a_policy_that_spares_keys_without_a_ttl_is_accepted(server: Server, policy: str) -> None:
    server.client.config_set("maxmemory-policy", policy)
    preflight.run_all(load(server))


UNUSABLE = {
    "UNLINK renamed away": {"rename_command": 'UNLINK ""'},
    "ZADD renamed away": {"rename_command": 'ZADD ""'},
}


@pytest.mark.parametrize("options", UNUSABLE.values(), ids=UNUSABLE)
def test_a_server_on_which_no_spill_could_succeed_is_refused(options: dict[str, Any]) -> None:
    with valkey_server(**options) as server:
        with pytest.raises(ServerRefusedError, match=rf"{server.port}/0 fails (UNLINK|ZADD)"):
            preflight.run_all(load(server))
        assert server.our_keys() == []


def test_a_server_without_the_replicas_that_it_wants_is_waited_for_and_then_named() -> None:
    with (
        valkey_server(min_replicas_to_write=1) as server,
        pytest.raises(ServerUnavailableError, match=r"NOREPLICAS.*lower min-replicas-to-write"),
    ):
        preflight.run_all(load(server, retry_timeout=0.3))


def test_a_server_that_cannot_save_is_named_with_its_cause(tmp_path: Path) -> None:
    with valkey_server(enable_protected_configs="yes", data_dir=tmp_path) as server:
        server.client.config_set("dir", "/proc")
        server.client.config_set("save", "3600 1")
        server.client.bgsave()
        wait_until(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(ServerRefusedError, match=r"fails UNLINK: MISCONF.*Fix its disk"):
            preflight.run_all(load(server))
        server.client.config_set("save", "")


def test_a_second_storage_with_another_server_is_checked_as_well(server: Server) -> None:
    ValkeyStorage("node", "session", url=server.url)
    with nothing_listening() as url, pytest.raises(ServerUnavailableError):
        ValkeyStorage("node", "session", url=url)


def test_a_storage_that_was_never_validated_destroys_its_node(server: Server) -> None:
    # As with automatic_object_spilling_enabled false, with which Ray spills all the same.
    storage = ValkeyStorage("node", "session_unseen", url=server.url)
    with contextlib.closing(Store(load(server), "session_unseen", "node")) as store:
        _, failure = store.put([source(bytes(1000))])
    assert failure is None
    assert server.our_keys() != []
    storage.destroy_external_storage()
    assert server.our_keys() == []


def test_a_cluster_that_does_not_serve_is_refused() -> None:
    with (
        valkey_server(cluster_enabled=True, cluster_port=free_port()) as server,
        pytest.raises(ServerUnavailableError, match=r"CLUSTERDOWN.*CLUSTER INFO"),
    ):
        preflight.run_all(load(server, retry_timeout=0.5))


def test_a_cluster_that_serves_a_few_slots_is_checked_as_far_as_it_goes() -> None:
    """Those of its slots that nobody has are met by chance."""
    config = {"cluster_enabled": True, "cluster_require_full_coverage": False}
    with valkey_server(**config, cluster_port=free_port()) as server:
        keys = Keyspace.of(load(server))
        for key in (keys.index, f"{keys.root}preflight"):
            slot = server.client.execute_command("CLUSTER", "KEYSLOT", key)
            server.client.execute_command("CLUSTER", "ADDSLOTS", slot)
        wait_until(lambda: server.client.cluster("INFO")["cluster_state"] == "ok")
        assert preflight.run_all(load(server, retry_timeout=0.5)).product == "Valkey"


def test_a_replica_is_refused() -> None:
    # Not of the server that all share: it would keep what it has for replicas in its memory.
    with (
        valkey_server() as primary,
        valkey_server(replicaof=f"127.0.0.1 {primary.port}") as replica,
        pytest.raises(ConfigError, match=r"replica.*url of its primary"),
    ):
        preflight.run_all(load(replica))


@contextlib.contextmanager
def a_user(server: Server, keys: str, commands: Iterable[str]) -> Iterator[Config]:
    """The config of one that may run just these commands on just these keys."""
    rules = " ".join([f"~{keys}", *(f"+{name.lower()}" for name in commands)])
    environ = {"RAY_VALKEY_SPILL_PASSWORD": "pw"}
    with acl_user([server.client], rules, password="pw"):
        yield Config.load({"url": server.url, "username": "ray"}, environ)


@pytest.mark.parametrize("missing", preflight.COMMANDS)
def test_a_missing_permission_is_named_and_nothing_is_left(server: Server, missing: str) -> None:
    with a_user(server, "ray:spill:*", set(preflight.COMMANDS) - {missing}) as config:
        with pytest.raises(ServerRefusedError, match=rf"user 'ray' run {missing}\b") as caught:
            preflight.run_all(config)
        assert f"+{missing.lower()}" in caught.value.hint
        assert server.our_keys() == []


def test_these_permissions_and_no_others_are_enough(server: Server) -> None:
    with a_user(server, "ray:spill:default:*", preflight.COMMANDS) as config:
        preflight.run_all(config)


def test_a_full_server_does_not_keep_the_head_from_starting(server: Server) -> None:
    server.client.config_set("maxmemory", 1)
    preflight.run_all(load(server))
    server.client.config_set("maxmemory", 0)


LIMITS = {
    "proto-max-bulk-len": ("1mb", "written"),
    "client-query-buffer-limit": ("1mb", "written"),
    "maxmemory-clients": ("1500kb", "written"),
    "client-output-buffer-limit": ("normal 1mb 0 0", "read"),
}
# Valkey 9 sends long values from where they are stored, and has no buffer for them.
UNLIMITED = [("valkey", "client-output-buffer-limit")]


@pytest.mark.parametrize(
    ("product", "limit"), [c for c in product(PRODUCTS, LIMITS) if c not in UNLIMITED]
)
def test_a_limit_below_the_chunk_size_is_named_with_what_would_work(
    tmp_path: Path, product: str, limit: str
) -> None:
    value, done = LIMITS[limit]
    with server_of(product, tmp_path) as (url, client):
        client.config_set(limit, value)
        with pytest.raises(ServerRefusedError, match=rf"cannot be {done} at .*{limit}") as caught:
            preflight.run_all(Config.load({"url": url, "chunk_size": 3 << 20}, {}))
        advised = re.search("chunk_size to at most ([0-9]+)", caught.value.hint)
        # The latter limit what is under way, which smaller chunks do not lower.
        assert advised or limit in ("maxmemory-clients", "client-output-buffer-limit")
        if advised:
            preflight.run_all(Config.load({"url": url, "chunk_size": int(advised[1])}, {}))
        assert client.keys() == []


def test_a_server_without_room_for_a_trial_evicts_nothing_for_it(server: Server) -> None:
    server.client.config_set("maxmemory-policy", "volatile-lru")
    server.client.set("session:1", bytes(2 << 20), ex=3600)
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + (1 << 20))
    preflight.run_all(load(server, chunk_size=4 << 20))
    server.client.config_set("maxmemory", 0)
    assert server.client.delete("session:1") == 1


def test_what_is_tried_expires_if_the_trial_is_killed(server: Server) -> None:
    found: list[int] = []

    def look() -> bool:
        found.extend(server.client.ttl(key) for key in server.our_keys())
        return True

    with proxy_to(server.port) as proxy:
        config = Config.load({"url": proxy.url}, {})
        proxy.before(look, b"GET", number=3)
        preflight.run_all(config)
    assert len(found) == 1
    assert 0 < found[0] <= 60


# --- the storage, as Ray makes it ---


@contextlib.contextmanager
def nothing_listening() -> Iterator[str]:
    yield f"valkey://127.0.0.1:{dead_port()}"


def test_the_head_fails_without_a_server_in_one_message() -> None:
    with (
        nothing_listening() as url,
        pytest.raises(ServerUnavailableError, match=r"cannot be reached.*Start it") as caught,
    ):
        ValkeyStorage("node", "session", url=url)
    # Ray prints causes and contexts too.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_io_worker_comes_up_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--worker-type=SPILL_WORKER"])
    with nothing_listening() as url:
        ValkeyStorage("node", "session", url=url)


def test_an_io_worker_comes_up_with_a_wrong_environment_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--worker-type=RESTORE_WORKER"])
    monkeypatch.setenv("RAY_VALKEY_SPILL_CHUNK_SIZE", "large")
    made = ValkeyStorage("node", "session")
    made.delete_spilled_objects([b"ray:spill:default:x?offset=0&size=1"])
    assert "deletions wait for the configuration of this node" in caplog.text
    assert "RAY_VALKEY_SPILL_CHUNK_SIZE" in caplog.text


def test_while_a_full_server_is_waited_for_nothing_of_plasmas_is_held(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plasma does not tell who holds a buffer, so one stands in for it that does."""
    buffers = [np.ones(1 << 20, np.uint8)]
    held = weakref.ref(buffers[0])
    found_held: list[object] = []

    class WithoutPlasma(ValkeyStorage):
        def _get_objects_from_store(self, refs: object) -> list[tuple[Any, bytes, None]]:
            return [(buffers.pop(), b"metadata", None)]

    storage = WithoutPlasma("node", "session", url=server.url)
    monkeypatch.setattr(time, "sleep", lambda seconds: found_held.append(held()))
    server.client.config_set("maxmemory", 1)
    gc.disable()  # what only a collection frees can be held for minutes
    try:
        assert storage.spill_objects([ray.ObjectRef.from_random()], [b""]) == []
    finally:
        gc.enable()
    assert found_held == [None]
    storage.destroy_external_storage()


def test_shutdown_goes_on_when_the_server_went_first(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with proxy_to(server.port) as proxy:
        params = {"url": proxy.url, "retry_timeout": 0.2}
        ValkeyStorage("dummy", "session", **params).destroy_external_storage()
        assert caplog.text == ""
        proxy.refusing = True
        ValkeyStorage("node", "session", **params).destroy_external_storage()
    assert "may be left on the server" in caplog.text


@pytest.mark.slow
def test_shutdown_goes_on_though_the_environment_has_changed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise Ray would end none of its processes, and never could."""
    with acl_user([server.client], "~ray:* +@all"):
        with monkeypatch.context() as changed:
            changed.setenv("RAY_VALKEY_SPILL_PASSWORD", "secret")
            with ray_with(system_config(server.url, username="ray")):
                refs = [ray.put(np.full(MIB, i)) for i in range(30)]
                assert server.our_keys() != []
                changed.delenv("RAY_VALKEY_SPILL_PASSWORD")
                changed.setenv("RAY_VALKEY_SPILL_MAX_BYTES", "lots")
                del refs
        assert server.our_keys() == []


@pytest.mark.slow
def test_a_head_start_cleans_up_where_its_own_config_says(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where variables say that Ray does not use. It leaves its own session alone."""
    params = {"retry_timeout": 5}
    for session in ("session_dead", "session_own"):
        node = Store(load(server, **params), session, "ab" * 28)
        with contextlib.closing(node):
            node.begin_lease(f"127.0.0.1:{dead_port()}", lambda: False)
            _, failure = node.put([source(bytes(1000))])
            assert failure is None
            node.give_back()
    # By the server's clock their leases have run out long ago.
    leases = Keyspace.of(load(server)).leases
    for lease in server.client.zrange(leases, 0, -1):
        server.client.zadd(leases, {lease: 1})
    monkeypatch.setenv("RAY_VALKEY_SPILL_URL", server.url)
    monkeypatch.setenv("RAY_object_spilling_config", json.dumps({"type": "filesystem"}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    try:
        ValkeyStorage("node", "session_own", **params)
        assert len(clean_ups()) == 1
        wait_until(lambda: not clean_ups(), SOON)
    finally:
        end_clean_ups()
    left = b" ".join(server.our_keys())
    assert b"session_own" in left and b"session_dead" not in left
    with contextlib.closing(Store(load(server), "session_own", "ab" * 28)) as own:
        own.destroy(lambda pid: False)
    assert server.our_keys() == []


def test_a_clean_up_that_cannot_be_started_stops_no_head(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Store(load(server), "session_other", "ab" * 28)) as other:
        _, failure = other.put([source(bytes(1000))])
        assert failure is None
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        ValkeyStorage("node", "session_new", url=server.url)
        assert "dead sessions are not cleaned up: " in caplog.text
        other.destroy(lambda pid: False)


# --- with the plain tools ---


def ray_start(
    params: dict[str, Any], directory: Path, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """`ray start --head`; its exit code and what it printed."""
    spilling = json.dumps({"type": "valkey", "params": params})
    result = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0"),
            "--system-config=" + json.dumps({"object_spilling_config": spilling}),
            f"--temp-dir={directory}",
            "--include-dashboard=false",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


WRONG = {
    "unknown parameter": ({"chunksize": 1}, "unknown parameter 'chunksize': did you mean"),
    "bad type": ({"chunk_size": "1"}, "chunk_size must be a size from 1024"),
    "password in url": ({"url": "valkey://:hunter2@h"}, "RAY_VALKEY_SPILL_PASSWORD"),
    "contradiction": ({"tls_ca_file": "/ca.pem"}, "tls_ca_file is given, but url does not use TLS"),
}


@pytest.mark.parametrize(("params", "says"), WRONG.values(), ids=WRONG)
def test_ray_start_refuses_wrong_parameters(
    short_dir: Path, params: dict[str, Any], says: str
) -> None:
    code, printed = ray_start(params, short_dir)
    assert code != 0
    assert says in printed.splitlines()[-1]
    assert printed.count("Traceback") == 1
    # Of this package, there is only the function that Ray calls.
    assert len(re.findall(r'File ".*/ray_valkey_spill/', printed)) == 1
    assert "hunter2" not in printed


def test_a_head_start_warns_that_spilling_by_itself_evicts_nobody(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.client.config_set("maxmemory-policy", "volatile-lru")
    server.client.config_set("maxmemory", 256 << 20)
    with caplog.at_level(logging.WARNING):
        preflight.run_all(load(server))
        assert caplog.text == ""
        server.client.set("session:1", "state", ex=3600)
        preflight.run_all(load(server, max_bytes=1 << 20))
        assert caplog.text == ""
        preflight.run_all(load(server))
    assert "keys with a TTL (1)" in caplog.text
    assert "max_bytes" in caplog.text
    server.client.delete("session:1")


def test_ray_init_prints_the_warning_and_starts() -> None:
    with valkey_server(maxmemory="256mb", maxmemory_policy="volatile-lru") as server:
        server.client.set("session:1", "state", ex=3600)
        script = f"""
import sys
sys.stderr = sys.stdout
{starting_ray(system_config(server.url))}
ray.shutdown()
"""
        assert "Give max_bytes" in run_driver(script)


def test_ray_start_refuses_a_wrong_password(short_dir: Path) -> None:
    with valkey_server(password="right") as server:
        env = {"RAY_VALKEY_SPILL_PASSWORD": "wrong-secret"}
        code, printed = ray_start({"url": server.url}, short_dir, env)
    assert code != 0
    assert "refuses the default user" in printed.splitlines()[-1]
    assert "wrong-secret" not in printed


def test_ray_start_refuses_nothing_listening(short_dir: Path) -> None:
    with nothing_listening() as url:
        code, printed = ray_start({"url": url}, short_dir)
    assert code != 0
    assert "cannot be reached" in printed.splitlines()[-1]
    assert printed.count("Traceback") == 1


def test_a_loading_server_is_waited_for_and_then_named(tmp_path: Path) -> None:
    with valkey_server(data_dir=tmp_path, enable_debug_command="yes") as server:
        server.client.execute_command("DEBUG", "POPULATE", 100_000)
        server.client.save()
    # Half a millisecond a key: it will be loading for most of a minute.
    slowly = {"key_load_delay": 500, "loading_process_events_interval_bytes": 1024}
    with valkey_server(data_dir=tmp_path, ready=False, **slowly) as server:
        wait_until(lambda: is_loading(server))
        with pytest.raises(ServerUnavailableError, match=r"LOADING.*for 0\.5 s.*retry_timeout"):
            preflight.run_all(load(server, retry_timeout=0.5))


def is_loading(server: Server) -> bool:
    with contextlib.suppress(valkey.exceptions.ConnectionError):
        return bool(server.client.info("persistence")["loading"])
    return False


def test_ray_init_refuses_and_the_next_one_works() -> None:
    with nothing_listening() as url, valkey_server() as server:
        script = f"""
try:
{textwrap.indent(starting_ray(system_config(url)), "    ")}
except Exception as error:
    print(type(error).__name__, "|", error)
{starting_ray(system_config(server.url))}
print(ray.get(ray.put("works")))
ray.shutdown()
"""
        printed = run_driver(script)
    assert "ServerUnavailableError | Valkey at" in printed
    assert "works" in printed
