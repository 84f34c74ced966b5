"""The guardian alone, with stand-ins for Ray's processes: what it removes, and when it leaves."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.clock import Clock
from support.guardians import end_guardians, guardians, left_of
from support.io_worker import IoWorker, io_workers
from support.proxy import proxy_to
from support.samples import source
from support.servers import Server, wait_until
from support.session_files import shared_files
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import OverflowUnavailableError
from ray_valkey_spill.format.names import Keyspace, ObjectName
from ray_valkey_spill.plugin import ending, guardian, proc
from ray_valkey_spill.plugin.ending import Guard, end, start_guardian
from ray_valkey_spill.store import cleanup
from ray_valkey_spill.store.liveness import RunningSession
from ray_valkey_spill.tiers.overflow import OverflowTier

NODE, OTHER = "ab" * 28, "cd" * 28
OVER = "session_1"
NOBODY = (1 << 22) + 1  # above every process id


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Path]:
    """The directory of a session."""
    directory = tmp_path / OVER
    (directory / "logs").mkdir(parents=True)
    yield directory
    end_guardians(directory)


@contextlib.contextmanager
def gcs(
    directory: Path, *arguments: str, config: Any = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """What has the name and the arguments of a session's GCS."""
    coded = base64.b64encode(json.dumps(config or {}).encode()).decode()
    process = subprocess.Popen(
        [
            *("gcs_server", "-c", "read end", f"--config_list={coded}"),
            *(f"--session-name={directory.name}", *arguments),
        ],
        executable="/bin/sh",
        stdin=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        wait_until(lambda: proc.gcs_of(directory.name))
        yield process
    finally:
        process.kill()
        process.communicate()


def spill(url: str, session: str, node: str, count: int = 3, **params: Any) -> None:
    """Store that many objects for a node of a session, which has a lease."""
    with contextlib.closing(Store(Config.load({"url": url, **params}, {}), session, node)) as store:
        store.begin_lease("127.0.0.1:1", lambda: False)
        _, failure = store.put([source(bytes(1000)) for _ in range(count)])
        assert failure is None
        store.give_back()


def destroy(server: Server, session: str, node: str, **params: Any) -> None:
    with contextlib.closing(
        Store(Config.load({"url": server.url, **params}, {}), session, node)
    ) as store:
        store.destroy(lambda pid: False)


def is_storing(session: Path) -> bool:
    """Whether an IO worker is storing something now."""
    lock = f":{(shared_files(session) / 'storing').stat().st_ino} "
    return any(lock in line for line in Path("/proc/locks").read_text().splitlines())


def note_keeper(session: Path, node: str) -> None:
    """Leave what an IO worker of a node on this host leaves."""
    (shared_files(session) / f"{node}.keeper").touch()


def watched(session: Path, params: dict[str, Any]) -> psutil.Process:
    """Its guardian, once it has found the GCS."""
    start_guardian(session, params)
    wait_until(lambda: guardian.recorded_gcs(str(session)))
    (found,) = guardians(session)
    return found


# --- what it removes ---


@pytest.mark.slow
def test_once_the_gcs_has_ended_its_session_is_removed_and_no_other(
    server: Server, session: Path
) -> None:
    """The server is away at first. Other sessions' names begin as this one's does."""
    with proxy_to(server.port) as proxy, gcs(session) as head:
        params = {"url": proxy.url, "retry_timeout": 0.2}
        note_keeper(session, NODE)
        others = [(f"{OVER}0", "default"), ("session_", "default"), (OVER, "elsewhere")]
        for name, namespace in [(OVER, "default"), *others]:
            spill(server.url, name, NODE, namespace=namespace)
        watched(session, params)
        before = [left_of(server, *other) for other in others]
        assert all(before)
        proxy.refusing = True
        head.send_signal(signal.SIGKILL)
        head.wait()
        log = session / "logs" / "ray_valkey_spill-guardian.log"
        wait_until(lambda: "are left on the server" in log.read_text())
        assert left_of(server, OVER)
        proxy.refusing = False
        wait_until(lambda: not guardians(session))
        assert left_of(server, OVER) == 0
        assert [left_of(server, *other) for other in others] == before
    for name, namespace in others:
        destroy(server, name, NODE, namespace=namespace)


def test_a_gcs_that_ends_as_soon_as_something_is_stored_has_been_seen(
    server: Server, session: Path
) -> None:
    with gcs(session) as head:
        Guard(session.name, lambda: session, {"url": server.url}).begin()
        head.kill()
        head.wait()
        spill(server.url, OVER, NODE)
        note_keeper(session, NODE)
        wait_until(lambda: not guardians(session))
    assert left_of(server, OVER) == 0


def test_of_a_node_on_another_host_what_it_may_still_write_stays(
    server: Server, session: Path
) -> None:
    """With its lease, by which a clean-up finds it once the node no longer renews that."""
    note_keeper(session, NODE)
    config = Config.load({"url": server.url}, {})
    keys = Keyspace.of(config)
    for node in (NODE, OTHER):
        spill(server.url, OVER, node)
        name = ObjectName(OVER, node, "0a" * 28, f"{0:011x}{NOBODY:08x}{0:08x}", 0)
        server.client.zadd(keys.pending, {str(name): 0})
    # Anybody may have made this file.
    (session / f"ray_valkey_spill-{OTHER}.keeper").touch()
    assert not end(config, session)
    assert guardian.is_ended(str(session)) and not guardian.is_over(str(session))
    (pending,) = server.client.zrange(keys.pending, 0, -1)
    (lease,) = server.client.zrange(keys.leases, 0, -1)
    assert OTHER.encode() in pending and OTHER.encode() in lease
    assert server.client.zrange(keys.index, 0, -1) == []
    note_keeper(session, OTHER)
    assert end(config, session)
    assert guardian.is_over(str(session))
    assert server.our_keys() == []


@pytest.mark.parametrize("lives", [False, True])
def test_a_node_on_another_host_is_removed_once_its_lease_has_run_out(
    server: Server, session: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(cleanup, "time", clock)
    monkeypatch.setattr(sys, "argv", ["", str(session)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"url": server.url})))
    config = Config.load({"url": server.url}, {})

    spill(server.url, OVER, OTHER)
    spill(server.url, f"{OVER}0", OTHER)
    before = left_of(server, f"{OVER}0")
    with contextlib.closing(Store(config, OVER, OTHER)) as node:
        if lives:
            clock.every(10, lambda: node.renew_lease("127.0.0.1:1", lambda: False))
        assert ending.main() == (1 if lives else 0)
        assert server.client.zrange(Keyspace.of(config).index, 0, -1) != []
        assert left_of(server, OVER) == (1 if lives else 0)
        assert left_of(server, f"{OVER}0") == before
        node.destroy(lambda pid: False)
    destroy(server, f"{OVER}0", OTHER)


