"""Checks of a server before objects are spilled to it.

Each check raises one error that names the problem and its fix. Ray's head start runs them all and
stops at the first error; `ray-valkey-spill check` reports every check.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ray_valkey_spill.config import MIN_CHUNK_SIZE, Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    MissingCommandError,
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
from ray_valkey_spill.protocol.resp import command, fetch
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

# Seconds for which a head start tries a server that does not answer. Including the last attempt and
# the import of Ray, a failing `ray start --head` then takes under five seconds.
HEAD_START_PATIENCE = 1.5

# Every command that this package sends to any server, except those that any user may run.
COMMANDS = (
    *("EXISTS", "GET", "GETRANGE", "INFO", "SET", "STRLEN", "UNLINK", "EVAL", "TIME"),
    *("ZADD", "ZRANGE", "ZRANGEBYLEX", "ZREM", "ZSCORE"),
    *("HDEL", "HGET", "HSCAN", "HSET", "HSETNX", "HVALS"),
)
# Seconds after which a string that was tried expires, if this process is killed before that.
_TRIAL = 60
# Random keys to try until one lies on a given shard; enough for a thousand shards.
_TRIES = 10_000

# Bytes of replies that a connection may have under way, and the most chunks to request for that.
_UNDER_WAY, _MOST_CHUNKS = 8 * MIB, 100
# Limits for which a server closes connections, and the fields of `INFO stats` that count these. Not
# every version has all of them.
_WRITING_LIMITS = {
    "client-query-buffer-limit": "client_query_buffer_limit_disconnections",
    "maxmemory-clients": "evicted_clients",
}
_READING_LIMITS = {
    "client-output-buffer-limit": "client_output_buffer_limit_disconnections",
    "maxmemory-clients": "evicted_clients",
}

# Commands that this package sends to nodes of a cluster only.
_CLUSTER_COMMANDS = ("CLUSTER|SLOTS", "ASKING")


def acl_rules(config: Config) -> str:
    """Return the least rules for `ACL SETUSER` with which everything works.

    They always include the cluster's commands, which reveal nothing to a user of a single server.
    """
    commands = [*COMMANDS, *_CLUSTER_COMMANDS]
    if config.address.db:
        commands.append("SELECT")
    if config.min_replicas:
        commands.append("WAIT")
    if config.wait_aof:
        commands.append("WAITAOF")
    keys = Keyspace.of(config)
    allowed = " ".join(f"+{name.lower()}" for name in commands)
    return f"~{keys.root}* ~{keys.namespaces} {allowed}"


def run_all(config: Config) -> ServerInfo:
    """Check the server, or each server of a cluster, as Ray's head start does.

    Takes at most a few seconds, or `retry_timeout` while the server is loading. Logs
    `tenancy_warning`, which Python prints to the terminal if logging is not configured.

    Returns:
        INFO of the server; in a cluster, of the shard with the metadata.

    Raises:
        ConfigError, ServerError: the first problem.
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
    """Require that every server with keys answers INFO in the Valkey protocol, and return the INFO.

    Raises:
        ServerError, ConfigError: one does not.
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
                f"Valkey at {config.address} requires a password",
                "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as it has them",
            ) from None
        raise
    except ServerError as error:
        if isinstance(error, NotValkeyError):
            raise
        raise _failing(config, ["INFO"], error) from None


def check_serving(link: Link, config: Config) -> None:
    """Require that the server has loaded its data, before which it may already answer INFO.

    Does not check permissions.

    Raises:
        ServerUnavailableError: it is still loading, or cannot serve.
    """
    try:
        list(link.run([command("GET", f"{Keyspace.of(config).root}preflight")]))
    except ServerUnavailableError as error:
        raise _unavailable(error) from None


def check_topology(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Require that the servers take writes.

    Raises:
        ConfigError: one is a Sentinel or a replica.
    """
    for info in infos.values():
        if info.mode == "sentinel":
            raise ConfigError(
                f"the server at {config.address} is a Sentinel",
                "Give the name of its service as sentinel_service, or the url of the primary",
            )
        if info.role != "master" and info.mode != "cluster":
            raise ConfigError(
                f"Valkey at {config.address} is a replica, which takes no writes",
                "Give the url of its primary, or of Sentinels and their sentinel_service",
            )


