"""`ray-valkey-spill check`: whether spilling works from this environment to the server."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ray_valkey_spill import __version__, _startup
from ray_valkey_spill.cli import ray_setting
from ray_valkey_spill.cli.options import given
from ray_valkey_spill.cli.waiting import Waiting, limited, reach
from ray_valkey_spill.config import Config, Endpoint, parameters
from ray_valkey_spill.errors import (
    ConfigError,
    ServerFullError,
    ServerUnavailableError,
    SpillError,
)
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.format.packing import SourceObject
from ray_valkey_spill.format.sealing import KeyRing, is_key
from ray_valkey_spill.plugin.registration import require_compatible
from ray_valkey_spill.protocol.link import Link
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo
from ray_valkey_spill.store.node import Node
from ray_valkey_spill.store.object_store import ObjectStore
from ray_valkey_spill.tiers import preflight
from ray_valkey_spill.tiers.ledger import link_to
from ray_valkey_spill.tiers.overflow import OverflowTier
from ray_valkey_spill.tiers.room import free_room, margin
from ray_valkey_spill.units import MIB

__all__ = ["FAILED", "OK", "WARNING", "Finding", "run"]

OK, WARNING, FAILED = "ok", "warn", "failed"

_DEFAULT_TOKEN = "~/.ray/auth_token"  # noqa: S105
# Of the pod's service account, which Ray uses if RAY_ENABLE_K8S_TOKEN_AUTH is set.
_POD_TOKENS = (
    "/var/run/secrets/ray.io/serviceaccount/token",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
)
_ROUND_TRIPS = 200
_PROBE_SIZE = 32 * MIB
_PROBE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and the fix if it did not pass."""

    status: str
    subject: str
    detail: str
    hint: str = ""

    @property
    def color(self) -> str:
        return {OK: "green", WARNING: "yellow", FAILED: "red"}[self.status]

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def run(
    options: Mapping[str, Any],
    timeout: float = 5.0,
    notify: Callable[[str], None] = lambda text: None,
) -> Iterator[Finding]:
    """Check everything that can still be checked after what was found before.

    Args:
        options: of the command; those for parameters count.
        timeout: seconds for which a server that does not answer is tried.
        notify: is called with the reason, if the server does not answer soon.
    """
    yield _attempt("Ray", _ray)
    yield _hook()
    yield (setting := _attempt("Ray's setting", lambda: _setting(options)))
    yield _tokens()
    try:
        config = given(options).load()
    except SpillError as error:
        if error.message != setting.detail:
            yield Finding(FAILED, "parameters", error.message, error.hint)
        return
    yield _parameters(config)
    if (ring := KeyRing.of(config)) is not None:
        yield _attempt("sealing", lambda: _sealing(ring))
    try:
        reach(config, timeout, notify, any_role=True)  # the topology is checked below
    except ServerUnavailableError as error:
        yield Finding(FAILED, "server", error.message, error.hint)
        return
    except SpillError:
        pass  # the checks below say more
    config = limited(config, timeout)
    link = link_to(config, waiting=Waiting(timeout, notify), any_role=True)
    try:
        yield from _server(config, link)
    finally:
        link.close()


def _attempt(subject: str, look: Callable[[], str | Finding]) -> Finding:
    try:
        found = look()
        return found if isinstance(found, Finding) else Finding(OK, subject, found)
    except ServerFullError as error:
        # It may have room later, and the finding on its memory has the fix.
        return Finding(WARNING, subject, error.message, error.hint)
    except SpillError as error:
        return Finding(FAILED, subject, error.message, error.hint)


# --- this environment ---


def _ray() -> str:
    try:
        module = importlib.import_module(_startup.RAY_MODULE)
        version = metadata.version("ray")
    except ImportError as error:
        raise SpillError(f"Ray cannot be imported ({error})", "pip install ray") from error
    except Exception as error:  # such as of a dependency that does not fit it
        raise SpillError(
            f"Ray cannot be imported ({type(error).__name__}: {error})",
            "Install Ray again, with the dependencies that it names",
        ) from error
    function = getattr(module, _startup.RAY_FUNCTION, None)
    require_compatible(module, getattr(function, "ray_valkey_spill_original", function))
    return f"Ray {version} fits ray-valkey-spill {__version__}"