def test_a_session_whose_gcs_answers_is_kept(
    server: Server, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made its guardian believe that it has ended."""
    monkeypatch.setattr(sys, "argv", ["", str(session)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"url": server.url})))
    monkeypatch.setattr(ending, "running_at", lambda address: RunningSession(OVER, frozenset()))
    spill(server.url, OVER, NODE)
    before = left_of(server, OVER)
    guardian.mark_ended(str(session))
    assert ending.main() == guardian.GAVE_UP
    assert left_of(server, OVER) == before
    assert not guardian.is_ended(str(session)), "it may spill again"
    destroy(server, OVER, NODE)


def test_what_is_in_valkey_goes_whatever_becomes_of_the_overflow(
    server: Server, session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faked: no disk here fails for whoever looks for a file."""
    params = {"url": server.url, "overflow_uri": (tmp_path / "overflow").as_uri()}
    config = Config.load(params, {})
    with contextlib.closing(Store(config, OVER, NODE)) as store:
        store.begin_lease("127.0.0.1:1", lambda: False)
        store.join_overflow()
        _, failure = store.put([source(bytes(1000))])
        assert failure is None
        store.give_back()
    note_keeper(session, NODE)

    def fail(self: OverflowTier, session: str, token: str) -> bool:
        raise OverflowUnavailableError("the disk is broken", "Replace it")

    with monkeypatch.context() as patched:
        patched.setattr(OverflowTier, "is_signed", fail)
        with pytest.raises(OverflowUnavailableError):
            end(config, session)
    assert server.spilled_keys() == []
    assert end(config, session)
    assert server.our_keys() == []


@pytest.mark.slow
def test_an_end_waits_for_what_an_io_worker_is_storing(server: Server, session: Path) -> None:
    """Ray destroys a session before it kills the IO workers, and kills them at once then."""
    with (
        futures.ThreadPoolExecutor() as background,
        proxy_to(server.port) as proxy,
        io_workers(1, session, NODE, {"url": proxy.url}) as (worker,),
    ):
        # Its lease.
        wait_until(lambda: left_of(server, OVER) and not is_storing(session))
        proxy.stall()
        worker.begin_to_spill()
        # Not only for a moment, as what works in the background.
        wait_until(lambda: all(is_storing(session) for _ in range(50)))
        ending = background.submit(end, Config.load({"url": server.url}, {}), session)
        with pytest.raises(futures.TimeoutError):
            ending.result(timeout=1)
        assert guardian.is_ended(str(session))
        proxy.flow()
        assert ending.result()
        worker.kill()
    assert server.our_keys() == []
    with guardian.storing(str(session)) as may_store:
        assert not may_store


def test_no_deletion_comes_between_the_steps_of_a_removal(server: Server, session: Path) -> None:
    """In an object store it would bring back what is being removed."""
    with io_workers(1, session, NODE, {"url": server.url}) as (worker,):
        worker.begin_to_spill()
        wait_until(lambda: server.spilled_ids() and not is_storing(session))
        guardian.mark_ended(str(session))
        worker.begin_to_delete()
        journals = shared_files(session).glob
        wait_until(lambda: any("+ray:" in each.read_text() for each in journals("*.deletions")))
    assert len(server.spilled_ids()) == 1
    assert end(Config.load({"url": server.url}, {}), session)
    assert server.our_keys() == []


def test_a_node_whose_io_worker_was_killed_before_it_did_background_work_ends_with_its_session(
    server: Server, session: Path
) -> None:
    """It has taken the lease itself, and that of a node on another host would stay for a while."""
    worker = IoWorker(session, NODE, {"url": server.url}, connected=False)
    try:
        worker.begin_to_spill()
        wait_until(server.spilled_ids)
    finally:
        worker.kill()
    assert end(Config.load({"url": server.url}, {}), session)
    assert server.our_keys() == []


@pytest.mark.slow
def test_an_end_does_not_wait_for_ever(server: Server, session: Path) -> None:
    """What is being stored may itself wait, for a server that is away."""
    note_keeper(session, NODE)
    spill(server.url, OVER, NODE)
    config = Config.load({"url": server.url}, {})
    with guardian.storing(str(session)) as may_store:
        assert may_store
        assert not end(config, session), "something may come"
    assert server.our_keys() == []
    assert not guardian.is_over(str(session))
    assert end(config, session)
    assert guardian.is_over(str(session))


def test_what_is_in_the_overflow_goes_as_well(server: Server, session: Path) -> None:
    overflow = session.parent / "overflow"
    overflow.mkdir()
    params = {"overflow_uri": overflow.as_uri(), "max_bytes": 0}
    spill(server.url, OVER, NODE, **params)
    spill(server.url, f"{OVER}0", NODE, **params)
    config = Config.load({"url": server.url, **params}, {})
    kept = {path for path in overflow.rglob("*") if path.is_file() and f"{OVER}0" in str(path)}
    assert kept
    assert end(config, session, NODE)
    assert {path for path in overflow.rglob("*") if path.is_file()} == kept
    destroy(server, f"{OVER}0", NODE, **params)


# --- when it leaves ---


@pytest.mark.parametrize(
    ("arguments", "config", "environment"),
    [
        (["--redis_address=10.0.0.9"], {}, {}),
        ([], {}, {"RAY_REDIS_ADDRESS": "10.0.0.9:6379"}),
        ([], {"gcs_storage": "rocksdb"}, {}),
        ([], {"gcs_storage": "redis"}, {"RAY_gcs_storage": "memory"}),
        ([], {}, {"RAY_gcs_storage": "rocksdb"}),
    ],
)
def test_a_session_that_continues_with_the_next_head_has_no_guardian(
    session: Path,
    arguments: list[str],
    config: dict[str, str],
    environment: dict[str, str],
) -> None:
    with gcs(session, *arguments, config=config, **environment):
        found = proc.gcs_of(session.name)
        assert found is not None and proc.ends_with_gcs(found) is False
        start_guardian(session, {})
        # Its command line goes before its lock does.
        wait_until(lambda: not guardians(session) and not guardian.is_there(str(session)))
        assert guardian.recorded_gcs(str(session)) is None
        guard = Guard(session.name, lambda: session, {})
        guard.ensure()
        assert guard.outlives_gcs
        assert guardians(session) == []


def test_where_a_gcs_is_back_is_noted_beside_where_it_was(server: Server, session: Path) -> None:
    """Its nodes have spilled before, and none of them since. None seems to live for it."""
    leases = Keyspace.of(Config.load({"url": server.url}, {})).leases
    for node in (NODE, OTHER):
        spill(server.url, OVER, node)
    spill(server.url, f"{OVER}0", NODE)
    before = dict(server.client.zrange(leases, 0, -1, withscores=True))
    back = ["--redis_address=10.0.0.9", "--node-ip-address=10.1.2.3", "--gcs_server_port=6380"]
    with gcs(session, *back):
        start_guardian(session, {"url": server.url})
        wait_until(lambda: not guardians(session))
    after = dict(server.client.zrange(leases, 0, -1, withscores=True))
    added = {
        f"{OVER}:{node}:10.1.2.3:6380".encode(): before[f"{OVER}:{node}:127.0.0.1:1".encode()]
        for node in (NODE, OTHER)
    }
    assert after == before | added
    for name, node in ((OVER, NODE), (OVER, OTHER), (f"{OVER}0", NODE)):
        destroy(server, name, node)
    assert server.our_keys() == []


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["--node-ip-address=10.1.2.3", "--gcs_server_port=6380"], "10.1.2.3:6380"),
        (["--node-ip-address=fd00::3", "--gcs_server_port=6380"], "[fd00::3]:6380"),
        (["--node-ip-address=10.1.2.3", "--gcs_server_port=0"], None),
        (["--gcs_server_port=6380"], None),
        (["--node-ip-address=10.1.2.3"], None),
    ],
)
def test_where_a_gcs_is_follows_from_how_it_was_started(
    arguments: list[str], address: str | None
) -> None:
    with gcs(Path("/session_3"), *arguments):
        found = proc.gcs_of("session_3")
        assert found is not None and proc.address_of(found) == address
    assert proc.address_of(found) is None


