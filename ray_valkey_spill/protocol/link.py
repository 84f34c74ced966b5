"""Requests to the server, or to all shards of a cluster: pipelining, routing and retries.

Invariant: every request is safe to repeat (SET, GET, UNLINK, ZADD, …). When a connection breaks,
the link sends the requests without a reply again over a new one, to the server that has their keys
by then. In a cluster the requests of a run are under way to all shards at once, but their replies
are still yielded in order.

The link sends requests for data only to primaries. A value that exists is right whichever server
returns it, since values never change. A missing value proves less: a demoted primary, or one cut
off from its successor, lacks everything written since. So `Link.confirmed` must do every read that
concludes anything from a missing value.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_valkey_spill.backoff import Backoff
from ray_valkey_spill.config import Address, Config, Endpoint
from ray_valkey_spill.errors import (
    ClosedAtHelloError,
    ConfigError,
    ConnectionBrokenError,
    NotValkeyError,
    ProtocolError,
    RedirectError,
    ServerError,
    ServerRefusedError,
    ServerUnavailableError,
    SpillError,
    TooManyClientsError,
    TransientError,
    UnconfirmedError,
)
from ray_valkey_spill.protocol.connection import Connection
from ray_valkey_spill.protocol.resp import Request, command, not_now
from ray_valkey_spill.protocol.roles import Role
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo, count_in, fields_of
from ray_valkey_spill.protocol.topology import Cluster, Single, Topology, cluster_at, primaries_of
from ray_valkey_spill.units import MIB

__all__ = ["USUAL_SHARING", "Link", "Sharing"]

# Seconds between attempts.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
# Chunks fall on a cluster's shards at random. So each shard may have more under way than a single
# server, or all shards would wait for one that got several chunks in a row.
_DEPTH_IN_CLUSTER = 2
# Bytes, for any number of shards: compressed and sealed chunks occupy this process's memory.
_MOST_IN_CLUSTER = 16 * MIB
# Seconds for which a link keeps its connections while the server refuses others.
_CROWDED_TURN = 1.0
# Per request. Nodes that redirect it to each other do not agree yet on which of them has its key.
_REDIRECTS = 8
# Milliseconds a server waits for its replicas before it reports how many have confirmed.
_WAIT = 500
# Seconds for a server that is only asked for the primaries: others can be asked instead.
_WITNESS_PATIENCE = 1.0
# Nodes of a cluster to ask one after the other, however long they take.
_LEAST_ASKED = 3

# Bytes of the request for all of INFO.
_WHOLE_INFO = command("INFO").length

_T = TypeVar("_T")


class _Patience:
    """Paces attempts from the first failure until one succeeds or time is up.

    Args:
        address: address of the servers, for messages.
        limits: returns the seconds to go on trying while a server answers, and while none does. It
            is called at each failure, because a run may be suspended in between.
        waiting: called before each pause, with the error to raise if time were up.
    """

    def __init__(
        self,
        address: Address,
        limits: Callable[[], tuple[float, float]],
        waiting: Callable[[SpillError], None],
    ) -> None:
        self._address = address
        self._limits = limits
        self._waiting = waiting
        self._failing_since: float | None = None
        self._backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)

    def wait(self, failure: Exception) -> None:
        """Sleep before the next attempt. The first attempt after a success follows at once.

        Raises:
            ServerUnavailableError: time is up.
            ServerRefusedError: time is up, and `failure` is one.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            return
        answered = not isinstance(failure, OSError)
        retry_timeout, unreachable_timeout = self._limits()
        limit = retry_timeout if answered else unreachable_timeout
        tried = now - self._failing_since
        if tried >= limit:
            if isinstance(failure, ServerRefusedError):
                raise failure
            raise self._unavailable(failure, answered, limit) from failure
        self._waiting(self._unavailable(failure, answered, tried))
        time.sleep(min(limit - tried, self._backoff.next()))

    def _unavailable(
        self, failure: Exception, answered: bool, tried: float
    ) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"{self._address} {'does not serve' if answered else 'cannot be reached'}: "
            f"{str(failure) or type(failure).__name__} (tried for {round(tried, 1):g} s)",
            _hint(failure),
        )


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a link shares the server's connections with other clients. Times are in seconds.

    Attributes:
        idle: time after which an unused connection is closed. Load balancers and NATs drop idle
            connections silently, the fastest of them after four minutes.
        turn: time after which a busy connection is given up, at the end of an operation, if the
            server has refused other clients meanwhile.
        away: time for which the link then opens no connection; somewhat longer than the pause of
            the other clients between two attempts.
    """

    idle: float = 60.0
    turn: float = 10.0
    away: float = 3.0


USUAL_SHARING = Sharing()


class _Operation(AbstractContextManager[None]):
    """The context of all operations of a link, nested ones too; it has no state of its own."""

    def __init__(self, begin: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._begin = begin
        self._end = end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, kind: object, *raised: object) -> None:
        self._end(kind is None)


class Link:
    """Client for the configured server, cluster or Sentinel group. It connects on first use.

    Not thread-safe, except for `close_idle` and `close_unused`.

    Args:
        config: address, credentials and `retry_timeout`.
        home: a key. Requests without a key are sent to the server that owns it.
        unreachable_timeout: seconds to retry while no server answers at all; `retry_timeout` by
            default. Ray's head start must fail sooner than a spill.
        waiting: called now and then while a run waits for an unavailable server, with the error
            that the run would end with. It must neither raise nor use this link.
        any_role: whether the server of a url may be a replica, for inspection.
        sharing: when the link gives up connections.
        spare: closes this process's other connections that are not in use. Called when the server
            has no connection left for this link.

    Attributes:
        breaks: number of times that a connection broke or could not be opened, a server was not
            ready, or a server was no longer a primary. Each may lose acknowledged writes.
        generation: changes whenever a connection is replaced or given up, for any reason. Later
            reads may come from another server.
    """

    def __init__(
        self,
        config: Config,
        home: bytes,
        *,
        unreachable_timeout: float | None = None,
        waiting: Callable[[SpillError], None] = lambda error: None,
        any_role: bool = False,
        sharing: Sharing = USUAL_SHARING,
        spare: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._retry_timeout = config.retry_timeout
        self._any_role = any_role and config.sentinel_service is None
        self._spare = spare
        self._sharing = sharing
        # Guards `_operations`, and the closing of connections while it is 0.
        self._lock = threading.Lock()
        self._operations = 0
        self._operation = _Operation(self._begin, self._end)
        self._unreachable_timeout = (
            config.retry_timeout if unreachable_timeout is None else unreachable_timeout
        )
        self._waiting = waiting
        self._home = home
        self._topology: Topology | None = None
        self._is_outdated = self._has_served = False
        self._nodes: set[Endpoint] = set()
        self._sentinels = [*config.address.endpoints] if config.sentinel_service else []
        self._primaries: frozenset[Endpoint] = frozenset()
        self._connections: dict[Endpoint, Connection] = {}
        self.breaks = self.generation = 0
        self._is_confirming = False
        # Whether INFO takes several sections. Some proxies and services know one at most.
        self._takes_sections = True
        # Servers behind a proxy that closes the connection at a command that it does not know.
        self._plain: set[Endpoint] = set()
        # Whether a server refused a connection lately; how many each server has refused; until when
        # this link opens none.
        self._is_crowded = False
        self._rejected: dict[Endpoint, int] = {}
        self._away_until = float("-inf")

    @property
    def address(self) -> Address:
        return self._config.address

    def close(self) -> None:
        """Close all connections. The next request looks the topology up again and reconnects."""
        self._close_all()
        self._topology = None

    def _close_all(self) -> None:
        # A copy: another thread may close an idle one just then.
        for connection in [*self._connections.values()]:
            connection.close()
        self._connections.clear()
        self.generation += 1

    @contextlib.contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """Limit the retries of runs that begin within to `seconds`, and do not call `waiting`."""
        before = self._retry_timeout, self._waiting
        self._retry_timeout = min(self._retry_timeout, seconds)
        self._waiting = lambda error: None
        try:
            yield
        finally:
            self._retry_timeout, self._waiting = before

    @property
    def under_way(self) -> int:
        """Bytes of the requests without a reply, and of their expected replies."""
        return sum(connection.weight for connection in self._connections.values())

    def operation(self) -> AbstractContextManager[None]:
        """Keep the connections open between the runs within, unless they break.

        On entry the link closes connections that were idle for too long or that the server has
        closed: a request over one of them could wait for a reply that never comes.
        """
        return self._operation

    def _begin(self) -> None:
        with self._lock:
            if not self._operations:
                self._close_stale()
            self._operations += 1

    def _end(self, is_well: bool) -> None:
        try:
            if is_well and self._operations == 1:
                self._end_turn()
        finally:
            with self._lock:
                self._operations -= 1

    def close_unused(self) -> None:
        """Close all connections unless an operation uses them. Thread-safe."""
        with self._lock:
            if not self._operations:
                self.close()

    def _end_turn(self) -> None:
        """Leave the connections to other clients for a while, if a server has refused any."""
        now = time.monotonic()
        turn = min(self._sharing.turn, _CROWDED_TURN) if self._is_crowded else self._sharing.turn
        due = [
            connection
            for connection in self._connections.values()
            if not connection.closed
            and not connection.waiting
            and now - connection.turn_began >= turn
        ]
        if not due:
            return
        self._is_crowded = False
        for connection in due:
            connection.turn_began = now
            try:
                self._is_crowded |= self._has_refused(connection)
            except (OSError, TransientError, ServerError):
                connection.close()  # replaced on the next use
        if self._is_crowded:
            # All of them: a client that gets one connection may need the others as well.
            self._close_all()
            self._away_until = now + self._sharing.away

    def _has_refused(self, connection: Connection) -> bool:
        """Whether the server has refused connections since the last call. Errors as `read`."""
        request = self._sections("clients", "stats")
        connection.add(request)
        connection.read()
        if not isinstance(request.reply, bytearray):
            return False
        info = fields_of(request.reply.decode(errors="replace"))
        rejected = count_in(info, "rejected_connections")
        before = self._rejected.get(connection.endpoint)
        self._rejected[connection.endpoint] = rejected
        if before is not None:
            return rejected > before
        clients = count_in(info, "connected_clients") + count_in(info, "cluster_connections")
        return 0 < count_in(info, "maxclients") <= clients

    def close_idle(self) -> None:
        """Close idle connections unless an operation runs. Thread-safe."""
        with self._lock:
            if not self._operations:
                self._close_stale()

    def _close_stale(self) -> None:
        since = time.monotonic() - self._sharing.idle
        for endpoint, connection in [*self._connections.items()]:
            # No request is under way, so a readable connection is one that the server has closed.
            if not connection.closed and (connection.used <= since or connection.is_readable()):
                self._connections.pop(endpoint).close()
                self.generation += 1
                # Other servers may have the keys by now.
                self._topology = None

    @property
    def is_single(self) -> bool:
        """Whether one server has all keys, according to the latest run."""
        return isinstance(self._topology, Single)

    def owner(self, key: str) -> Endpoint | None:
        """Return the server of `key` according to the latest run.

        Returns None if its connection broke, or if no server of the cluster has the key's slot.
        """
        with contextlib.suppress(TransientError):
            return self._topology.owner(key.encode()) if self._topology else None
        return None

    def execute(self, *requests: Request) -> list[Any]:
        """Send small commands together and return their replies. Errors as `run`.

        Raises:
            ServerError: the error of the first command that failed. All were sent, unless one is
                fenced or guarded.
        """
        return [request.result() for request in list(self.run(requests))]

    def info(self) -> ServerInfo:
        """Return the INFO of the server; in a cluster, of the shard with the `home` key."""
        (text,) = self.execute(command("INFO"))
        return ServerInfo.parse(self._text(text))

    def infos(self) -> dict[Endpoint, ServerInfo]:
        """Return the INFO of the server, or of each primary of a cluster."""
        return {
            request.connection.endpoint: ServerInfo.parse(self._text(request.result()))
            for request in self._answered_by_all(lambda: command("INFO"))
        }

    def memories(self) -> list[MemoryInfo]:
        """Return the memory part of `infos`, at a much lower cost for the servers."""
        return [self.memory_of(request) for request in list(self.run(self.memory_requests()))]

    def memory_requests(self) -> Iterator[Request]:
        """Yield a request for the memory of each server, to send together with others."""
        yield from self._to_all(lambda: self._sections("memory", "keyspace", "replication"))

    def memory_of(self, request: Request) -> MemoryInfo:
        """Parse the reply to one of `memory_requests`. Errors as `run`, and of the command."""
        if request.error is not None and request.length > _WHOLE_INFO:
            self._takes_sections = False
            (request,) = self.run([self._sections(at=request.connection.endpoint)])
        return MemoryInfo.parse(fields_of(self._text(request.result())))

    def _sections(self, *names: str, at: Endpoint | None = None) -> Request:
        """Return a request for sections of INFO; for all of it if the server takes no such list."""
        request = command("INFO", *(names if self._takes_sections and not self._plain else ()))
        request.target = at
        return request

    def _text(self, info: Any) -> str:
        if not isinstance(info, bytearray):
            raise NotValkeyError(f"{self.address} answers INFO, but not as Valkey does")
        return info.decode(errors="replace")

    def _to_all(self, ask: Callable[[], Request]) -> Iterator[Request]:
        """Yield a request for each server that has keys."""
        yield (first := ask())
        # The topology is known once the first request has been routed.
        for endpoint in self._topology.primaries if self._topology else ():
            if endpoint != first.connection.endpoint:
                request = ask()
                request.target = endpoint
                yield request

    def _answered_by_all(self, ask: Callable[[], Request]) -> list[Request]:
        """Return a request for each server that has keys, with its reply."""
        return list(self.run(self._to_all(ask)))

    # --- replicas ---

    @property
    def min_replicas(self) -> int:
        """How many replicas must have a write before it counts."""
        return self._config.min_replicas

    @property
    def has_replicas_to_await(self) -> bool:
        """Whether writes have to reach replicas, or append-only files."""
        return bool(self._config.min_replicas or self._config.wait_aof)

    def replica_requests(self) -> Iterator[Request]:
        """Yield a request to each server that waits, for half a second at most, for its replicas.

        If nothing is sent until it has its reply, replicas lag by less than they would otherwise.
        """
        wanted = self._config.min_replicas
        yield from self._to_all(lambda: command("WAIT", wanted, _WAIT))

    def behind(self) -> dict[Endpoint, tuple[int, int]]:
        """Wait for half a second, at most, for all writes over this link to be replicated.

        Returns:
            The servers for which that was not enough, with how many append-only files of their own,
            and how many replicas, have the writes. Errors as `run`.
        """
        wanted, aof = self._config.min_replicas, self._config.wait_aof
        waiting = ("WAITAOF", 1, wanted, _WAIT) if aof else ("WAIT", wanted, _WAIT)
        behind = {}
        for request in self._answered_by_all(lambda: command(*waiting)):
            local, replicas = request.integers(2) if aof else (1, *request.integers())
            if local < 1 or replicas < wanted:
                behind[request.connection.endpoint] = local, replicas
        return behind

    def await_replicas(self, breaks: int) -> None:
        """Wait until all writes over this link have reached `min_replicas` replicas.

        That is their memory; with `wait_aof`, it is their disks and the primary's.

        Args:
            breaks: value of `self.breaks` before these writes. WAIT covers only writes over its own
                connection, so writes over a connection that broke cannot be confirmed.

        Raises:
            UnconfirmedError: a connection broke.
            ServerUnavailableError: some write was not confirmed within `retry_timeout`.
        """
        wanted = self._config.min_replicas
        if not self.has_replicas_to_await:
            return
        deadline = time.monotonic() + self._retry_timeout
        while True:
            behind = self.behind()
            if self.breaks != breaks:
                raise UnconfirmedError(
                    f"a connection to {self.address} broke before replicas had confirmed the "
                    "writes over it"
                )
            if not behind:
                return
            endpoint, (local, replicas) = behind.popitem()
            have = (
                f"only {replicas} of {wanted} replicas of {endpoint} have"
                if local
                else f"the append-only file of {endpoint} does not have"
            )
            error = ServerUnavailableError(
                f"{have} the latest writes to it (waited for {self._retry_timeout:g} s)",
                "Bring its replicas back, or lower min_replicas"
                if local
                else "Set appendfsync everysec or always on it, or wait_aof to false",
            )
            if time.monotonic() > deadline:
                raise error
            self._waiting(error)

    # --- missing values ---

    def confirmed(
        self,
        look: Callable[[], _T],
        *,
        lacks_nothing: Callable[[_T], bool] = lambda found: False,
        keep: bool = False,
    ) -> _T:
        """Return the result of `look` once it is certain that only current primaries answered it.

        The link opens new connections, because a name may resolve to another server by now. Each
        server must report the role of a primary before and after, over the connection of the
        replies, because a demoted server keeps its connections. A primary that is cut off, or that
        was paused, still reports that role. So the link also asks other servers, where there are
        any:

        - In a cluster, a majority of the primaries must name the servers that answered as the
          owners of their slots. A failover needs the votes of a majority, so one of those knows.
        - With Sentinels, a majority of the configured ones must name the server, and no server that
          another Sentinel names may be a primary: Sentinels learn of a failover one by one.

        Args:
            look: reads, but draws no conclusion yet. It is called again if the check fails. It may
                call this method, which then only calls `look`.
            lacks_nothing: whether a result is right whoever answered it, as an existing value is.
            keep: whether to use the open connections, for a caller that looks often and relies on
                `breaks` to count each connection that broke in between.

        Raises:
            ServerUnavailableError: the check failed for `retry_timeout` seconds.
            ServerError, ConfigError: as `run`, and as `look`.
        """
        if self._is_confirming:
            return look()
        patience = self._new_patience()
        self._is_confirming = True
        try:
            while True:
                if not keep:
                    self.close()
                try:
                    with self.operation():
                        return self._looked(look, lacks_nothing)
                except (OSError, TransientError) as failure:
                    keep = False
                    self._broke(failure)
                    patience.wait(failure)
        finally:
            self._is_confirming = False

    def _looked(self, look: Callable[[], _T], lacks_nothing: Callable[[_T], bool]) -> _T:
        """Look once. Errors as `confirmed`; OSError and TransientError call for another look."""
        before = self.generation
        found = look()
        if not lacks_nothing(found):
            if self._is_outdated:
                self._discover()
            if self.generation != before:
                raise TransientError("a connection broke while something was missing")
            self._require_primaries()
        return found

    def _require_primaries(self) -> None:
        """Raise TransientError unless every connected server is a primary now."""
        for endpoint, connection in self._connections.items():
            role = connection.current_role()
            if role is Role.UNKNOWN:
                raise TransientError(
                    f"{endpoint} lacks data, and does not report whether it is a primary or a "
                    "lagging replica; let it, and a proxy before it, answer HELLO, INFO or ROLE"
                )
            if role is Role.REPLICA:
                raise self._replica_error(endpoint)
        if isinstance(self._topology, Cluster):
            self._require_majority(self._topology)
        elif self._topology is not None and self._config.sentinel_service is not None:
            self._require_sentinels(self._config.sentinel_service, self._topology.endpoint)

    def _require_majority(self, cluster: Cluster) -> None:
        primaries = cluster.primaries
        agreeing = 0
        for endpoint in sorted(primaries, key=lambda each: each not in self._connections):
            agreeing += self._agrees(endpoint, cluster)
            if 2 * agreeing > len(primaries):
                return
        raise TransientError(
            f"only {agreeing} of {len(primaries)} primaries of the cluster name the servers that "
            "lack data as the owners of their slots; bring the others back"
        )

    def _agrees(self, endpoint: Endpoint, cluster: Cluster) -> bool:
        try:
            with contextlib.closing(self._greet(endpoint, _WITNESS_PATIENCE)) as witness:
                is_primary = witness.role is Role.PRIMARY
                return is_primary and cluster_at(witness).agrees(cluster, self._connections)
        except (OSError, TransientError, ServerError):
            return False

    def _require_sentinels(self, service: str, endpoint: Endpoint) -> None:
        naming: set[Endpoint] = set()
        rival: Endpoint | None = None
        for sentinel, named in primaries_of(service, self._sentinels, self._open_sentinel):
            if named == endpoint:
                naming.add(sentinel)
            elif rival is None and self._is_primary(named):
                rival = named
        if rival is None and 2 * len(naming) > len(self._sentinels):
            return
        # These Sentinels may be cut off together with the server they name: ask others first.
        self._sentinels.sort(key=naming.__contains__)
        raise TransientError(
            f"{endpoint} lacks data, and only {len(naming)} of {len(self._sentinels)} "
            "Sentinels name it as the primary"
            + (f"; another names {rival}" if rival else "; bring the others back, or correct url")
        )

    def _is_primary(self, endpoint: Endpoint) -> bool:
        try:
            with contextlib.closing(self._greet(endpoint, _WITNESS_PATIENCE)) as other:
                return other.role is Role.PRIMARY
        except (OSError, TransientError, ServerError):
            return False

    # --- runs ---

    def run(
        self, requests: Iterable[Request], since: int | None = None, *, to_failure: bool = False
    ) -> Generator[Request]:
        """Send `requests`, and yield each in order once it has its reply.

        Invariant: the caller must drain a run. If it stops early, the link closes the connections
        that still have replies of this run under way.

        The link draws one request more from `requests` than the window allows. A request's buffers
        must stay unchanged until it is yielded. Runs may alternate, and `requests` may run others
        meanwhile: all share the connections, and waiting for one run also receives replies of the
        others.

        Several servers may execute requests in any order, but a fenced request only after all
        before it. A guarded request is sent only once all before it have succeeded. After a
        request that failed, the run ends at the next fenced or guarded one.

        Args:
            requests: requests to send. Each must be safe to repeat.
            since: value of `self.generation` before the read that `requests` follow from. They are
                then sent once, and only to the servers that answered that read.
            to_failure: whether the run ends at the first request after a failed one, fenced or not.

        Raises:
            UnconfirmedError: a connection was replaced since then, or broke.
            ServerUnavailableError: no reply came for `retry_timeout` seconds, over any new
                connection. Requests not yielded may or may not have been executed.
            ServerRefusedError, NotValkeyError, ConfigError: no connection can be opened.
        """
        with self._operation:
            yield from self._run(requests, since, to_failure)

    def _run(
        self, requests: Iterable[Request], since: int | None, to_failure: bool
    ) -> Generator[Request]:
        source = iter(requests)
        in_flight: deque[Request] = deque()
        held: Request | None = None
        exhausted = failed = False
        patience: _Patience | None = None
        try:
            while True:
                if held is None and not exhausted:
                    held = next(source, None)
                    exhausted = held is None
                if failed and held is not None and (to_failure or held.fenced or held.guarded):
                    held, exhausted = None, True
                if held is None and not in_flight:
                    # This run is finished; the next one looks up what has moved.
                    return
                try:
                    if self._is_outdated and not in_flight:
                        self._discover()
                        continue
                    if held is not None and self._give(held, in_flight, since):
                        in_flight.append(held)
                        held = None
                        continue
                    self._await(in_flight)
                except (OSError, TransientError) as failure:
                    self._broke(failure)
                    self._require_generation(since)
                    patience = patience or self._new_patience()
                    patience.wait(failure)
                    continue
                except NotValkeyError:
                    # What was sent before may still be carried out.
                    self.breaks += 1
                    raise
                except ServerRefusedError as refusal:
                    # A server that accepted the password before may be changing it.
                    may_change = self._has_served and self._config.password_file is not None
                    if isinstance(refusal, ProtocolError) or not may_change:
                        raise
                    self._broke(refusal)
                    patience = patience or self._new_patience()
                    patience.wait(refusal)
                    continue
                patience, self._has_served = None, True
                request = in_flight.popleft()
                failed = failed or request.error is not None
                yield request
        finally:
            for request in in_flight:
                # The caller may take its buffers back from here on.
                if request.connection is not None and not request.done:
                    request.connection.close()

    def _new_patience(self) -> _Patience:
        return _Patience(
            self.address,
            lambda: (
                self._retry_timeout,
                min(self._retry_timeout, self._unreachable_timeout),
            ),
            lambda error: self._waiting(error),
        )

    def _broke(self, failure: Exception) -> None:
        self.breaks += 1
        self.generation += 1
        self._topology = None
        if isinstance(failure, TooManyClientsError):
            # Clients that hold some connections while they wait for others block each other.
            self._is_crowded = True
            self._close_all()
            self._spare()

    def _require_generation(self, since: int | None) -> None:
        if since not in (None, self.generation):
            raise UnconfirmedError(
                f"a connection to {self.address} broke after something was read over it"
            )

    def _give(self, request: Request, in_flight: deque[Request], since: int | None) -> bool:
        """Give a request to its connection, and return True, unless it has to wait."""
        connection = self._route(request)
        if since is not None:
            self._require_generation(since)
        if in_flight and request.guarded:
            return False
        if in_flight and isinstance(self._topology, Cluster):
            under_way = sum(each.weight for each in self._connections.values())
            depth = _DEPTH_IN_CLUSTER if len(self._primaries) > 1 else 1
            if request.fenced or not connection.has_room(request, depth):
                return False
            if under_way + request.weight > _MOST_IN_CLUSTER:
                return False
        elif in_flight and (_is_lost(in_flight[0]) or not connection.has_room(request)):
            # Lost requests are sent again first: a single server must execute all in order.
            return False
        request.connection = connection
        connection.add(request)
        return True

    def _await(self, in_flight: deque[Request]) -> None:
        """Receive replies until the first request has one."""
        first = in_flight[0]
        while not first.done:
            if _is_lost(first):
                self._give_again(in_flight)
            if len(self._connections) > 1:
                # The one that is received from sends what it has by itself.
                for connection in self._connections.values():
                    connection.flush()
            connection = first.connection
            request = connection.read()
            if isinstance(request.error, RedirectError) and request.key is not None:
                self._follow(connection, request, request.error)
            else:
                request.done = True

    def _give_again(self, in_flight: deque[Request]) -> None:
        for request in in_flight:
            if _is_lost(request) and not request.done:
                connection = self._route(request)
                request.connection = connection
                connection.add(request)

    def _follow(self, connection: Connection, request: Request, error: RedirectError) -> None:
        """Send a request to where `error`, its reply over `connection`, redirects it."""
        assert request.key is not None
        request.error = request.connection = None
        request.redirects += 1
        if request.redirects > _REDIRECTS:
            request.redirects = 0
            raise TransientError(error.message)
        endpoint = Endpoint(error.host or connection.endpoint.host, error.port)
        # Another connection that broke may just have dropped the topology.
        if not error.ask and isinstance(self._topology, Cluster):
            self._topology.move(request.key, endpoint)
            self._is_outdated = True
            if endpoint not in self._primaries:
                # A promoted replica may lack writes that the previous primary had acknowledged.
                self.breaks += 1
                self._primaries |= {endpoint}
        target = self._connect(endpoint)
        if error.ask:
            target.add(command("ASKING"))
        request.connection = target
        target.add(request)

    # --- routing ---

    def _route(self, request: Request) -> Connection:
        topology = self._topology or self._discover()
        endpoint = request.target
        if endpoint is None or endpoint not in topology.primaries:
            endpoint = topology.owner(request.key or self._home)
        known = self._connections.get(endpoint)
        return self._connect(endpoint) if known is None or known.closed else known

    def _connect(self, endpoint: Endpoint) -> Connection:
        """Return a connection for data. Errors as `Connection`; TransientError for a replica."""
        known = self._connections.get(endpoint)
        if known is not None and not known.closed:
            return known
        connection = self._open(endpoint, self._unreachable_timeout)
        self._keep(connection)
        return connection

    def _keep(self, connection: Connection) -> None:
        """Use a new connection for data from now on. Raises TransientError for a replica."""
        endpoint = connection.endpoint
        if connection.role is Role.REPLICA and not self._any_role:
            connection.close()
            raise self._replica_error(endpoint)
        self.generation += endpoint in self._connections
        self._connections[endpoint] = connection

    def _replica_error(self, endpoint: Endpoint) -> TransientError:
        reason = (
            "though a Sentinel names it as the primary"
            if self._config.sentinel_service
            else "though a node of the cluster names it as a primary"
            if isinstance(self._topology, Cluster)
            else "which takes no writes and may lag; the host of url must be that of its primary"
        )
        return not_now(f"READONLY {endpoint} is a replica, {reason}")

    def _open(self, endpoint: Endpoint, patience: float) -> Connection:
        if (away := self._away_until - time.monotonic()) > 0:
            time.sleep(away)
        return self._greet(endpoint, patience)

    def _greet(self, endpoint: Endpoint, patience: float) -> Connection:
        """Open a connection; a plain one if another is closed at its first commands.

        A server that stops just then may be taken for one that needs plain connections, so that is
        believed only until one of them fails, too. Errors as `Connection`.
        """
        plain = endpoint in self._plain
        try:
            return Connection(self._config, endpoint, patience, plain=plain)
        except ClosedAtHelloError:
            self._plain.discard(endpoint)
            if plain:
                raise
            try:
                connection = Connection(self._config, endpoint, patience, plain=True)
            except (OSError, TransientError, ServerError):
                # The first failure is what there is to report.
                connection = None
            if connection is None:
                raise
        self._plain.add(endpoint)
        return connection

    def _discover(self) -> Topology:
        """Look up which server has which keys now. Errors as `Connection`."""
        topology = self._ask_sentinels() if self._config.sentinel_service else self._ask_nodes()
        others = {*self._connections} - {*topology.primaries}
        for endpoint in others:
            self._connections.pop(endpoint).close()
            self.generation += 1
        # The successor of a primary may lack writes that the primary had acknowledged.
        self.breaks += len(others & self._primaries)
        self._primaries = frozenset(topology.primaries)
        self._topology, self._is_outdated = topology, False
        return topology

    def _ask_sentinels(self) -> Topology:
        service = self._config.sentinel_service
        assert service is not None
        failures: dict[Endpoint, Exception] = {}
        for sentinel, endpoint in primaries_of(service, self._sentinels, self._open_sentinel):
            if endpoint in failures:
                continue
            try:
                self._connect(endpoint)
            except (OSError, TransientError) as error:
                failures[endpoint] = error
                continue
            # Ask this one first the next time: it takes time to find others dead.
            self._sentinels.sort(key=sentinel.__ne__)
            return Single(endpoint)
        raise next(iter(failures.values()))

    def _open_sentinel(self, endpoint: Endpoint) -> Connection:
        return Connection(self._config, endpoint, self._unreachable_timeout, sentinel=True)

    def _ask_nodes(self) -> Topology:
        failure: Exception | None = None
        endpoints = self.address.endpoints
        nodes = deque(dict.fromkeys((*endpoints, *sorted(self._nodes))))
        # Start with another node each time: one that is cut off from the others may be outdated.
        nodes.rotate(-self.breaks)
        deadline = time.monotonic() + min(self._retry_timeout, self._unreachable_timeout)
        for number, endpoint in enumerate(nodes):
            if number >= _LEAST_ASKED and time.monotonic() > deadline:
                break  # the next attempt begins with another one
            try:
                topology = self._ask_node(endpoint, is_first=number == 0)
            except (OSError, TransientError) as error:
                failure = failure or error
                continue
            if isinstance(topology, Single) and len(endpoints) > 1:
                raise ConfigError(
                    f"url names several hosts, and {endpoint} is not a node of a cluster",
                    "Name one host, or give sentinel_service if they are Sentinels",
                )
            return topology
        assert failure is not None
        raise failure

    def _ask_node(self, endpoint: Endpoint, *, is_first: bool) -> Topology:
        """Ask one node for the topology; a short time only, if others have failed already."""
        known = self._connections.get(endpoint)
        if known is not None and not known.closed and not known.waiting:
            return self._topology_at(known)
        node = self._open(endpoint, self._unreachable_timeout if is_first else _WITNESS_PATIENCE)
        try:
            topology = self._topology_at(node)
        except BaseException:
            node.close()
            raise
        # Drop the connection if the cluster has no primary with this name: it may have another name
        # for the node.
        is_of_use = isinstance(topology, Single) or (
            endpoint in topology.primaries and node.role is not Role.REPLICA
        )
        is_busy = known is not None and not known.closed
        # Data get a connection that waits for as long as is usual.
        if is_of_use and not is_busy and is_first:
            self._keep(node)
        else:
            node.close()
        return topology

    def _topology_at(self, node: Connection) -> Topology:
        if node.mode != "cluster":
            return Single(node.endpoint)
        try:
            cluster = cluster_at(node)
        except ServerRefusedError:
            raise
        except ServerError as error:
            if not node.knows_hello:
                # A proxy that makes one server of a cluster, and passes INFO on.
                return Single(node.endpoint)
            raise ServerRefusedError(
                f"{node.endpoint} is a node of a cluster, and fails CLUSTER SLOTS: {error.message}",
                "Let it run CLUSTER SLOTS under this name",
            ) from error
        self._nodes = cluster.nodes
        return cluster


def _hint(failure: Exception) -> str:
    known = TransientError | TooManyClientsError | ConnectionBrokenError
    return failure.hint if isinstance(failure, known) else ""


def _is_lost(request: Request) -> bool:
    """Whether no reply to the request can come any more."""
    return request.connection is None or request.connection.closed
