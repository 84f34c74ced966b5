"""What has to be true of a server before objects are entrusted to it.

Each check raises one error that says what is wrong and how to fix it. Ray's head start runs them
all and stops at the first; `ray-valkey-spill check` reports each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ray_valkey_spill.config import MIN_CHUNK_SIZE, Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ProtocolError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import Keyspace, new_attempt
from ray_valkey_spill.format.sealing import TAG_SIZE, KeyRing
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import command, fetch, store
from ray_valkey_spill.protocol.server_info import ServerInfo, fields_of
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.room import free_room, margin
from ray_valkey_spill.units import MIB

__all__ = [
    "COMMANDS",
    "HEAD_START_PATIENCE",
    "acl_rules",
    "check_chunk_size",
    "check_permissions",
    "check_policy",
    "check_reachable",
    "check_replicas",
    "check_serving",
    "check_topology",
    "run_all",
    "tenancy_warning",
]

logger = logging.getLogger("ray_valkey_spill")

# Seconds for which a head start tries a server that does not answer. With the time one attempt may
# take, and with the import of Ray, that keeps a failing `ray start --head` under five seconds.
HEAD_START_PATIENCE = 1.5

# Every command that this package sends to any server, but those that any user may run.
COMMANDS = (
    *("EXISTS", "GET", "INFO", "SET", "STRLEN", "UNLINK", "EVAL", "TIME"),
    *("ZADD", "ZRANGE", "ZRANGEBYLEX", "ZREM", "ZSCORE"),
    *("HDEL", "HGET", "HSCAN", "HSET", "HSETNX", "HVALS"),
)
# A key lies on one of a thousand shards, if there were as many, within this many tries.
_TRIES = 10_000

# Bytes of replies that a connection may have under way, in chunks, but no more of them than this.
_UNDER_WAY, _MOST_CHUNKS = 8 * MIB, 100
# Settings for which a server closes connections, and the fields of `INFO stats` that count those
# closed; not all versions have all of them.
_WRITING_LIMITS = {
    "client-query-buffer-limit": "client_query_buffer_limit_disconnections",
    "maxmemory-clients": "evicted_clients",
}
_READING_LIMITS = {
    "client-output-buffer-limit": "client_output_buffer_limit_disconnections",
    "maxmemory-clients": "evicted_clients",
}

# And to the nodes of a cluster.
_CLUSTER_COMMANDS = ("CLUSTER|SLOTS", "ASKING")


def acl_rules(config: Config) -> str:
    """What `ACL SETUSER` has to give a user: the least with which everything works.

    A cluster is found out by asking; those of its commands tell nothing to a user of one server.
    """
    commands = [*COMMANDS, *_CLUSTER_COMMANDS]
    if config.address.db:
        commands.append("SELECT")
    if config.wait_aof or config.min_replicas:
        commands.append("WAITAOF" if config.wait_aof else "WAIT")
    keys = Keyspace.of(config)
    allowed = " ".join(f"+{name.lower()}" for name in commands)
    return f"~{keys.root}* ~{keys.namespaces} {allowed}"


def run_all(config: Config) -> ServerInfo:
    """Check the server, or each of a cluster, as Ray's head start does.

    Takes at most a few seconds, or `retry_timeout` if the server answers that it is loading. Logs
    `tenancy_warning`, which Python prints to the terminal where nobody has set up logging.

    Returns:
        What the server tells of itself; of a cluster, the one that has the books.

    Raises:
        ConfigError, ServerError: the first thing that is wrong.
    """
    patience = min(HEAD_START_PATIENCE, config.retry_timeout)
    link = link_to(config, unreachable_timeout=patience, any_role=True)
    if (keys := KeyRing.of(config)) is not None:
        keys.current()
    try:
        infos = check_reachable(link, config)
        check_topology(config, infos)
        check_serving(link, config)
        check_replicas(config, infos)
        check_policy(config, infos)
        check_permissions(link, config, infos)
        check_chunk_size(link, config, infos)
        if (warning := tenancy_warning(config, infos)) is not None:
            logger.warning("%s. %s", *warning)
        return next(iter(infos.values()))
    finally:
        link.close()


def check_reachable(link: Link, config: Config) -> dict[Endpoint, ServerInfo]:
    """All servers that have keys answer in the Valkey protocol, and may be asked what they are.

    Raises:
        ServerError, ConfigError
    """
    try:
        return link.infos()
    except ServerUnavailableError as error:
        raise _unavailable(error) from None
    except ServerRefusedError as error:
        if "cluster|slots" in error.message:
            raise _not_permitted(config, ["CLUSTER SLOTS"]) from None
        if "'select'" in error.message:
            raise _not_permitted(config, ["SELECT"]) from None
        if error.message.startswith("NOPERM"):
            raise _not_permitted(config, ["INFO"]) from None
        if error.message.startswith("NOAUTH"):
            raise ServerRefusedError(
                f"Valkey at {config.address} asks for a password",
                "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as it has them",
            ) from None
        raise
    except ServerError as error:
        if isinstance(error, NotValkeyError):
            raise
        raise ServerError(
            f"Valkey at {config.address} fails INFO: {error}", "Let it run INFO"
        ) from None


def check_serving(link: Link, config: Config) -> None:
    """The server has its data loaded; it may answer INFO before. Permissions are looked at later.

    Raises:
        ServerUnavailableError
    """
    try:
        list(link.run([command("GET", f"{Keyspace.of(config).root}preflight")]))
    except ServerUnavailableError as error:
        raise _unavailable(error) from None


def check_topology(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """What answers takes writes.

    Raises:
        ConfigError
    """
    for info in infos.values():
        if info.mode == "sentinel":
            raise ConfigError(
                f"what answers at {config.address} is a Sentinel",
                "Give the name of what it watches as sentinel_service, or the url of the primary",
            )
        if info.role != "master" and info.mode != "cluster":
            raise ConfigError(
                f"Valkey at {config.address} is a replica, which takes no writes",
                "Give the url of its primary, or of Sentinels and their sentinel_service",
            )


def check_replicas(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """There is what `min_replicas` and `wait_aof` wait for.

    Raises:
        ConfigError
    """
    for endpoint, info in infos.items():
        if info.replicas < config.min_replicas:
            raise ConfigError(
                f"Valkey at {endpoint} has {info.replicas} replicas, and min_replicas is "
                f"{config.min_replicas}: no spill could ever be done",
                "Give it as many, or lower min_replicas",
            )
        if config.wait_aof and not info.aof:
            raise ConfigError(
                f"Valkey at {endpoint} has no append-only file, and wait_aof waits for it",
                "Set appendonly yes on it and its replicas, or wait_aof to false",
            )


def check_policy(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """No server evicts keys without a TTL, or all may.

    Raises:
        ConfigError
    """
    for endpoint, info in infos.items():
        if info.memory.evicts_all and not config.allow_eviction:
            raise ConfigError(
                f"Valkey at {endpoint} has maxmemory-policy {info.memory.policy}, which evicts "
                "spilled objects first, since they are read least",
                "Set maxmemory-policy volatile-lru and give the caches beside it TTLs (spilled "
                "objects have none, so they are never evicted then), or accept lost objects with "
                "allow_eviction=true",
            )


def tenancy_warning(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> tuple[str, str] | None:
    """What to know of a server that evicts keys of others, and what to do about it.

    Returns:
        None if `max_bytes` says how much of it spilling may take, if nothing there can be evicted,
        or if no memory is limited.
    """
    evicting = {
        endpoint: info.memory
        for endpoint, info in infos.items()
        if info.memory.maxmemory and info.memory.evicts_others
    }
    if config.max_bytes is not None or not evicting:
        return None
    endpoint, memory = min(evicting.items(), key=lambda each: free_room(each[1]))
    free = len(infos) * max(0, free_room(memory))
    rest = (
        "the rest goes to the overflow" if config.overflow_uri else "spills wait once it is used up"
    )
    keys = "keys" if memory.evicts_all else f"keys with a TTL ({memory.volatile:,})"
    what = (
        f"Valkey at {endpoint} has {keys} that maxmemory-policy {memory.policy} may "
        f"evict, and no max_bytes is given: spilling takes free memory only, {free / MIB:,.0f} MiB "
        f"now, and {rest}"
    )
    advice = "Give max_bytes, how much of the server Ray may take, evicting such keys if need be"
    return what, advice + ("" if config.overflow_uri else ", or an overflow_uri")


def check_permissions(link: Link, config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Each server runs every command that spilling needs, on keys below our prefix.

    Tries them on keys of its own and leaves nothing behind. A server that is full passes: that is
    for a spill to find, and may be over by then.

    Raises:
        ServerRefusedError: it does not.
        ServerUnavailableError: it cannot now, such as without the replicas that it wants.
    """
    for endpoint, info in infos.items():
        base = _base_at(link, config, endpoint)
        if base is None:
            continue
        try:
            _try_commands(link, config, endpoint, base, is_cluster=info.mode == "cluster")
        except ServerUnavailableError as error:
            raise _unavailable(error) from None


