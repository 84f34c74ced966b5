"""Requests to the server, or to all of a cluster: pipelining, routing and retries.

Every request a link may be given is safe to repeat (SET, GET, UNLINK, ZADD, …): when a connection
breaks, the requests without a reply are sent again on a new one, to whichever server has their keys
then. In a cluster the requests of a run are under way to all shards at once; their replies are
yielded in order nevertheless.

Requests for data are sent to primaries alone. A value that is there is right wherever it comes
from, since values never change. That one is missing is another matter: a primary that was demoted,
or that is cut off from its successor, lacks what was written since. Whatever is concluded from
something that is missing is therefore read by `Link.confirmed`.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_valkey_spill.backoff import Backoff
from ray_valkey_spill.config import Address, Config, Endpoint
from ray_valkey_spill.errors import (
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
from ray_valkey_spill.protocol.server_info import MemoryInfo, ServerInfo, fields_of
from ray_valkey_spill.protocol.topology import Cluster, Single, Topology, cluster_at, primaries_of
from ray_valkey_spill.units import MIB

__all__ = ["USUAL_SHARING", "Link", "Sharing"]

# Seconds between attempts.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
# Chunks fall on a cluster's shards at random, so each may have more under way than one server, lest
# all wait for the one that had some in a row.
_DEPTH_IN_CLUSTER = 2
# Bytes, however many shards there are: what is compressed or sealed lies in this process's memory.
_MOST_IN_CLUSTER = 16 * MIB
# Seconds for which one keeps a connection while others are refused theirs.
_CROWDED_TURN = 1.0
# Of one request; nodes that send it back and forth do not agree yet on who has its key.
_REDIRECTS = 8
# How long a server waits for its replicas before it tells how many have confirmed, in ms.
_WAIT = 500
# Seconds for a server that is asked only for who the primaries are: a majority can do without it.
_WITNESS_PATIENCE = 1.0

_T = TypeVar("_T")


class _Patience:
    """Paces attempts, from the first failure until something works again or time is up.

    Args:
        address: of the servers, for messages.
        limits: returns for how many seconds attempts go on while servers answer, and while none
            does; asked for anew at each failure, for a run may be suspended in between.
        waiting: is called before each pause, with the error that would be raised if time were up.
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
        """Sleep before the next attempt; the first one after a success comes at once.

        Raises:
            ServerUnavailableError: when time is up.
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
    """How connections are shared with whoever else uses the server. Times are in seconds.

    Attributes:
        idle: a connection that was not used for that long is closed. Load balancers and NATs
            forget connections without a word, the quickest of them after four minutes.
        turn: a connection that is used all the time is given up after that long, at the end of an
            operation, if the server has refused connections to others meanwhile.
        away: for that long it is left to them then: somewhat longer than they wait between two
            attempts.
    """

    idle: float = 60.0
    turn: float = 10.0
    away: float = 3.0


USUAL_SHARING = Sharing()


class Link:
    """The way to the servers that a config names. Connections are opened when first needed.

    Not thread-safe but for `close_idle`.

    Args:
        config: address, credentials and `retry_timeout`.
        home: a key; requests without one are sent to the server that owns it.
        unreachable_timeout: seconds for which a server that does not answer at all is tried,
            `retry_timeout` unless given: Ray's head start has to fail sooner than a spill.
        waiting: is called now and then while a run waits for a server that is away, with the error
            that the run would end with. It must not raise, nor use this link.
        any_role: whether the server of a url is used even if it is a replica, to look at what it
            is.
        sharing: when connections are given back.
        spare: closes what else this process has open and does not use. It is called when the server
            has no connection left for this link.

    Attributes:
        breaks: how many times a connection broke or could not be had, or a server was not ready,
            or was found to be no primary any more: each may cost what it had acknowledged.
        generation: another number once a connection was replaced or given up, for whatever reason:
            what is read from then on may come from another server.
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
        # Held while `_operations` changes, and while connections are closed because it is 0.
        self._lock = threading.Lock()
        self._operations = 0
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
        # Whether somebody was refused a connection lately; how many were by each server; until when
        # this leaves its own to them.
        self._is_crowded = False
        self._rejected: dict[Endpoint, int] = {}
        self._away_until = float("-inf")

    @property
    def address(self) -> Address:
        return self._config.address

    def close(self) -> None:
        """Drop the connections; the next request finds out anew who has what, and opens others."""
        self._close_all()
        self._topology = None

    def _close_all(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self.generation += 1

    @contextlib.contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """Let runs that begin meanwhile retry for at most so many seconds."""
        before = self._retry_timeout, self._waiting
        self._retry_timeout = min(self._retry_timeout, seconds)
        self._waiting = lambda error: None
        try:
            yield
        finally:
            self._retry_timeout, self._waiting = before

    @property
    def under_way(self) -> int:
        """Bytes of requests that have no reply yet, and of the replies that are expected."""
        return sum(connection.weight for connection in self._connections.values())

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """Keep the connections there are from one run within to the next, unless they break.

        Those that were idle for too long, or that the server has closed, are given up before: who
        finds out by using them waits for an answer that never comes.
        """
        with self._lock:
            if not self._operations:
                self._close_stale()
            self._operations += 1
        try:
            yield
            if self._operations == 1:
                self._end_turn()
        finally:
            with self._lock:
                self._operations -= 1

    def close_unused(self) -> None:
        """Close all connections unless an operation uses them. Any thread may call this."""
        with self._lock:
            if not self._operations:
                self.close()

    def _end_turn(self) -> None:
        """Leave connections to others for a while, if a server has refused some to them."""
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
                connection.close()  # it is replaced when it is needed
        if self._is_crowded:
            # All of them: whoever gets one that is left alone may need the others as well.
            self._close_all()
            self._away_until = now + self._sharing.away

    def _has_refused(self, connection: Connection) -> bool:
        """Whether a server has refused connections since this was last asked. Errors as `read`."""
        request = command("INFO", "clients", "stats")
        connection.add(request)
        connection.read()
        if not isinstance(request.reply, bytearray):
            return False
        info = fields_of(request.reply.decode(errors="replace"))
        rejected = int(info.get("rejected_connections", 0))
        before = self._rejected.get(connection.endpoint)
        self._rejected[connection.endpoint] = rejected
        if before is not None:
            return rejected > before
        clients = int(info.get("connected_clients", 0)) + int(info.get("cluster_connections", 0))
        return 0 < int(info.get("maxclients", 0)) <= clients

    def close_idle(self) -> None:
        """Close the connections that were not used for a while. Any thread may call this."""
        with self._lock:
            if not self._operations:
                self._close_stale()

    def _close_stale(self) -> None:
        since = time.monotonic() - self._sharing.idle
        ends = select.poll()
        for connection in self._connections.values():
            if not connection.closed:
                ends.register(connection, select.POLLIN)
        # Without requests under way nothing comes but the end of a connection.
        ended = {number for number, _ in ends.poll(0)}
        for endpoint, connection in [*self._connections.items()]:
            if not connection.closed and (connection.used <= since or connection.fileno() in ended):
                self._connections.pop(endpoint).close()
                self.generation += 1
                # Others may serve by now.
                self._topology = None

    @property
    def is_single(self) -> bool:
        """Whether one server has all keys, as far as the latest run has found."""
        return isinstance(self._topology, Single)

    def owner(self, key: str) -> Endpoint | None:
        """Who has `key`, as far as the latest run has found; None if it broke."""
        return self._topology.owner(key.encode()) if self._topology else None

    def execute(self, *requests: Request) -> list[Any]:
        """Send small commands together and return their replies.

        Raises:
            ServerError: of the first command that failed; all have been sent.
        """
        return [request.result() for request in list(self.run(requests))]

    def info(self) -> ServerInfo:
        """Of the server, or of the one that has the books in a cluster."""
        (text,) = self.execute(command("INFO"))
        return ServerInfo.parse(self._text(text))

    def infos(self) -> dict[Endpoint, ServerInfo]:
        """Of the server, or of each primary of a cluster."""
        found = self._ask_all(lambda: command("INFO"))
        return {endpoint: ServerInfo.parse(self._text(text)) for endpoint, text in found.items()}

    def memories(self) -> list[MemoryInfo]:
        """A part of `infos`, which costs the servers much less."""
        return [self.memory_of(request) for request in list(self.run(self.memory_requests()))]

    def memory_requests(self) -> Iterator[Request]:
        """Requests that ask all servers for their memory, to be sent together with others."""
        yield from self._to_all(lambda: command("INFO", "memory", "keyspace", "replication"))

    def memory_of(self, request: Request) -> MemoryInfo:
        """What the reply to one of `memory_requests` says. Errors as `run`, and of the command."""
        return MemoryInfo.parse(fields_of(self._text(request.result())))

    def _text(self, info: Any) -> str:
        if not isinstance(info, bytearray):
            raise NotValkeyError(f"{self.address} answers INFO, but not as a Valkey does")
        return info.decode(errors="replace")

    def _to_all(self, ask: Callable[[], Request]) -> Iterator[Request]:
        """A request for each server that has keys."""
        yield (first := ask())
        # Who else there is is known once that is on its way.
        for endpoint in self._topology.primaries if self._topology else ():
            if endpoint != first.connection.endpoint:
                request = ask()
                request.target = endpoint
                yield request

    def _ask_all(self, ask: Callable[[], Request]) -> dict[Endpoint, Any]:
        """The replies of all servers that have keys."""
        requests = list(self.run(self._to_all(ask)))
        return {request.connection.endpoint: request.result() for request in requests}

    # --- replicas ---

    def await_replicas(self, breaks: int) -> None:
        """Wait until what was written over this link is where the config wants it.

        That is on `min_replicas` replicas, in memory, or with `wait_aof` on the disks of these and
        of the primary.

        Args:
            breaks: what `self.breaks` was before that was written. What was written over a
                connection that broke cannot be waited for any more.

        Raises:
            UnconfirmedError: a connection broke.
            ServerUnavailableError: it may not be there after `retry_timeout`.
        """
        wanted, aof = self._config.min_replicas, self._config.wait_aof
        if not wanted and not aof:
            return
        waiting = ("WAITAOF", 1, wanted, _WAIT) if aof else ("WAIT", wanted, _WAIT)
        deadline = time.monotonic() + self._retry_timeout
        while True:
            found = self._ask_all(lambda: command(*waiting))
            if self.breaks != breaks:
                raise UnconfirmedError(
                    f"a connection to {self.address} broke before replicas had confirmed what was "
                    "written over it"
                )
            confirmed = {e: reply if aof else [1, reply] for e, reply in found.items()}
            behind = {e: n for e, n in confirmed.items() if n[0] < 1 or n[1] < wanted}
            if not behind:
                return
            endpoint, (local, replicas) = behind.popitem()
            have = (
                f"only {replicas} of {wanted} replicas of {endpoint} have"
                if local
                else f"the append-only file of {endpoint} does not have"
            )
            error = ServerUnavailableError(
                f"{have} what was written to it (waited for {self._retry_timeout:g} s)",
                "Bring its replicas back, or lower min_replicas"
                if local
                else "Set appendfsync everysec or always on it, or wait_aof to false",
            )
            if time.monotonic() > deadline:
                raise error
            self._waiting(error)

    # --- what is missing ---

    def confirmed(
        self,
        look: Callable[[], _T],
        *,
        lacks_nothing: Callable[[_T], bool] = lambda found: False,
        keep: bool = False,
    ) -> _T:
        """Return what `look` reads over this link once primaries alone have answered it.

        Over new connections, because a name may lead elsewhere by now. Each server says that it is
        a primary before and after, over the connection that the replies came over, since a server
        that is demoted keeps its connections. A primary that nobody has demoted because it is cut
        off, or stood still, says so too. Therefore others are asked as well, where there are any:

        - Of a cluster's primaries, a majority names the servers that answered as the owners of
          their slots. A failover takes the votes of a majority, so one of those asked knows of it.
        - Of the configured Sentinels, a majority names the server, and nobody whom another one
          names says that it is a primary: Sentinels hear of a failover one after the other.

        Args:
            look: reads, and concludes nothing yet; it is called again where this does not hold.
                It may call this method, which then only calls `look`.
            lacks_nothing: whether what was read is right whoever answered, as values are.
            keep: use the connections that there are, for somebody who looks often, and for whom
                `breaks` has to show each that broke in between.

        Raises:
            ServerUnavailableError: after `retry_timeout` seconds in which this did not hold.
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
        """Errors as `confirmed`; OSError and TransientError where another look is due."""
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
        """Raise TransientError unless all servers connected to are the primaries now."""
        for endpoint, connection in self._connections.items():
            role = connection.current_role()
            if role is Role.UNKNOWN:
                raise TransientError(
                    f"{endpoint} lacks something, and does not say whether it is a primary or a "
                    "replica that lags; let it, and a proxy before it, answer HELLO, INFO or ROLE"
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
            "lack something as the owners of their slots; bring the others back"
        )

    def _agrees(self, endpoint: Endpoint, cluster: Cluster) -> bool:
        try:
            witness = Connection(self._config, endpoint, _WITNESS_PATIENCE)
            with contextlib.closing(witness):
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
        # They may be cut off together with the server that they name: others first from now on.
        self._sentinels.sort(key=naming.__contains__)
        raise TransientError(
            f"{endpoint} lacks something, and only {len(naming)} of {len(self._sentinels)} "
            "Sentinels name it as the primary"
            + (f"; another names {rival}" if rival else "; bring the others back, or correct url")
        )

    def _is_primary(self, endpoint: Endpoint) -> bool:
        try:
            with contextlib.closing(Connection(self._config, endpoint, _WITNESS_PATIENCE)) as other:
                return other.role is Role.PRIMARY
        except (OSError, TransientError, ServerError):
            return False

    # --- runs ---

    def run(self, requests: Iterable[Request], since: int | None = None) -> Generator[Request]:
        """Send `requests` and yield each once its reply is there, in order.

        `requests` is read one further than the window allows. A request's buffers must stay
        unchanged until it is yielded. A consumer that stops early costs the connections that have
        its replies under way. Runs may alternate, and what yields requests may run others
        meanwhile: all share the connections, and replies to one are received while those to
        another are waited for.

        Requests may be carried out in any order where they go to several servers, but a fenced one
        only after all before it. A guarded one is sent only once all before it have succeeded; if
        one was seen to fail, the run ends at the next request that is fenced or guarded.

        Args:
            requests: what to send.
            since: what `self.generation` was when that was read which `requests` follow from. They
                are only sent to the servers that this came from, and not again.

        Raises:
            UnconfirmedError: a connection was replaced since then, or broke.
            ServerUnavailableError: after `retry_timeout` seconds without any reply, through all
                new connections. What was not yielded may or may not have been carried out.
            ServerRefusedError, NotValkeyError, ConfigError: if no connection can be had.
        """
        with self.operation():
            yield from self._run(requests, since)

    def _run(self, requests: Iterable[Request], since: int | None) -> Generator[Request]:
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
                if held is not None and (held.fenced or held.guarded) and failed:
                    held, exhausted = None, True
                if held is None and not in_flight:
                    # What has moved is looked up by the next run: this one needs it no more.
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
                except ServerRefusedError as refusal:
                    # Who was let in before may find that the password is being changed.
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
                # Nobody is there any more whose buffers may be used.
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
            # Who holds some connections while waiting for others keeps those from going on who
            # do the same.
            self._is_crowded = True
            self._close_all()
            self._spare()

    def _require_generation(self, since: int | None) -> None:
        if since not in (None, self.generation):
            raise UnconfirmedError(
                f"a connection to {self.address} broke after something was read over it"
            )

    def _give(self, request: Request, in_flight: deque[Request], since: int | None) -> bool:
        """Give a request to its connection, unless it has to wait; returns whether."""
        connection = self._route(request)
        self._require_generation(since)
        if in_flight and request.guarded:
            return False
        if in_flight and isinstance(self._topology, Cluster):
            under_way = sum(each.weight for each in self._connections.values())
            depth = _DEPTH_IN_CLUSTER if len(self._primaries) > 1 else 1
            if request.fenced or not connection.has_room(depth):
                return False
            if under_way + request.weight > _MOST_IN_CLUSTER:
                return False
        elif in_flight and (_is_lost(in_flight[0]) or not connection.has_room()):
            # What is lost goes again first: one server carries requests out in their order.
            return False
        request.connection = connection
        connection.add(request)
        return True

    def _await(self, in_flight: deque[Request]) -> None:
        """Receive replies until there is one for the first request."""
        first = in_flight[0]
        while not first.done:
            if _is_lost(first):
                self._give_again(in_flight)
            for connection in self._connections.values():
                connection.flush()
            self._receive(first.connection)

    def _give_again(self, in_flight: deque[Request]) -> None:
        for request in in_flight:
            if _is_lost(request) and not request.done:
                connection = self._route(request)
                request.connection = connection
                connection.add(request)

    def _receive(self, connection: Connection) -> None:
        """Receive the next reply, and go where it sends its request."""
        request = connection.read()
        error = request.error
        if not isinstance(error, RedirectError) or request.key is None:
            request.done = True
            return
        request.error = request.connection = None
        request.redirects += 1
        if request.redirects > _REDIRECTS:
            request.redirects = 0
            raise TransientError(error.message)
        endpoint = Endpoint(error.host or connection.endpoint.host, error.port)
        # What is known may just have been dropped, for another connection that broke.
        if not error.ask and isinstance(self._topology, Cluster):
            self._topology.move(request.key, endpoint)
            self._is_outdated = True
            if endpoint not in self._primaries:
                # A replica that took over may lack what the primary before it had acknowledged.
                self.breaks += 1
                self._primaries |= {endpoint}
        target = self._connect(endpoint)
        if error.ask:
            target.add(command("ASKING"))
        request.connection = target
        target.add(request)

    # --- where requests go ---

    def _route(self, request: Request) -> Connection:
        topology = self._topology or self._discover()
        if request.target is not None and request.target in topology.primaries:
            return self._connect(request.target)
        return self._connect(topology.owner(request.key or self._home))

    def _connect(self, endpoint: Endpoint) -> Connection:
        """A connection for data. Raises TransientError for a replica, else as `Connection`."""
        known = self._connections.get(endpoint)
        if known is not None and not known.closed:
            return known
        connection = self._open(endpoint)
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
            else "which takes no writes and may lag; the host of url must lead to its primary"
        )
        return not_now(f"READONLY {endpoint} is a replica, {reason}")

    def _open(self, endpoint: Endpoint) -> Connection:
        if (away := self._away_until - time.monotonic()) > 0:
            time.sleep(away)
        return Connection(self._config, endpoint, self._unreachable_timeout)

    def _discover(self) -> Topology:
        """Find out who has what now. Errors as `Connection`."""
        topology = self._ask_sentinels() if self._config.sentinel_service else self._ask_nodes()
        others = {*self._connections} - {*topology.primaries}
        for endpoint in others:
            self._connections.pop(endpoint).close()
            self.generation += 1
        # Whoever follows a primary may not have got all that it had acknowledged.
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
            # The first to be asked the next time: to find others dead takes its time.
            self._sentinels.sort(key=sentinel.__ne__)
            return Single(endpoint)
        raise next(iter(failures.values()))

    def _open_sentinel(self, endpoint: Endpoint) -> Connection:
        return Connection(self._config, endpoint, self._unreachable_timeout, sentinel=True)

    def _ask_nodes(self) -> Topology:
        failure: Exception | None = None
        endpoints = self.address.endpoints
        nodes = deque(dict.fromkeys((*endpoints, *sorted(self._nodes))))
        # Another one each time: a node that the others have lost does not know better.
        nodes.rotate(-self.breaks)
        for endpoint in nodes:
            try:
                topology = self._ask_node(endpoint)
            except (OSError, TransientError) as error:
                failure = failure or error
                continue
            if isinstance(topology, Single) and len(endpoints) > 1:
                raise ConfigError(
                    f"url names several hosts, and what answers at {endpoint} is no cluster's node",
                    "Name one host, or give sentinel_service if they are Sentinels",
                )
            return topology
        assert failure is not None
        raise failure

    def _ask_node(self, endpoint: Endpoint) -> Topology:
        known = self._connections.get(endpoint)
        if known is not None and not known.closed and not known.waiting:
            return self._topology_at(known)
        node = self._open(endpoint)
        try:
            topology = self._topology_at(node)
        except BaseException:
            node.close()
            raise
        # Not of a node that was only asked: it may have another name here than in its cluster.
        is_of_use = isinstance(topology, Single) or (
            endpoint in topology.primaries and node.role is not Role.REPLICA
        )
        is_busy = known is not None and not known.closed
        if is_of_use and not is_busy:
            self._keep(node)
        else:
            node.close()
        return topology

    def _topology_at(self, node: Connection) -> Topology:
        if node.mode != "cluster":
            return Single(node.endpoint)
        cluster = cluster_at(node)
        self._nodes = cluster.nodes
        return cluster


def _hint(failure: Exception) -> str:
    known = TransientError | TooManyClientsError | ConnectionBrokenError
    return failure.hint if isinstance(failure, known) else ""


def _is_lost(request: Request) -> bool:
    """Whether no reply can come to a request that was given to a connection."""
    return request.connection is None or request.connection.closed