def _setting(options: Mapping[str, Any]) -> str | Finding:
    """Describe the setting of Ray's in this environment, beside the options that were given."""
    text = ray_setting.describe(os.environ)
    if not os.environ.get(ray_setting.CONFIG_VARIABLE):
        return text
    of_ray = Config.load(ray_setting.params_from_environment(os.environ))
    try:
        checked = given(options).load()
    except ConfigError:  # another finding says so
        return text
    others = [
        each.name
        for each in parameters()
        if _comparable(checked, each.name) != _comparable(of_ray, each.name)
    ]
    if not others:
        return text
    are_not = "is not the one that is" if len(others) == 1 else "are not those that are"
    return Finding(
        WARNING,
        "Ray's setting",
        f"{text}. Its {', '.join(others)} {are_not} checked here",
        "Leave the options out to check the setting",
    )


def _comparable(config: Config, name: str) -> Any:
    """Return the value of a parameter; two urls of one address are equal."""
    return config.address if name == "url" else getattr(config, name)


def _hook() -> Finding:
    if _startup.is_disabled():
        return Finding(
            FAILED,
            "start-up hook",
            "RAY_VALKEY_SPILL_DISABLE switches it off",
            "Unset it in the environment of every Ray process",
        )
    if not _startup.is_installed():
        return Finding(
            FAILED,
            "start-up hook",
            "not active in this interpreter, so Ray does not know the type 'valkey'",
            "Install ray-valkey-spill with pip into the environment that runs Ray, and start "
            "Python without -S",
        )
    return Finding(OK, "start-up hook", "active: Ray knows the type 'valkey' here")


def _tokens() -> Finding:
    """Whether nodes of this machine agree on tokens.

    Ray 2.60 enables token authentication in `ray start --head` if there is a token, and in
    `ray start --address` only if RAY_AUTH_MODE says so (`authentication_token_setup.py`).
    """
    subject = "Ray's tokens"
    if mode := os.environ.get("RAY_AUTH_MODE"):
        return _token_mode(subject, mode)
    if not _enables_tokens_by_itself():
        return Finding(OK, subject, "this Ray wants none, unless RAY_AUTH_MODE says so")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not _has_token():
        if path and not os.environ.get("RAY_AUTH_TOKEN"):
            return Finding(
                WARNING,
                subject,
                f"RAY_AUTH_TOKEN_PATH, {path}, has none, so Ray does not start "
                "(AuthenticationError)",
                "Put a token there, or set RAY_AUTH_MODE to disabled",
            )
        return Finding(OK, subject, "none here, so nodes do not ask each other for one")
    if os.environ.get("RAY_AUTH_TOKEN"):
        found = "RAY_AUTH_TOKEN is set"
    else:
        found = f"RAY_AUTH_TOKEN_PATH is {path}" if path else f"{_DEFAULT_TOKEN} exists"
    return Finding(
        WARNING,
        subject,
        f"{found} and RAY_AUTH_MODE is not set: `ray start --head` wants this token, and "
        "`ray start --address` does not send it (AuthenticationError: InvalidAuthToken)",
        "Set RAY_AUTH_MODE on every node and for drivers: to disabled, or to token if they all "
        "have the same token",
    )


def _token_mode(subject: str, mode: str) -> Finding:
    # Others have had other modes.
    if mode.lower() not in ("disabled", "token") and _enables_tokens_by_itself():
        return Finding(
            WARNING,
            subject,
            f"RAY_AUTH_MODE is {mode!r}, which Ray takes for disabled: it knows disabled and token",
            "Set RAY_AUTH_MODE to one of them, the same on every node and for drivers",
        )
    if mode.lower() == "token" and not _has_token():
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        where = f"RAY_AUTH_TOKEN_PATH, {path}, has none" if path else "there is none here"
        return Finding(
            WARNING,
            subject,
            f"RAY_AUTH_MODE is {mode}, so `ray start` needs a token, and {where} "
            "(AuthenticationError)",
            f"Put the same token into RAY_AUTH_TOKEN or {_DEFAULT_TOKEN} on every node and for "
            "drivers, or set RAY_AUTH_MODE to disabled there",
        )
    return Finding(OK, subject, f"RAY_AUTH_MODE is {mode}; it has to be on every node")