def _base_at(link: Link, config: Config, endpoint: Endpoint) -> str | None:
    """What keys of a server can begin with; None if it has just lost its slots to another."""
    for _ in range(_TRIES):
        # The part in braces alone decides which server of a cluster has a key.
        base = f"{Keyspace.of(config).root}preflight:{{{new_attempt()}}}"
        if link.owner(base) == endpoint:
            return base
    return None


def _try_commands(
    link: Link, config: Config, endpoint: Endpoint, base: str, *, is_cluster: bool
) -> None:
    value, index, table = (f"{base}:{kind}" for kind in ("value", "index", "table"))
    unlink = command("UNLINK", value, index, table)
    # What removes comes first: without it nothing may be written.
    harmless = {
        "UNLINK": unlink,
        "ZREM": command("ZREM", index, "x"),
        "ZRANGE": command("ZRANGE", index, 0, -1, "WITHSCORES"),
        "ZRANGEBYLEX": command("ZRANGEBYLEX", index, "-", "+", "LIMIT", 0, 1),
        "ZSCORE": command("ZSCORE", index, "x"),
        "HDEL": command("HDEL", table, "x"),
        "HGET": command("HGET", table, "x"),
        "HSCAN": command("HSCAN", table, 0),
        "HVALS": command("HVALS", table),
        "EXISTS": command("EXISTS", value),
        "GET": command("GET", value),
        "STRLEN": command("STRLEN", value),
        "TIME": command("TIME"),
        "EVAL": command("EVAL", "return 1", 1, value),
    }
    if is_cluster:
        harmless["ASKING"] = command("ASKING")
    if config.wait_aof:
        harmless["WAITAOF"] = command("WAITAOF", 0, 0, 1)
    elif config.min_replicas:
        harmless["WAIT"] = command("WAIT", 0, 1)
    for request in harmless.values():
        request.target = endpoint
    writing = {
        "ZADD": command("ZADD", index, 0, "x"),
        "HSET": command("HSET", table, "x", "x"),
        "HSETNX": command("HSETNX", table, "x", "x"),
        "SET": command("SET", value, "x"),
    }
    list(link.run(harmless.values()))
    if unlink.error is None:
        list(link.run([*writing.values(), command("UNLINK", value, index, table)]))
    trials = {**harmless, **writing}
    refused = [
        name for name, trial in trials.items() if isinstance(trial.error, ServerRefusedError)
    ]
    if refused:
        raise _not_permitted(config, refused, endpoint if is_cluster else None)
    for name, trial in trials.items():
        if trial.error is not None and not isinstance(trial.error, ServerFullError):
            raise ServerRefusedError(
                f"Valkey at {config.address} fails {name}: {trial.error.message}",
                trial.error.hint or f"Let it run {', '.join(COMMANDS)}, as they are named here",
            )


