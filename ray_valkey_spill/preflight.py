"""What has to be true of a server before objects are entrusted to it.

Each check raises one error that says what is wrong and how to mend it. Ray's head start runs them
all and stops at the first; `ray-valkey-spill check` reports each.
"""

from __future__ import annotations

from ray_valkey_spill.config import Address, Config
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
from ray_valkey_spill.wire import Link, ServerInfo

__all__ = [
    "COMMANDS",
    "HEAD_START_PATIENCE",
    "acl_rules",
    "check_permissions",
    "check_policy",
    "check_reachable",
    "check_serving",
    "check_topology",
    "run_all",
]

# Seconds for which a head start tries a server that does not answer. With the time one attempt may
# take, and with the import of Ray, that keeps a failing `ray start --head` under five seconds.
HEAD_START_PATIENCE = 1.5

# Every command that this package sends, but those that any user may run.
COMMANDS = (
    *("GET", "INFO", "SET", "STRLEN", "UNLINK", "EVAL", "TIME"),
    *("ZADD", "ZRANGE", "ZRANGEBYLEX", "ZREM", "ZSCORE"),
    *("HDEL", "HGET", "HGETALL", "HSET", "HSETNX", "HVALS"),
)


def acl_rules(keys: Keyspace, address: Address) -> str:
    """What `ACL SETUSER` has to give a user: the least with which everything works."""
    commands = (*COMMANDS, "SELECT") if address.db else COMMANDS
    return f"~{keys.root}* {' '.join(f'+{name.lower()}' for name in commands)}"


def run_all(config: Config) -> ServerInfo:
    """Check the server as Ray's head start does.

    Takes at most a few seconds, or `retry_timeout` if the server answers that it is loading.

    Raises:
        ConfigError, ServerError: the first thing that is wrong.
    """
    link = Link(config, unreachable_timeout=min(HEAD_START_PATIENCE, config.retry_timeout))
    keys = Keyspace.of(config)
    try:
        info = check_reachable(link, keys)
        check_topology(link, info)
        check_serving(link, keys)
        check_policy(link, info, allow_eviction=config.allow_eviction)
        check_permissions(link, keys)
        return info
    finally:
        link.close()


def check_reachable(link: Link, keys: Keyspace) -> ServerInfo:
    """The server answers in the Valkey protocol, and may be asked what it is.

    Raises:
        ServerError, ConfigError
    """
    try:
        return link.info()
    except ServerUnavailableError as error:
        raise _unavailable(error) from None
    except ServerRefusedError as error:
        if error.what.startswith("NOPERM"):
            raise _not_permitted(link, keys, ["INFO"]) from None
        if "'select'" in error.what:
            raise _not_permitted(link, keys, ["SELECT"]) from None
        if error.what.startswith("NOAUTH"):
            raise ServerRefusedError(
                f"Valkey at {link.address} asks for a password",
                "Set RAY_VALKEY_SPILL_PASSWORD (or password_file) and username as it has them",
            ) from None
        raise
    except ServerError as error:
        if isinstance(error, NotValkeyError):
            raise
        raise ServerError(
            f"Valkey at {link.address} fails INFO: {error}", "Let it run INFO"
        ) from None


def check_serving(link: Link, keys: Keyspace) -> None:
    """The server has its data loaded; it may answer INFO before. Permissions are looked at later.

    Raises:
        ServerUnavailableError
    """
    try:
        list(link.run([command("GET", f"{keys.root}preflight")]))
    except ServerUnavailableError as error:
        raise _unavailable(error) from None


def check_topology(link: Link, info: ServerInfo) -> None:
    """The server is a primary, and not part of a cluster.

    Raises:
        ConfigError
    """
    if info.mode == "sentinel":
        raise ConfigError(
            f"what answers at {link.address} is a Sentinel, and Sentinels are not supported yet by "
            "this version",
            "Give the url of the primary",
        )
    if info.cluster:
        raise ConfigError(
            f"Valkey at {link.address} is part of a cluster, and clusters are not supported yet by "
            "this version",
            "Give the url of a server with cluster-enabled no",
        )
    if info.role != "master":
        raise ConfigError(
            f"Valkey at {link.address} is a replica, which takes no writes",
            "Give the url of its primary",
        )


def check_policy(link: Link, info: ServerInfo, *, allow_eviction: bool) -> None:
    """The server does not evict keys without a TTL, or may.

    Raises:
        ConfigError
    """
    if info.memory.evicts_all and not allow_eviction:
        raise ConfigError(
            f"Valkey at {link.address} has maxmemory-policy {info.memory.policy}, which evicts "
            "spilled objects first, since they are read least",
            "Set maxmemory-policy volatile-lru and give the caches beside it TTLs (spilled objects "
            "have none, so they are never evicted then), or accept lost objects with "
            "allow_eviction=true",
        )


def check_permissions(link: Link, keys: Keyspace) -> None:
    """The server runs every command that spilling needs, on keys below our prefix.

    Tries them on keys of its own and leaves nothing behind. A server that is full passes: that is
    for a spill to find, and may be over by then.

    Raises:
        ServerRefusedError
    """
    base = f"{keys.root}preflight:{new_attempt()}"
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
        raise _not_permitted(link, keys, refused)
    for name, trial in trials.items():
        if trial.error is not None and not isinstance(trial.error, ServerFullError):
            raise ServerRefusedError(
                f"Valkey at {link.address} fails {name}: {trial.error}",
                f"Let it run {', '.join(COMMANDS)}, as they are named here",
            )


def _not_permitted(link: Link, keys: Keyspace, refused: list[str]) -> ServerRefusedError:
    return ServerRefusedError(
        f"Valkey at {link.address} does not let {_user(link)} run {', '.join(refused)} on keys "
        f"below {keys.root}",
        f"Grant it {acl_rules(keys, link.address)}",
    )


def _user(link: Link) -> str:
    return f"user {link.address.username!r}" if link.address.username else "the default user"


def _unavailable(error: ServerUnavailableError) -> ServerUnavailableError:
    mend = (
        "Wait until it has loaded its data, or raise retry_timeout"
        if "LOADING" in error.what
        else "Raise its maxclients"
        if "max number of clients" in error.what
        else "Start it, or correct url; every node of the Ray cluster must reach it, without TLS"
    )
    return ServerUnavailableError(f"Valkey at {error.what}", mend)