def test_a_gcs_in_memory_or_of_nobody_of_ours() -> None:
    with gcs(Path("/session_2"), config={"gcs_storage": "memory"}, RAY_gcs_storage="memory") as one:
        found = proc.gcs_of("session_2")
        assert found is not None and found.pid == one.pid
        assert proc.ends_with_gcs(found)
        assert proc.ends_with_gcs(proc.Process(found.pid, "1")) is None
        assert proc.gcs_of("session_") is None and proc.gcs_of("session_22") is None
    # It has ended, and nothing can be found out any more.
    assert proc.ends_with_gcs(found) is None


def test_a_head_that_does_not_come_up_has_no_guardian(session: Path) -> None:
    starter = subprocess.Popen(["sleep", "1000"])
    try:
        command = guardian.command("none", str(session), starter.pid)
        subprocess.run(command, input=b"{}", check=True)
        assert guardians(session)
    finally:
        starter.kill()
        starter.wait()
    wait_until(lambda: not guardians(session))


def test_after_an_end_in_order_it_has_nothing_to_do(server: Server, session: Path) -> None:
    with gcs(session) as head:
        # A server that it could not reach: it does not try.
        watched(session, {"url": "valkey://127.0.0.1:1/0"})
        assert end(Config.load({"url": server.url}, {}), session)
        head.kill()
        head.wait()
        wait_until(lambda: not guardians(session))
        assert (session / "logs" / "ray_valkey_spill-guardian.log").read_text() == ""