def check_chunk_size(link: Link, config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Each server, and any proxy before it, takes and returns values as long as chunks are.

    Tries that below our prefix, as far as there is free memory for it, and leaves nothing behind.

    Raises:
        ServerRefusedError: names the limit, and the longest chunks that work if there are any.
        ServerUnavailableError: a server cannot be reached any more.
    """
    overhead = TAG_SIZE if config.encryption_key_file is not None else 0
    # It tries everything twice: a connection that breaks once may do so by chance.
    probe = link_to(config, unreachable_timeout=0)
    try:
        for endpoint, info in infos.items():
            base = _base_at(link, config, endpoint)
            memory = info.memory
            free = memory.maxmemory - memory.used - margin(memory.maxmemory)
            # A chunk, and as much for the server's buffers.
            if base is None or (memory.maxmemory and free < 2 * config.chunk_size):
                continue
            trial = _Trial(link, probe, endpoint, f"{base}:value", overhead)
            problem = trial.problem(config.chunk_size)
            if problem is not None:
                raise problem.error(endpoint, config.chunk_size, trial.longest(config.chunk_size))
    except ServerUnavailableError as error:
        raise _unavailable(error) from None
    finally:
        probe.close()


class _Trial:
    """Writes and reads values of different lengths.

    Args:
        link: for what has to work.
        probe: for what may break connections.
        endpoint: the server.
        key: of the values; it is removed after each.
        overhead: by how much what is stored of a chunk may be longer than the chunk, in bytes.
    """

    def __init__(
        self, link: Link, probe: Link, endpoint: Endpoint, key: str, overhead: int
    ) -> None:
        self._link = link
        self._probe = probe
        self._endpoint = endpoint
        self._key = key
        self._overhead = overhead

    def problem(self, chunk_size: int) -> _Problem | None:
        """What keeps chunks of this size from being written and read, if anything does."""
        size = chunk_size + self._overhead
        before = self._stats()
        is_written = False
        try:
            self._probe.execute(store(self._key, [bytes(size)]))
            is_written = True
            count = min(max(2, _UNDER_WAY // size), _MOST_CHUNKS)
            for _ in self._probe.run(fetch(self._key, expected=size) for _ in range(count)):
                pass
        except ServerFullError:
            return None
        except ProtocolError as error:
            return _Problem("written", "proto-max-bulk-len", error.message)
        except ServerUnavailableError as error:
            after = self._stats()
            limits = _READING_LIMITS if is_written else _WRITING_LIMITS
            met = [
                limit for limit, field in limits.items() if after.get(field) != before.get(field)
            ]
            uncounted = [limit for limit, field in limits.items() if field not in after]
            return _Problem(
                "read" if is_written else "written",
                " or ".join(met or [*uncounted, "the limits of a proxy"]),
                f"the connection breaks: {error.__cause__}",
            )
        finally:
            self._link.execute(command("UNLINK", self._key))
        return None

    def longest(self, chunk_size: int) -> int | None:
        """The longest chunks that work, of those 2, 4, 8, … times shorter than `chunk_size`."""
        while (chunk_size := chunk_size // 2) >= MIN_CHUNK_SIZE:
            if self.problem(chunk_size) is None:
                return chunk_size
        return None

    def _stats(self) -> dict[str, str]:
        request = command("INFO", "stats")
        request.target = self._endpoint
        (text,) = self._link.execute(request)
        return fields_of(text.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Values cannot be `done`, "written" or "read", because of `limits`."""

    done: str
    limits: str
    reason: str

    def error(self, endpoint: Endpoint, size: int, longest: int | None) -> ServerRefusedError:
        lower = f", or lower chunk_size to at most {longest}" if longest is not None else ""
        return ServerRefusedError(
            f"values of chunk_size, {size} bytes, cannot be {self.done} at {endpoint} because of "
            f"{self.limits} ({self.reason})",
            f"Raise that limit{lower}",
        )


def _not_permitted(
    config: Config, refused: list[str], shard: Endpoint | None = None
) -> ServerRefusedError:
    username = config.address.username
    user = f"user {username!r}" if username else "the default user"
    return ServerRefusedError(
        f"Valkey at {shard or config.address} does not let {user} run {', '.join(refused)} on keys "
        f"below {Keyspace.of(config).root}",
        f"Grant it {acl_rules(config)}",
    )


def _unavailable(error: ServerUnavailableError) -> ServerUnavailableError:
    hint = error.hint or (
        "Start it, or correct url (valkeys:// if it wants TLS, valkey:// if not); every node of "
        "the Ray cluster must reach it"
    )
    return ServerUnavailableError(f"Valkey at {error.message}", hint)