def check_replicas(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Require the replicas and append-only files that `min_replicas` and `wait_aof` wait for.

    Raises:
        ConfigError: a server lacks them.
    """
    for endpoint, info in infos.items():
        if info.replicas < config.min_replicas:
            raise ConfigError(
                f"Valkey at {endpoint} has {info.replicas} replicas, and min_replicas is "
                f"{config.min_replicas}: no spill could ever succeed",
                "Add replicas, or lower min_replicas",
            )
        if config.wait_aof and not info.aof:
            raise ConfigError(
                f"Valkey at {endpoint} has no append-only file, and wait_aof waits for it",
                "Set appendonly yes on it and its replicas, or wait_aof to false",
            )


def check_policy(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Require that no server evicts keys without a TTL, unless `allow_eviction` is set.

    Raises:
        ConfigError: one does.
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
    """Return a warning about a server that can evict keys of others, and the advice for it.

    Returns:
        None if `max_bytes` is set, if nothing can be evicted, or if no memory is limited.
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
        "the overflow takes the rest" if config.overflow_uri else "spills wait once it is used up"
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
    """Require that each server runs every command that spilling needs, on keys below our prefix.

    Tries the commands on separate keys, and removes these. A full server passes, because it may
    have room by the first spill.

    Raises:
        ServerRefusedError: a server refuses a command.
        ServerUnavailableError: a server cannot run it now, for example without enough replicas.
    """
    for endpoint in infos:
        base = _base_at(link, config, endpoint)
        if base is None:
            continue
        try:
            _try_commands(link, config, endpoint, base, is_cluster=not link.is_single)
        except ServerUnavailableError as error:
            raise _unavailable(error) from None


def _base_at(link: Link, config: Config, endpoint: Endpoint) -> str | None:
    """Return a prefix for keys of a server; None if the server has just lost its slots."""
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
    # The removing commands come first: without them nothing may be written.
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
        "GETRANGE": command("GETRANGE", value, 0, 0),
        "STRLEN": command("STRLEN", value),
        "TIME": command("TIME"),
        "EVAL": command("EVAL", "return 1", 1, value),
    }
    if is_cluster:
        harmless["ASKING"] = command("ASKING")
    if config.wait_aof:
        harmless["WAITAOF"] = command("WAITAOF", 0, 0, 1)
    if config.min_replicas:
        harmless["WAIT"] = command("WAIT", 0, 1)
    for request in harmless.values():
        request.target = endpoint
    writing = {
        "ZADD": command("ZADD", index, 0, "x"),
        "HSET": command("HSET", table, "x", "x"),
        "HSETNX": command("HSETNX", table, "x", "x"),
        "SET": command("SET", value, "x", "EX", _TRIAL),
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
    failed = {
        name: trial.error
        for name, trial in trials.items()
        if trial.error is not None and not isinstance(trial.error, ServerFullError)
    }
    if failed:
        # An error with a hint has nothing to do with the command.
        first, error = next(iter(failed.items()))
        names = [first] if _own_hint(error) else [*failed]
        raise _failing(config, names, error, endpoint if is_cluster else None)


def check_chunk_size(link: Link, config: Config, infos: Mapping[Endpoint, ServerInfo]) -> None:
    """Require that each server, and any proxy before it, takes and returns values of chunk_size.

    Tries it below our prefix if the server has free memory for it, and removes the values.

    Raises:
        ServerRefusedError: it does not; names the limit, and the longest chunks that work, if any.
        ServerUnavailableError: a server cannot be reached any more.
    """
    overhead = TAG_SIZE if config.encryption_key_file is not None else 0
    # This link tries every request twice: a connection may break once by chance.
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
        link: for requests that must work.
        probe: for requests that may break connections.
        endpoint: the server.
        key: key of the values; it is removed after each.
        overhead: bytes by which a stored chunk may be longer than its data.
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
        """Return why chunks of this size cannot be written or read; None if they can be."""
        size = chunk_size + self._overhead
        before = self._stats()
        is_written = False
        try:
            self._probe.execute(command("SET", self._key, bytes(size), "EX", _TRIAL))
            is_written = True
            count = min(max(2, _UNDER_WAY // size), _MOST_CHUNKS)
            # Without `expected`, all are sent at once, however fast this process reads.
            for _ in self._probe.run(fetch(self._key) for _ in range(count)):
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
        """Return the longest chunk size that works, out of 1/2, 1/4, 1/8, … of `chunk_size`."""
        while (chunk_size := chunk_size // 2) >= MIN_CHUNK_SIZE:
            if self.problem(chunk_size) is None:
                return chunk_size
        return None

    def _stats(self) -> dict[str, str]:
        request = command("INFO")
        request.target = self._endpoint
        (text,) = self._link.execute(request)
        return fields_of(text.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Values cannot be `done` ("written" or "read") because of `limits`."""

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


def _own_hint(error: ServerError) -> str:
    """Return the error's hint; none for a missing command, since its hint leads to this check."""
    return "" if isinstance(error, MissingCommandError) else error.hint


def _failing(
    config: Config, names: list[str], error: ServerError, shard: Endpoint | None = None
) -> ServerRefusedError:
    """Return the error for a server that does not know commands, or on which they fail."""
    return ServerRefusedError(
        f"Valkey at {shard or config.address} fails {', '.join(names)}: {error.message}",
        _own_hint(error)
        or f"Spilling needs {', '.join(names)}: look for rename-command, for a proxy that does not "
        "pass it on, or for a managed service that has it switched off",
    )


def _unavailable(error: ServerUnavailableError) -> ServerUnavailableError:
    hint = error.hint or (
        "Start it, or correct url (valkeys:// if it wants TLS, valkey:// if not); every node of "
        "the Ray cluster must reach it"
    )
    return ServerUnavailableError(f"Valkey at {error.message}", hint)
