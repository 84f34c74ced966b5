"""Faults of real servers, and of the connections to them.

A fault is a context manager over a rig (`support.rigs`): it strikes when entered and is mended when
left. What it gives says whether it has struck, that is, whether any client was hit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import valkey
from valkey.crc import key_slot

from support.hanging import HangingDirectory
from support.rigs import AnyRig, Rig, TopologyRig, patient_client
from support.servers import INDEX, answers, wait_until
from support.topologies import Cluster, SentinelGroup

HasStruck = Callable[[], bool]
Fault = Callable[[Any], AbstractContextManager[HasStruck]]


def mended_by_itself(strike: Callable[[Any], int]) -> Fault:
    """A fault of a moment; `strike` returns how much it has hit."""

    @contextlib.contextmanager
    def fault(rig: Any) -> Iterator[HasStruck]:
        hit = strike(rig)
        yield lambda: hit > 0

    fault.__name__ = strike.__name__
    fault.__doc__ = strike.__doc__
    return fault


def _once_it_grows(count: Callable[[], int]) -> HasStruck:
    before = count()
    return lambda: count() > before


def _once_refused(rig: AnyRig, error: str) -> HasStruck:
    """Once a client was answered with that error."""
    return _once_it_grows(lambda: rig.errors(error))


# --- connections ---


@mended_by_itself
def resets_connections(rig: Rig) -> int:
    hit = rig.proxy.open_connections
    rig.proxy.reset()
    return hit


@contextlib.contextmanager
def resets_after_some_more_bytes(rig: Rig) -> Iterator[HasStruck]:
    ways = rig.proxy.to_server, rig.proxy.to_client
    for way in ways:
        way.reset_after = 100_000
    yield lambda: any(way.reset_after is None for way in ways)
    for way in ways:
        way.reset_after = None


@contextlib.contextmanager
def refuses_connections(rig: Rig) -> Iterator[HasStruck]:
    rig.proxy.refusing = True
    rig.proxy.reset()
    yield _once_it_grows(lambda: rig.proxy.refused)
    rig.proxy.refusing = False


@contextlib.contextmanager
def stalls(rig: Rig) -> Iterator[HasStruck]:
    rig.proxy.stall()
    yield _once_it_grows(lambda: rig.proxy.to_server.stalled)
    rig.proxy.flow()


@contextlib.contextmanager
def delays(rig: Rig) -> Iterator[HasStruck]:
    rig.proxy.to_server.delay = rig.proxy.to_client.delay = 0.02
    yield _once_it_grows(lambda: rig.proxy.to_server.bytes)
    rig.proxy.flow()


@contextlib.contextmanager
def trickles(rig: Rig) -> Iterator[HasStruck]:
    for way in (rig.proxy.to_server, rig.proxy.to_client):
        way.piece, way.delay = 4000, 0.001
    yield _once_it_grows(lambda: rig.proxy.to_server.bytes)
    rig.proxy.flow()


@contextlib.contextmanager
def forgets_connections(rig: Rig) -> Iterator[HasStruck]:
    """As a NAT that has forgotten idle ones: what comes over them is dropped, and no end told."""
    forgotten = _once_it_grows(lambda: rig.proxy.swallowed)
    rig.proxy.forget()
    yield forgotten


@contextlib.contextmanager
def leads_to_a_replica_that_lags(rig: Rig) -> Iterator[HasStruck]:
    """The name leads to a replica that is behind, and then to the primary again."""
    with rig.lagging_replica() as replica:
        rig.proxy.forward_to(replica.port)
        rig.proxy.reset()
        asked = _once_it_grows(lambda: _misses_and_refusals(replica.client))
        yield asked
        rig.proxy.forward_to(rig.node.port)
        rig.proxy.reset()


def _misses_and_refusals(client: Any) -> int:
    refused = client.info("errorstats").get("errorstat_READONLY", {"count": 0})["count"]
    roles = client.info("commandstats").get("cmdstat_hello", {"calls": 0})["calls"]
    return int(client.info("stats")["keyspace_misses"] + refused + roles)


# --- the server's process ---


@contextlib.contextmanager
def stands_still(rig: Rig) -> Iterator[HasStruck]:
    rig.signal(signal.SIGSTOP)
    yield _once_it_grows(lambda: rig.proxy.to_server.bytes)
    rig.signal(signal.SIGCONT)


@mended_by_itself
def is_killed_and_has_its_append_only_file(rig: Rig) -> int:
    hit = rig.proxy.open_connections
    rig.client.config_set("appendfsync", "no")  # a killed process loses nothing that it has written
    rig.client.config_set("appendonly", "yes")
    wait_until(lambda: rig.client.info("persistence")["aof_rewrite_in_progress"] == 0)
    wait_until(lambda: rig.client.info("persistence")["aof_rewrite_scheduled"] == 0)
    rig.restart(appendonly="yes", appendfsync="no")
    rig.client.config_set("appendonly", "no")
    return hit


@mended_by_itself
def is_restarted_and_has_its_snapshot(rig: Rig) -> int:
    hit = rig.proxy.open_connections
    rig.save()
    rig.restart()
    return hit


@contextlib.contextmanager
def is_away_and_then_loads_its_data(rig: Rig) -> Iterator[HasStruck]:
    """`LOADING`, for as long as 2 ms a key take, and not before the fault is mended."""
    rig.save()
    yield _once_it_grows(lambda: rig.proxy.refused)
    slowly = {"key-load-delay": 2000, "loading-process-events-interval-bytes": 1024}
    rig.restart(ready=False, **slowly)
    wait_until(lambda: answers(rig.client))
    rig.client.config_set("key-load-delay", 0)


# --- what the server refuses ---


@mended_by_itself
def kills_our_connections(rig: AnyRig) -> int:
    return rig.disconnect()


@contextlib.contextmanager
def takes_no_more_clients(rig: AnyRig) -> Iterator[HasStruck]:
    rejected = _once_it_grows(rig.rejected)
    _configure(rig, maxclients=1)
    rig.disconnect()
    yield rejected
    _configure(rig, maxclients=1000)


def _configure(rig: AnyRig, **config: Any) -> None:
    for client in rig.clients:
        for name, value in config.items():
            client.config_set(name.replace("_", "-"), value)


@contextlib.contextmanager
def becomes_a_replica(rig: Rig) -> Iterator[HasStruck]:
    """`READONLY`, as after a failover."""
    rig.client.replicaof("127.0.0.1", 1)
    yield _once_refused(rig, "READONLY")
    rig.client.replicaof("NO", "ONE")


@contextlib.contextmanager
def lacks_replicas(rig: AnyRig) -> Iterator[HasStruck]:
    """`NOREPLICAS`, as for a moment in every failover of a server that has min-replicas-to-write"""
    _configure(rig, min_replicas_to_write=9)
    yield _once_refused(rig, "NOREPLICAS")
    _configure(rig, min_replicas_to_write=0)


@contextlib.contextmanager
def runs_a_long_script(rig: Rig) -> Iterator[HasStruck]:
    """`BUSY`"""
    rig.client.config_set("busy-reply-threshold", 1)

    def run() -> None:
        client = patient_client(rig.node)
        with client, contextlib.suppress(valkey.ResponseError):
            client.eval("while true do end", 0)

    script = threading.Thread(target=run)
    script.start()
    wait_until(lambda: _is_busy(rig))
    yield _once_it_grows(lambda: rig.proxy.to_server.bytes)
    rig.client.script_kill()
    script.join()


def _is_busy(rig: Rig) -> bool:
    try:
        rig.client.get("busy")
    except valkey.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@contextlib.contextmanager
def is_full(rig: AnyRig) -> Iterator[HasStruck]:
    _configure(rig, maxmemory=1)
    yield _once_refused(rig, "OOM")
    _configure(rig, maxmemory=0)


@contextlib.contextmanager
def cannot_save(rig: Rig) -> Iterator[HasStruck]:
    """`MISCONF`"""
    directory = rig.client.config_get("dir")["dir"]
    rig.client.config_set("dir", "/proc")
    rig.client.config_set("save", "3600 1")
    rig.client.bgsave()
    wait_until(lambda: rig.client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield _once_refused(rig, "MISCONF")
    rig.client.config_set("save", "")
    rig.client.config_set("dir", directory)


@contextlib.contextmanager
def wants_a_password(rig: Rig) -> Iterator[HasStruck]:
    """`NOAUTH`"""
    rig.client.config_set("requirepass", "secret")
    rig.disconnect()
    yield _once_refused(rig, "NOAUTH")
    rig.client.config_set("requirepass", "")


@contextlib.contextmanager
def has_another_password_for_the_user(rig: Rig) -> Iterator[HasStruck]:
    """`WRONGPASS`"""
    rig.client.acl_setuser(rig.user, enabled=True, reset_passwords=True, passwords="+another")
    rig.disconnect()
    yield _once_refused(rig, "WRONGPASS")
    rig.client.acl_setuser(rig.user, enabled=True, reset_passwords=True, passwords="+secret")


def _forbids(*names: str) -> Fault:
    @contextlib.contextmanager
    def fault(rig: AnyRig) -> Iterator[HasStruck]:
        _allow(rig, [f"-{name}" for name in names])
        yield _once_refused(rig, "NOPERM")
        _allow(rig, [f"+{name}" for name in names])

    fault.__doc__ = "`NOPERM`"
    fault.__name__ = f"forbids_{'_and_'.join(names)}"
    return fault


def _allow(rig: AnyRig, commands: list[str]) -> None:
    for client in rig.clients:
        client.acl_setuser(rig.user, enabled=True, commands=commands)


forbids_set = _forbids("set")
forbids_get = _forbids("get")
forbids_unlink = _forbids("unlink")


# --- what destroys data ---


@mended_by_itself
def is_restarted_empty(rig: Rig) -> int:
    hit = len(rig.data_keys())
    rig.restart_empty()
    return hit


@mended_by_itself
def is_flushed(rig: AnyRig) -> int:
    hit = len(rig.data_keys())
    rig.flush()
    return hit


def _damages(name: str, script: str) -> Fault:
    """Have the server run `script` on a third of our data keys, at once for each."""

    def strike(rig: AnyRig) -> int:
        keys = _some_data_keys(rig)
        rig.damaged |= {key.decode() for key in keys}
        for key in keys:
            rig.client.eval(script, 1, key)
        return len(keys)

    strike.__name__ = name
    return mended_by_itself(strike)


loses_some_keys = _damages("loses_some_keys", "redis.call('UNLINK', KEYS[1])")
has_foreign_values_under_our_keys = _damages(
    "has_foreign_values_under_our_keys",
    "if redis.call('UNLINK', KEYS[1]) == 1 then redis.call('SADD', KEYS[1], 'foreign') end",
)
flips_bits = _damages(
    "flips_bits",
    """
    if redis.call('TYPE', KEYS[1]).ok == 'string' then
        local bits = redis.call('STRLEN', KEYS[1]) * 8
        local middle = math.floor(bits / 2)
        redis.call('SETBIT', KEYS[1], middle, 1 - redis.call('GETBIT', KEYS[1], middle))
    end
    """,
)


def _some_data_keys(rig: AnyRig) -> list[bytes]:
    keys = rig.data_keys()
    return rig.random.sample(keys, (len(keys) + 2) // 3)


# --- replicas of a cluster, or of a primary that Sentinels watch ---


@contextlib.contextmanager
def loses_a_primary(rig: TopologyRig) -> Iterator[HasStruck]:
    """A primary is killed; later it comes back empty, as a replica of the one that followed it."""
    killed = rig.a_primary()
    killed.kill()
    rig.wait_until_followed(killed)
    yield lambda: True
    rig.servers.restart(killed)
    rig.servers.wait_until_whole()


@contextlib.contextmanager
def loses_a_replica(rig: TopologyRig) -> Iterator[HasStruck]:
    killed = rig.replica_of(rig.a_primary())
    killed.kill()
    yield lambda: True
    rig.servers.restart(killed)
    rig.servers.wait_until_whole()


@contextlib.contextmanager
def has_a_primary_that_stands_still(rig: TopologyRig) -> Iterator[HasStruck]:
    """Until another has become the primary in its place, and for a while more."""
    paused = rig.a_primary()
    with paused.paused():
        rig.wait_until_followed(paused)
        yield lambda: True
    rig.servers.wait_until_whole()


@mended_by_itself
def fails_over_as_asked(rig: TopologyRig) -> int:
    if isinstance(rig.servers, Cluster):
        rig.servers.failover(rig.replica_of(rig.a_primary()))
    else:
        rig.servers.failover()
    rig.servers.wait_until_whole()
    return 1


def _moves_a_slot(name: str, choose: Callable[[TopologyRig], list[bytes]]) -> Fault:
    def strike(rig: TopologyRig) -> int:
        """Of a key that `choose` gives, with all that is in it, to another primary."""
        assert isinstance(rig.servers, Cluster)
        keys = choose(rig)
        if not keys:
            return 0
        key = rig.random.choice(keys)
        owner = rig.servers.primary_of(key)
        to = rig.random.choice([node for node in rig.primaries() if node is not owner])
        moved = 0
        for moved in rig.servers.migration(key_slot(key), to):  # noqa: B007
            pass
        rig.servers.wait_until_whole()
        return moved

    strike.__name__ = name
    return mended_by_itself(strike)


moves_a_slot_of_data = _moves_a_slot("moves_a_slot_of_data", lambda rig: rig.data_keys())
moves_the_slot_of_the_metadata = _moves_a_slot(
    "moves_the_slot_of_the_metadata", lambda rig: [INDEX.encode()]
)


@contextlib.contextmanager
def loses_a_sentinel(rig: TopologyRig) -> Iterator[HasStruck]:
    """The first that clients are given."""
    assert isinstance(rig.servers, SentinelGroup)
    (killed, *_) = rig.servers.sentinels
    killed.kill()
    # Only who connects asks a Sentinel.
    disconnected = rig.disconnect()
    yield lambda: disconnected > 0
    killed.start()
    wait_until(killed.serves)


# --- the overflow ---


@contextlib.contextmanager
def hangs(share: HangingDirectory) -> Iterator[HasStruck]:
    """The overflow answers nothing, while Valkey is well."""
    share.hang()
    yield lambda: bool(share.held)
    share.go_on()


@contextlib.contextmanager
def fails(share: HangingDirectory) -> Iterator[HasStruck]:
    """The overflow answers everything with an error, while Valkey is well."""
    before = share.refused
    share.fail()
    yield lambda: share.refused > before
    share.go_on()


PASSING: list[Fault] = [
    resets_connections,
    resets_after_some_more_bytes,
    refuses_connections,
    stalls,
    delays,
    trickles,
    stands_still,
    is_killed_and_has_its_append_only_file,
    is_restarted_and_has_its_snapshot,
    is_away_and_then_loads_its_data,
    kills_our_connections,
    takes_no_more_clients,
    becomes_a_replica,
    lacks_replicas,
    runs_a_long_script,
]
REFUSING: list[Fault] = [
    is_full,
    cannot_save,
    wants_a_password,
    forbids_set,
    forbids_get,
    forbids_unlink,
]
DESTROYING: list[Fault] = [
    is_restarted_empty,
    is_flushed,
    loses_some_keys,
    has_foreign_values_under_our_keys,
    flips_bits,
]
