"""What has to be true of a server before objects are entrusted to it.

Each check raises one error that says what is wrong and how to mend it. Ray's head start runs them
all and stops at the first; `ray-valkey-spill check` reports each.
"""

from __future__ import annotations

from collections.abc import Callable

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    ConfigError,
    ServerError,
    ServerFullError,
    ServerRefusedError,
    ServerUnavailableError,
)
from ray_valkey_spill.keys import Keyspace, new_attempt
from ray_valkey_spill.wire import Link, Request, ServerInfo, command

__all__ = [
    "HEAD_START_PATIENCE",
    "check_permissions",
    "check_policy",
    "check_reachable",
    "check_topology",
    "refused_commands",
    "run_all",
]

# Seconds for which a head start tries a server that does not answer. With the time one attempt may
# take, and with the import of Ray, that keeps a failing `ray start --head` under five seconds.
HEAD_START_PATIENCE = 1.5


def run_all(config: Config) -> ServerInfo:
    """Check the server as Ray's head start does.

    Takes at most a few seconds, or `retry_timeout` if the server answers that it is loading.

    Raises:
        ConfigError, ServerError: the first thing that is wrong.
    """
    link = Link(config, unreachable_timeout=HEAD_START_PATIENCE)
    keys = Keyspace(f"{config.key_prefix}{config.namespace}:")
    try:
        info = check_reachable(link)
        check_topology(info, link)
        check_policy(info, config, link)
        check_permissions(link, keys)
        return info
    finally:
        link.close()


def check_reachable(link: Link) -> ServerInfo:
    """The server answers, in the Valkey protocol, and may be asked what it is.

    Raises:
        ServerUnavailableError, ServerRefusedError, NotValkeyError, ConfigError
    """
    try:
        return link.info()
    except ServerUnavailableError as error:
        mend = (
            "Wait until it has loaded its data, or raise retry_timeout"
            if "LOADING" in str(error)
            else "Start it, or correct url; every node of the Ray cluster must reach it"
        )
        raise ServerUnavailableError(f"Valkey at {error}. {mend}") from None
    except ServerRefusedError as error:
        text = str(error)
        if text.startswith("NOPERM"):
            text = f"{link.address} does not let the user run INFO ({text}): grant it +info"
        raise ServerRefusedError(f"Valkey at {text}") from None


def check_topology(info: ServerInfo, link: Link) -> None:
    """It is a primary, and not a cluster.

    Raises:
        ConfigError
    """
    if info.cluster:
        raise ConfigError(
            f"Valkey at {link.address} is part of a cluster (cluster-enabled yes): clusters are "
            "not supported yet by this version. Give the url of a standalone server"
        )
    if info.role != "master":
        raise ConfigError(
            f"Valkey at {link.address} is a replica, which takes no writes: "
            "give the url of its primary"
        )


def check_policy(info: ServerInfo, config: Config, link: Link) -> None:
    """It does not evict keys without a TTL.

    Raises:
        ConfigError
    """
    if info.evicts and not config.allow_eviction:
        raise ConfigError(
            f"Valkey at {link.address} has maxmemory-policy {info.maxmemory_policy}, which evicts "
            "spilled objects first, since they are read least. Set maxmemory-policy volatile-lru "
            "and give the caches beside it TTLs (spilled objects have none, so it never evicts "
            "them), or give allow_eviction=true to accept lost objects"
        )


def check_permissions(link: Link, keys: Keyspace) -> None:
    """The user may run every command that spilling needs, on keys below our prefix.

    Raises:
        ServerRefusedError
    """
    refused = refused_commands(link, keys)
    if refused:
        user = f"user {link.address.username!r}" if link.address.username else "the default user"
        grants = " ".join(f"+{name.lower()}" for name in refused)
        raise ServerRefusedError(
            f"Valkey at {link.address} does not let {user} run {', '.join(refused)} on keys below "
            f"{keys.root!r}: grant it ~{keys.root}* {grants}"
        )


def refused_commands(link: Link, keys: Keyspace) -> list[str]:
    """Try each command that spilling needs on keys of our own; the names of those refused.

    Leaves nothing behind. A server that is merely full is not what this looks for.
    """
    key, member = f"{keys.root}preflight:{new_attempt()}", "preflight"
    index = f"{key}:index"
    trials: list[tuple[str, Callable[[], Request]]] = [
        ("ZADD", lambda: command("ZADD", index, 0, member)),
        ("ZSCORE", lambda: command("ZSCORE", index, member)),
        ("SET", lambda: command("SET", key, b"preflight")),
        ("GET", lambda: command("GET", key)),
        ("STRLEN", lambda: command("STRLEN", key)),
        ("ZRANGEBYLEX", lambda: command("ZRANGEBYLEX", index, "-", "+", "LIMIT", 0, 1)),
        ("UNLINK", lambda: command("UNLINK", key)),
        ("ZREM", lambda: command("ZREM", index, member)),
    ]
    refused = []
    for (name, _), request in zip(trials, list(link.run(trial() for _, trial in trials))):
        try:
            request.result()
        except ServerRefusedError:
            refused.append(name)
        except (ServerFullError, ServerError):
            continue
    return refused