def _has_token() -> bool:
    """Whether Ray finds a token here, as `AuthenticationTokenLoader` of Ray 2.60 looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return bool(token.strip())
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _has_text(path)
    in_pod = os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true")
    # Of a user without a home directory, `expanduser` leaves the path as it is.
    default = os.path.expanduser(_DEFAULT_TOKEN)
    return any(map(_has_text, [*(_POD_TOKENS if in_pod else ()), default]))


def _has_text(path: str) -> bool:
    try:
        return bool(Path(path).read_bytes().strip())
    except OSError:
        return False


def _enables_tokens_by_itself() -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        major, minor, *_ = metadata.version("ray").split(".")
        return (int(major), int(minor)) >= (2, 60)
    return False


def _parameters(config: Config) -> Finding:
    detail = f"url {config.address}, keys below {Keyspace.of(config).root}"
    files = {each.name: getattr(config, each.name) for each in parameters() if each.is_file}
    # A key in place of the path of its file must not be shown; the check of sealing says so.
    relative = [
        name
        for name, path in files.items()
        if path is not None and not os.path.isabs(path) and not is_key(path)
    ]
    if not relative:
        return Finding(OK, "parameters", detail)
    paths = ", ".join(f"{name} {files[name]!r}" for name in relative)
    absolute = ", ".join(f"{name} {os.path.abspath(files[name])!r}" for name in relative)
    return Finding(
        WARNING,
        "parameters",
        f"{detail}. Relative to the directory in which Ray starts, on every node: {paths}",
        f"Give absolute paths; from here: {absolute}",
    )


def _sealing(ring: KeyRing) -> str:
    first, *others = (f"{key.id:016x}" for key in ring.current())
    return f"key {first} seals" + (f", and {', '.join(others)} open too" if others else "")


# --- the server ---


def _server(config: Config, link: Link) -> Iterator[Finding]:
    keys = Keyspace.of(config)
    try:
        infos = preflight.check_reachable(link, config)
    except SpillError as error:
        yield Finding(FAILED, "server", error.message, error.hint)
        return
    info = next(iter(infos.values()))
    memory = MemoryInfo.of_all(infos.values())
    yield Finding(OK, "server", f"{info.product} {info.version} at {config.address}")

    def topology() -> str:
        preflight.check_topology(config, infos)
        preflight.check_serving(link, config)
        if info.mode == "cluster":
            return f"a cluster of {len(infos)} shards that serve"
        by_sentinels = (
            f", as Sentinels say of {config.sentinel_service!r}" if config.sentinel_service else ""
        )
        return f"a primary that serves{by_sentinels}"

    def replicas() -> str:
        preflight.check_replicas(config, infos)
        counts = ", ".join(f"{each.replicas} of {where}" for where, each in infos.items())
        return f"in step: {counts}; a spill waits for {config.min_replicas}" + (
            ", and for append-only files" if config.wait_aof else ""
        )

    def policy() -> str:
        preflight.check_policy(config, infos)
        accepted = ", accepted by allow_eviction" if memory.evicts_all else ": spilled objects stay"
        return f"maxmemory-policy {memory.policy}{accepted}"

    def permissions() -> str:
        preflight.check_permissions(link, config, infos)
        return f"every command that spilling needs works on keys below {keys.root}"

    def chunk_size() -> str:
        preflight.check_chunk_size(link, config, infos)
        return f"values of {config.chunk_size:,} bytes can be written and read"

    yield (serves := _attempt("topology", topology))
    enough = True
    if config.min_replicas or config.wait_aof:
        yield (followed := _attempt("replicas", replicas))
        enough = followed.status != FAILED
    yield _attempt("policy", policy)
    yield _memory(config, infos)
    if serves.status == FAILED:
        return
    yield (allowed := _attempt("permissions", permissions))
    if allowed.status == OK:
        yield (passing := _attempt("chunk size", chunk_size))
        enough = enough and passing.status != FAILED
        if (uri := config.overflow_uri) is not None:
            yield _attempt("overflow", lambda: _overflow(config, uri))
        yield _attempt("latency", lambda: _latency(link, keys))
        if enough:
            yield _attempt("throughput", lambda: _throughput(config, _free(infos)))


def _memory(config: Config, infos: Mapping[Endpoint, ServerInfo]) -> Finding:
    memory = MemoryInfo.of_all(infos.values())
    budget, has_overflow = config.max_bytes, config.overflow_uri is not None
    if budget is not None and budget < config.chunk_size and not has_overflow:
        return Finding(
            FAILED,
            "memory",
            f"a budget (max_bytes) of {budget:,} bytes has no room for a chunk, and there is no "
            "overflow",
            "Raise max_bytes, or set overflow_uri",
        )
    allowed = (
        "no budget (max_bytes)"
        if config.max_bytes is None
        else f"a budget of {_mib(config.max_bytes)}"
    )
    if not memory.maxmemory:
        detail = f"no maxmemory, {_mib(memory.used)} used, {allowed}"
        if config.max_bytes is not None:
            return Finding(OK, "memory", detail)
        return Finding(
            WARNING,
            "memory",
            f"{detail}: spilling may fill the machine",
            "Set maxmemory below the memory that the server may have, or max_bytes",
        )
    detail = f"maxmemory {_mib(memory.maxmemory)}, {_mib(memory.used)} used, {allowed}"
    left = sum(margin(info.memory.maxmemory) for info in infos.values())
    free = _free(infos) or 0
    detail += f": {_mib(free)} free for spilling without evictions, {_mib(left)} left to others"
    if (warning := preflight.tenancy_warning(config, infos)) is not None:
        return Finding(WARNING, "memory", f"{detail}. {warning[0]}", warning[1])
    if free < memory.maxmemory // 10 and not (config.max_bytes and memory.evicts_others):
        return Finding(WARNING, "memory", detail, "Raise maxmemory, or free some of it")
    return Finding(OK, "memory", detail)


def _free(infos: Mapping[Endpoint, ServerInfo]) -> int | None:
    """Bytes that may be written without evictions; None if no server has a `maxmemory`.

    Each shard of a cluster gets its share, so the fullest shard decides.
    """
    rooms = [free_room(info.memory) for info in infos.values() if info.memory.maxmemory]
    return len(infos) * max(0, min(rooms)) if rooms else None


def _latency(link: Link, keys: Keyspace) -> str:
    times = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        link.execute(command("GET", f"{keys.root}latency"))
        times.append(time.perf_counter() - start)
    median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    return f"{median * 1e3:.2f} ms median, {p99 * 1e3:.2f} ms p99, over {_ROUND_TRIPS} round trips"


def _overflow(config: Config, uri: str) -> str | Finding:
    with (
        contextlib.closing(OverflowTier(uri, Keyspace.of(config))) as overflow,
        contextlib.closing(Node(config, *_own_node())) as node,
    ):
        missing = overflow.missing_directories()
        try:
            node.probe_overflow()  # makes them, as Ray's nodes would
        finally:
            overflow.remove_directories(missing)
    if missing:
        return Finding(
            WARNING,
            "overflow",
            f"the directory {overflow} does not exist: Ray's nodes would make it, each on its own "
            "disk unless a share is mounted there",
            "Mount the share at the same path on every node, and create the directory there",
        )
    return f"{overflow} can be written, read and cleaned up; every node has to reach it"


def _own_node() -> tuple[str, str]:
    """Return a session, and a node that no other check uses: in containers all are process 1."""
    return "check", f"pid{os.getpid()}-{secrets.token_hex(8)}"


def _throughput(config: Config, free: int | None) -> str:
    """Spill and restore incompressible data, at most a quarter of `free` bytes at once."""
    size = _PROBE_SIZE if free is None else min(_PROBE_SIZE, free // 4)
    if config.max_bytes is not None:
        size = min(size, config.max_bytes // 4)
    if size < MIB:
        raise ServerFullError(
            "not measured: there is no room for it", "Raise maxmemory or max_bytes"
        )
    # Compared as bytes: Python compares two memoryviews item by item.
    data, target = os.urandom(size), bytearray(size)
    whose = replace(config, overflow_uri=None), *_own_node()
    store, node = ObjectStore(*whose), Node(*whose)
    spill, restore = [], []
    try:
        for _ in range(_PROBE_ROUNDS):
            start = time.perf_counter()
            urls, failure = store.put([SourceObject("check", b"", b"", memoryview(data))])
            spill.append(time.perf_counter() - start)
            if failure is not None:
                raise failure
            (url,) = urls
            start = time.perf_counter()
            store.fill(store.find(url, "check"), memoryview(target))
            restore.append(time.perf_counter() - start)
            if target != data:
                raise SpillError("the data that were read are not those that were written")
            store.delete([url])
    finally:
        node.destroy(lambda pid: False)
        node.close()
        store.close()
    # The first round includes connecting, and touching memory for the first time.
    return (
        f"spill {size / min(spill) / 1e6:,.0f} MB/s, restore {size / min(restore) / 1e6:,.0f} MB/s "
        f"({_mib(size)} incompressible, best of {_PROBE_ROUNDS})"
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