# --- how it waits ---


def test_there_is_one_however_often_it_is_started_and_another_when_it_is_killed(
    session: Path,
) -> None:
    with gcs(session):
        guard = Guard(session.name, lambda: session, {})
        guard.ensure()
        wait_until(lambda: guardian.recorded_gcs(str(session)))
        (first,) = guardians(session)
        guard.ensure()
        start_guardian(session, {})
        wait_until(lambda: guardians(session) == [first])
        first.kill()
        # Its command line goes before its lock does.
        wait_until(lambda: not proc.is_alive(first.pid))
        guard.ensure()
        (second,) = guardians(session)
        assert second != first


def test_those_that_ask_at_the_same_time_do_not_keep_it_from_starting(session: Path) -> None:
    lock = shared_files(session) / "guardian"
    with gcs(session), lock.open("wb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not guardian.is_there(str(session))
        start_guardian(session, {})
        asking.close()
        wait_until(lambda: guardian.recorded_gcs(str(session)))
        assert guardian.is_there(str(session))


def test_a_node_without_the_gcs_starts_none(session: Path) -> None:
    Guard(session.name, lambda: session, {}).ensure()
    assert guardians(session) == []


def test_it_is_small_and_belongs_to_nobody_and_shows_no_secret(session: Path) -> None:
    with gcs(session):
        found = watched(session, {"url": "valkey://:hidden-word@127.0.0.1:1/0"})
        assert "hidden-word" not in " ".join(found.cmdline())
        assert found.parent() != psutil.Process()
        assert os.getsid(found.pid) != os.getsid(0)
        assert found.memory_full_info().uss < 12 << 20
        assert found.net_connections() == []
        maps = {Path(each.path).name for each in found.memory_maps()}
        assert not any("_raylet" in name or "arrow" in name for name in maps)
        # What runs Ray's processes down by name must not find it (`ray stop`).
        from ray.autoscaler._private.constants import RAY_PROCESSES

        name, line = found.name(), " ".join(found.cmdline())
        assert not any(word in (name if by_name else line) for word, by_name in RAY_PROCESSES)
