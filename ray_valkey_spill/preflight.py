"""What has to be true of a server before objects are entrusted to it.

Each check raises one error that says what is wrong and how to mend it. Ray's head start runs them
all and stops at the first; `ray-valkey-spill check` reports each.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray_valkey_spill.config import Config, Endpoint
from ray_valkey_spill.errors import (
    ConfigError,
    NotValkeyError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.keys import Keyspace, new_attempt
from ray_valkey_spill.resp import command
from ray_valkey_spill.sealing import KeyRing
from ray_valkey_spill.server_info import ServerInfo
from ray_valkey_spill.wire import Link

__all__ = [
    "COMMANDS",
    "HEAD_START_PATIENCE",
    "acl_rules",
    "check_permissions",
    "check_policy",
    "check_reachable",
    "check_replicas",
    "check_serving",
    "check_topology",
    "run_all",
]

# Seconds for which a head start tries a server that does not answer. With the time one attempt may
# take, and with the import of Ray, that keeps a failing `ray start --head` under five seconds.
HEAD_START_PATIENCE = 1.5

# Every command that this package sends to any server, but those that any user may run.
COMMANDS = (
    *("GET", "INFO", "SET", "STRLEN", "UNLINK", "EVAL", "TIME"),
    *("ZADD", "ZRANGE", "ZRANGEBYLEX", "ZREM", "ZSCORE"),
    *("HDEL", "HGET", "HGETALL", "HSET", "HSETNX", "HVALS"),
)
# A key lies on one of a thousand shards, if there were as many, within this many tries.
_TRIES = 10_000

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
    return f"~{Keyspace.of(config).root}* {' '.join(f'+{name.lower()}' for name in commands)}"


def run_all(config: Config) -> ServerInfo:
    """Check the server, or each of a cluster, as Ray's head start does.

    Takes at most a few seconds, or `retry_timeout` if the server answers that it is loading.

    Returns:
        What the server tells of itself; of a cluster, the one that has the books.

    Raises:
        ConfigError, ServerError: the first thing that is wrong.
    """
    link = Link(config, unreachable_timeout=min(HEAD_START_PATIENCE, config.retry_timeout))
    if (keys := KeyRing.of(config)) is not None:
        keys.current()
    try:
        infos = check_reachable(link, config)
        check_topology(config, infos)
        check_serving(link, config)
        check_replicas(config, infos)
        check_policy(config, infos)
        check_permissions(link, config, infos)
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
        if "cluster|slots" in error.what:
            raise _not_permitted(config, ["CLUSTER SLOTS"]) from None
        if "'select'" in error.what:
            raise _not_permitted(config, ["SELECT"]) from None
        if error.what.startswith("NOPERM"):
            raise _not_permitted(config, ["INFO"]) from None
        if error.what.startswith("NOAUTH"):
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
        "HGETALL": command("HGETALL", table),
        "HVALS": command("HVALS", table),
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
                f"Valkey at {config.address} fails {name}: {trial.error.what}",
                trial.error.mend or f"Let it run {', '.join(COMMANDS)}, as they are named here",
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
    mend = error.mend or (
        "Start it, or correct url (valkeys:// if it wants TLS, valkey:// if not); every node of "
        "the Ray cluster must reach it"
    )
    return ServerUnavailableError(f"Valkey at {error.what}", mend)
