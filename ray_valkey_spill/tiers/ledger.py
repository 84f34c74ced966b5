"""The metadata on the server: stored and pending objects, their sizes, and the leases of nodes.

A Lua script changes everything that must change together, so that no crash can split the change.
Invariant: every request is safe to repeat, because a `Link` may send it twice. Scripts also run on
a full server (`allow-oom`): they write a few bytes, against many of data.

    index     sorted set  entries of stored objects           (see `names`)
    pending   sorted set  names of objects being written      (see `names`)
    usage     hash        <session>:<node> → "<objects> <size> <stored> <changes>"; sizes in bytes;
                          changes counts up from the time of its creation in µs, so no value recurs
    writers   hash        <session>:<node> → "<writer>=<granted>/<written> …", in bytes
    totals    string      sums over both: "<objects> <size> <stored> <granted> <written> <changes>"
    leases    sorted set  <session>:<node>:<GCS address>, by when it was last renewed, in ms
    overflows hash        <session> → the token of the overflow that its nodes have
    namespaces sorted set all namespaces with the same prefix that have anything

Invariant: no key of this package may have a TTL, because a server under `volatile-*` evicts keys
that have one. So a lease is a member of a sorted set with the time of its renewal as score, and not
a key that expires (`SET` with `PX`).

Members and fields that this package cannot have written are skipped, so that foreign content stops
nobody, and no session or node name leads to a path outside the overflow. A process logs the first
one that it finds in each key.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple, TypeVar

from ray_valkey_spill.config import NAMESPACE_PATTERN, Config
from ray_valkey_spill.errors import SpillError
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName
from ray_valkey_spill.protocol.link import USUAL_SHARING, Link, Sharing
from ray_valkey_spill.protocol.resp import Prepared, Request, command
from ray_valkey_spill.tiers import scripts

__all__ = [
    "OUTLIVES_GCS",
    "Grant",
    "Kept",
    "Lease",
    "Ledger",
    "Reservation",
    "Totals",
    "Usage",
    "link_to",
    "pages",
    "parse_entry",
    "parse_pending",
    "well_formed",
]

logger = logging.getLogger("ray_valkey_spill")

# Limits of one script, during which the server serves nobody else; and of one reply.
_NAMES_PER_SCRIPT, _KEYS_PER_SCRIPT, _NODES_PER_SCRIPT = 100, 1000, 100
_PENDING_PER_SCRIPT = 200
_MEMBERS_PER_PAGE = 500
_RECOUNTS = 5

# Terms of a settlement by a writer without a grant, as the script gets them.
_NO_TERMS: tuple[str | bytes | int, ...] = (b"", b"0", b"0", b"0", b"-1")

# Names of sessions and nodes become paths in the overflow, and a clean-up removes these paths.
_NODE_NAME = re.compile("([A-Za-z0-9_-]+):([A-Za-z0-9_-]+)")
_LEASE = re.compile(f"{_NODE_NAME.pattern}:([!-~]*)")
_SESSION = re.compile("[A-Za-z0-9_-]+")
_TOKEN = re.compile("[ -.0-~]+")  # part of a file's name
_USAGE = re.compile(rb"(\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16})")
_GRANT = re.compile(rb"([^ =]+)=(\d{1,16})/(\d{1,16})")

# Keys with malformed content that this process has logged.
_logged: set[str] = set()

_F = TypeVar("_F", bytes, tuple[bytes, bytes])
_K = TypeVar("_K")
_T = TypeVar("_T")


class Usage(NamedTuple):
    """What a node has in Valkey: objects, bytes of their data, and bytes counted for them.

    `changes` differs after every change of the others.
    """

    objects: int = 0
    size: int = 0
    stored: int = 0
    changes: int = 0


class Totals(NamedTuple):
    """Sums of `Usage` and `Grant` over all nodes, in bytes, and a count of changes."""

    objects: int = 0
    size: int = 0
    stored: int = 0
    granted: int = 0
    written: int = 0
    changes: int = 0

    @property
    def used(self) -> int:
        """Bytes that count for the budget."""
        return self.stored + self.granted


class Grant(NamedTuple):
    """Bytes that a writer may write, and those of them that it has written but not settled."""

    granted: int
    written: int


class Reservation(NamedTuple):
    """The reply to a request for a larger grant. Sizes are in bytes.

    Attributes:
        granted: bytes added to the grant; 0 if there was less than the writer's minimum.
        used: bytes of the budget used before.
        unwritten: bytes that all writers may still write, including these.
        objects, size, stored: of all nodes, as in `Usage`.
    """

    granted: int
    used: int
    unwritten: int
    objects: int
    size: int
    stored: int


class Kept(NamedTuple):
    """The terms on which a writer keeps a grant for its next objects when it settles some.

    Attributes:
        writer: its name, among those of its node.
        written: how much of what it was granted before is written, and neither settled nor removed.
        most: how much it may keep beside that.
        limit: how much all writers may be granted for it to keep some.
        budget: how much all may have stored and be granted; None for no bound.
    """

    writer: str
    written: int
    most: int
    limit: int
    budget: int | None


# In the place of an address, in a second lease of a node on the host of its GCS: the session
# outlives its GCS. Version 0.1 takes it for the address of a host that does not answer.
OUTLIVES_GCS = "outlives-gcs"


class Lease(NamedTuple):
    """A node of a session was alive at `renewed`, in ms by the server's clock.

    Attributes:
        gcs_address: host:port of the session's GCS, or `OUTLIVES_GCS`.
    """

    node_name: NodeName
    gcs_address: str
    renewed: int

    @property
    def has_address(self) -> bool:
        """Whether `gcs_address` is one at which a GCS can be asked."""
        return self.gcs_address not in ("", OUTLIVES_GCS)


def link_to(
    config: Config,
    *,
    unreachable_timeout: float | None = None,
    waiting: Callable[[SpillError], None] = lambda error: None,
    any_role: bool = False,
    sharing: Sharing = USUAL_SHARING,
    spare: Callable[[], None] = lambda: None,
) -> Link:
    """Client for the configured server, cluster or Sentinel group.

    Requests without a key are sent to the server that has the metadata. For options see `Link`.
    """
    home = Keyspace.of(config).index.encode()
    return Link(
        config,
        home,
        unreachable_timeout=unreachable_timeout,
        waiting=waiting,
        any_role=any_role,
        sharing=sharing,
        spare=spare,
    )


class Ledger:
    """Reads and writes the metadata over a link. Errors are those of `link.Link.run`.

    Methods for changes that are sent together with values return requests.
    """

    def __init__(self, link: Link, keyspace: Keyspace) -> None:
        self._link = link
        self._keys = keys = keyspace
        accounts = (keys.pending, keys.index, keys.usage, keys.writers, keys.totals)
        self._accounts = [key.encode() for key in accounts]
        # Encoded once: scripts are long, and these are sent with each spill or deletion.
        self._register = Prepared("EVAL", scripts.ADD, 1, keys.pending)
        self._settle = Prepared("EVAL", scripts.SETTLE, key=keys.pending)
        self._forget = self._script(scripts.FORGET)
        self._reserve = self._script(scripts.RESERVE)

    def _script(self, script: str) -> Prepared:
        """Prepare a script that uses the accounting keys."""
        return Prepared("EVAL", script, len(self._accounts), *self._accounts)

    # --- requests ---

    def registrations(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        """Yield requests that register objects as pending; no value may be written before."""
        for page in pages(map(str, names), _MEMBERS_PER_PAGE):
            yield self._register.request(*page)

    def settlements(
        self,
        node: NodeName,
        entries: Iterable[Entry],
        kept: Kept | None = None,
        *,
        verify: bool = False,
    ) -> Iterator[Request]:
        """Yield requests that settle objects: move them from the pending set to the index.

        Each reply begins with the number of its objects now in the index. An object is missing if
        it was not pending: its node's data were destroyed meanwhile, or the server lost it.

        Args:
            node: node of the objects.
            entries: the objects; empty to change only the grant.
            kept: terms of their writer's next grant; None if it has no grant.
            verify: whether to settle only objects with all their values. Only for a single server,
                which has all values, and for objects that `can_verify`.
        """
        entries = list(entries)
        unsettled = 0 if kept is None else sum(entry.stored for entry in entries)
        for page in _settlement_pages(entries):
            terms = _NO_TERMS
            if kept is not None:
                unsettled -= sum(entry.stored for entry in page)
                # Only the last page keeps more than what is written.
                most = 0 if unsettled else kept.most
                written = kept.written + unsettled
                terms = (kept.writer, written, most, kept.limit, _limit(kept.budget))
            values = [key for e in page for key in self._keys.values(e.name)] if verify else []
            count = len(self._accounts) + len(values)
            yield self._settle.request(
                count, *self._accounts, *values, str(node), *terms, *map(str, page)
            )

    @staticmethod
    def can_verify(name: ObjectName) -> bool:
        """Whether one script can check all values of an object."""
        return name.chunks < _KEYS_PER_SCRIPT

    def forget(self, names: Iterable[ObjectName]) -> Iterator[Request]:
        """Yield requests that remove objects from the metadata; missing objects are no error."""
        for page in pages(names, _NAMES_PER_SCRIPT):
            yield self._forget.request(*map(str, page))

    def _eval(self, script: str, keys: Sequence[str | bytes], *args: str | bytes | int) -> Request:
        return command("EVAL", script, len(keys), *keys, *args)

    # --- objects and nodes ---

    def stored(self, node_name: NodeName | None = None) -> Iterator[list[Entry]]:
        """Yield the stored objects of a node, or of all nodes, in order, by the page."""
        start: str | bytes
        start, stop = ("-", "+") if node_name is None else _range(str(node_name))
        while True:
            entries, last = self._stored_page(start, stop, _MEMBERS_PER_PAGE)
            if not last:
                return
            yield entries
            start = b"(" + last

    def stored_after(
        self, node_name: NodeName, after: bytes, count: int
    ) -> tuple[list[Entry], bytes]:
        """Return up to `count` stored objects of a node, and where to continue.

        Args:
            node_name: the node.
            after: empty to begin, then what the previous call returned.
            count: number of members to read, at most 500. Malformed ones are skipped.

        Returns:
            The entries in order; and the value for `after`, empty after the last object.
        """
        start: str | bytes
        start, stop = _range(str(node_name))
        count = min(count, _MEMBERS_PER_PAGE)
        return self._stored_page(b"(" + after if after else start, stop, count)

    def _stored_page(self, start: str | bytes, stop: str, count: int) -> tuple[list[Entry], bytes]:
        """Return the entries of a range of the index, and the last member; empty if none."""
        key = self._keys.index
        (members,) = self._link.execute(command("ZRANGEBYLEX", key, start, stop, "LIMIT", 0, count))
        last = bytes(members[-1]) if members else b""
        return list(well_formed(key, members, parse_entry)), last

    def pending(self, node_name: NodeName) -> Iterator[list[ObjectName]]:
        """Yield the objects being written, or left by killed writers, by the page."""
        start: str | bytes
        start, stop = _range(str(node_name))
        while True:
            request = self._eval(
                scripts.PENDING, self._accounts[:2], start, stop, _PENDING_PER_SCRIPT
            )
            ((last, members),) = self._link.execute(request)
            if not last:
                return
            yield list(well_formed(self._keys.pending, members, parse_pending))
            start = b"(" + last

    def node_names(self) -> set[NodeName]:
        """Return every node in the metadata, found by hopping from one to the next."""
        leases = {lease.node_name for lease in self.leases()}
        stored = self._hop(self._keys.index, lambda member: parse_entry(member).name)
        pending = self._hop(self._keys.pending, parse_pending)
        return {*self.usages(), *self.grants(), *leases, *stored, *pending}

    def _hop(self, key: str, parse: Callable[[bytes], ObjectName]) -> Iterator[NodeName]:
        start: str | bytes = "-"
        while True:
            request = self._eval(scripts.NODES, [key], start, _NODES_PER_SCRIPT)
            (members,) = self._link.execute(request)
            if not members:
                return
            for name in well_formed(key, members, parse):
                yield NodeName(name.session, name.node)
            session, _, rest = members[-1].partition(b":")
            node, separator, _ = rest.partition(b":")
            is_node = bool(session and node and separator)
            start = b"[%b:%b;" % (session, node) if is_node else b"(" + members[-1]

    # --- usage ---

    def totals(self) -> Totals:
        """Return the sums over all nodes."""
        (reply,) = self._link.execute(self._eval(scripts.TOTALS, self._accounts))
        return Totals(*reply)

    def usages(self) -> dict[NodeName, Usage]:
        return dict(
            self._fields(self._keys.usage, lambda field, value: (_node_name(field), _usage(value)))
        )

    def recount(self, node_name: NodeName) -> bool:
        """Correct a node's usage from the index; return False if it changes too fast."""
        for _ in range(_RECOUNTS):
            (was,) = self._link.execute(command("HGET", self._keys.usage, str(node_name)))
            objects = size = stored = 0
            for page in self.stored(node_name):
                objects += len(page)
                size += sum(entry.size for entry in page)
                stored += sum(entry.stored for entry in page)
            if was is None:
                if not objects:
                    return True
                # Create the field first, then count again: a missing field does not show changes.
                self._correct(node_name, b"", Usage(changes=_now()))
                continue
            known = next(well_formed(self._keys.usage, [was], _usage), None)
            if objects and known is not None and known[:3] == (objects, size, stored):
                return True
            changes = _now() if known is None else known.changes + 1
            counted = Usage(objects, size, stored, changes) if objects else None
            if self._correct(node_name, bytes(was), counted):
                return True
        return False

    def _correct(self, node_name: NodeName, was: bytes, usage: Usage | None) -> bool:
        """Replace a node's usage if it is still `was`; return whether it was."""
        text = "" if usage is None else " ".join(map(str, usage))
        request = self._eval(scripts.CORRECT, self._accounts, str(node_name), was, text)
        return self._link.execute(request) == [1]

    def recount_totals(self) -> bool:
        """Correct the totals by adding up again; return False if they change too fast.

        The scripts change them together with the nodes' values. So they drift only if another
        program writes to these keys, as version 0.1 does.
        """
        for _ in range(_RECOUNTS):
            before = self.totals()
            usages = self._values(self._keys.usage, _usage)
            of_nodes = self._values(self._keys.writers, _grants)
            grants = [grant for of_node in of_nodes for grant in of_node.values()]
            counted = (
                *(sum(usage[i] for usage in usages) for i in range(3)),
                *(sum(grant[i] for grant in grants) for i in range(2)),
            )
            request = self._eval(scripts.ADJUST, self._accounts, before.changes, *counted)
            if self._link.execute(request) == [1]:
                return True
        return False

    # --- grants ---

    def reservation(
        self,
        node: NodeName,
        writer: str,
        grant: Grant,
        least: int,
        most: int,
        budget: int | None,
        room: int | None,
    ) -> Request:
        """Return a request for `least` to `most` bytes on top of `grant`; replies a `Reservation`.

        If there is less than `least`, the writer keeps `grant`.

        Args:
            node: node of the writer.
            writer: name of the writer.
            grant: its present grant.
            least: the least useful addition, in bytes.
            most: the largest addition, in bytes.
            budget: bytes that all may have stored or been granted; None for no limit.
            room: bytes that the server has room for, besides what it holds; None for no limit.
        """
        limits = _limit(budget), _limit(room)
        return self._reserve.request(str(node), writer, *grant, least, most, *limits)

    def release(self, node: NodeName, writers: Iterable[str]) -> None:
        """Release the grants of some writers of a node."""
        if names := [*writers]:
            self._link.execute(self._eval(scripts.RELEASE, self._accounts, str(node), *names))

    def release_all(self, node: NodeName) -> None:
        """Release the grants of all writers of a node, and what version 0.1 has left of them."""
        self._link.execute(self._eval(scripts.RELEASE, self._accounts, str(node)))
        fields = [field for field, _ in self._pairs(self._keys.grants)]
        if left := [field for field in fields if field.startswith(f"{node}:".encode())]:
            self._link.execute(command("HDEL", self._keys.grants, *map(bytes, left)))

    def grants(self) -> dict[NodeName, dict[str, Grant]]:
        """Return the grants of all nodes, by node and writer."""
        return dict(
            self._fields(
                self._keys.writers, lambda field, value: (_node_name(field), _grants(value))
            )
        )

    def grants_of(self, node: NodeName) -> dict[str, Grant]:
        """Return the grants of a node, by writer."""
        (value,) = self._link.execute(command("HGET", self._keys.writers, str(node)))
        found = [] if value is None else [value]
        return next(well_formed(self._keys.writers, found, _grants), {})

    # --- leases ---

    def renew(self, node_name: NodeName, gcs_address: str, *, new: bool) -> bool:
        """Renew the lease of `node_name`, or create it if `new`; return False if there is none."""
        request = self._eval(
            scripts.RENEW, [self._keys.leases], f"{node_name}:{gcs_address}", "1" if new else "0"
        )
        is_renewed: bool = self._link.execute(request) == [1]
        if new:
            self._list_namespace()
        return is_renewed

    def end_lease(self, node_name: NodeName, gcs_address: str) -> None:
        """Remove a lease that was renewed with `gcs_address`."""
        self._link.execute(command("ZREM", self._keys.leases, f"{node_name}:{gcs_address}"))
        self.unlist_if_empty()

    def add_address(self, leases: Iterable[Lease], gcs_address: str) -> None:
        """Add another address of the GCS to leases. Their times of renewal stay as they are."""
        latest = {each.node_name: each for each in sorted(leases, key=lambda each: each.renewed)}
        members = (
            (f"{name}:{each.gcs_address}", f"{name}:{gcs_address}") for name, each in latest.items()
        )
        while page := list(islice(members, _NAMES_PER_SCRIPT)):
            pairs = chain.from_iterable(page)
            self._link.execute(self._eval(scripts.ADD_ADDRESSES, [self._keys.leases], *pairs))

    def leases(self) -> list[Lease]:
        pairs = self._leases_by_page()
        return list(well_formed(self._keys.leases, pairs, lambda pair: _lease(*pair)))

    def _leases_by_page(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield members and scores. A lease renewed meanwhile may come twice; none is left out."""
        score, seen = b"-inf", set[bytes]()
        while True:
            limit = len(seen) + _MEMBERS_PER_PAGE
            request = command(
                *("ZRANGE", self._keys.leases, score, "+inf", "BYSCORE"),
                *("LIMIT", 0, limit, "WITHSCORES"),
            )
            (found,) = self._link.execute(request)
            pairs = [(bytes(member), bytes(each)) for member, each in zip(found[::2], found[1::2])]
            yield from (pair for pair in pairs if pair[0] not in seen)
            if len(pairs) < limit:
                return
            # The next page begins with the members that share the last score: by their number they
            # could not be skipped, since any of them may be renewed until then.
            score = pairs[-1][1]
            seen = {member for member, each in pairs if each == score}

    def close_account(self, node_name: NodeName) -> None:
        """Remove the leases, grants and usage of a node that has nothing stored any more."""
        members = [f"{o}:{address}" for o, address, _ in self.leases() if o == node_name]
        if members:
            self._link.execute(command("ZREM", self._keys.leases, *members))
        self.release_all(node_name)
        self.recount(node_name)

    def unlist_if_empty(self) -> None:
        """Remove the namespace from the list, unless it has anything."""
        if self._is_empty():
            self._change_list(command("ZREM", self._keys.namespaces, self._keys.namespace))
            # A node that joined meanwhile may have listed it before that.
            if not self._is_empty():
                self._list_namespace()

    def _is_empty(self) -> bool:
        """Whether the namespace has no lease, and nothing stored or half-written."""
        keys = (self._keys.leases, self._keys.index, self._keys.pending)
        return self._link.execute(command("EXISTS", *keys)) == [0]

    # --- namespaces ---

    def namespaces(self) -> list[str]:
        """Those with the same prefix that have anything, in order."""
        (found,) = self._link.execute(command("ZRANGE", self._keys.namespaces, 0, -1))
        return list(
            well_formed(
                self._keys.namespaces,
                found,
                lambda member: _matched(NAMESPACE_PATTERN, member)[0],
            )
        )

    def _list_namespace(self) -> None:
        self._change_list(self._eval(scripts.ADD, [self._keys.namespaces], self._keys.namespace))

    def _change_list(self, request: Request) -> None:
        """Ignores a server's refusal, since only reports need the list, and users may lack it."""
        list(self._link.run([request]))

    def time(self) -> int:
        """Return the server's clock, in ms."""
        ((seconds, microseconds),) = self._link.execute(command("TIME"))
        return int(seconds) * 1000 + int(microseconds) // 1000

    # --- overflows ---

    def agree_on_overflow(self, session: str, proposed: str) -> str:
        """Return the token of a session's overflow; sets it to `proposed` if there is none."""
        (found,) = self._link.execute(
            self._eval(scripts.AGREE, [self._keys.overflows], session, proposed)
        )
        return str(found.decode())

    def overflows(self) -> dict[str, str]:
        """Return the tokens, by session."""
        return dict(
            self._fields(
                self._keys.overflows,
                lambda field, value: (
                    _matched(_SESSION, field)[0],
                    _matched(_TOKEN, value)[0],
                ),
            )
        )

    def forget_overflow(self, session: str) -> bool:
        """Remove a session's token unless one of its nodes has a lease; return whether it did."""
        since = self.time()
        if any(lease.node_name.session == session for lease in self.leases()):
            return False
        keys = [self._keys.overflows, self._keys.leases]
        request = self._eval(scripts.FORGET_OVERFLOW, keys, session, f"{session}:", since)
        return self._link.execute(request) == [1]

    def _fields(
        self, key: str, parse: Callable[[bytes, bytes], tuple[_K, _T]]
    ) -> Iterator[tuple[_K, _T]]:
        return well_formed(key, self._pairs(key), lambda pair: parse(*pair))

    def _values(self, key: str, parse: Callable[[bytes], _T]) -> list[_T]:
        """The values of a hash, of whatever fields, as the scripts add them up."""
        values = {bytes(field): value for field, value in self._pairs(key)}.values()
        return list(well_formed(key, values, parse))

    def _pairs(self, key: str) -> Iterator[tuple[bytes, bytes]]:
        """Yield the fields of a hash with their values; some may come twice."""
        cursor = b"0"
        while True:
            request = command("HSCAN", key, cursor, "COUNT", _MEMBERS_PER_PAGE)
            ((next_cursor, found),) = self._link.execute(request)
            yield from zip(found[::2], found[1::2])
            cursor = bytes(next_cursor)
            if cursor == b"0":
                return


def well_formed(key: str, found: Iterable[_F], parse: Callable[[_F], _T]) -> Iterator[_T]:
    """Parse the content `found` at `key`, and skip what is malformed.

    Args:
        key: named in the log, once per process.
        found: members, or pairs of fields and values.
        parse: raises ValueError or OverflowError for malformed content.
    """
    for each in found:
        try:
            parsed = parse(each)
        except (ValueError, OverflowError):
            if key not in _logged:
                _logged.add(key)
                pieces = each if isinstance(each, tuple) else (each,)
                logger.warning(
                    "%s has malformed content, which is skipped, for example %.200s. Another "
                    "program may write below this prefix: give each its own key_prefix, and delete "
                    "what is malformed",
                    key,
                    " ".join(repr(bytes(piece)) for piece in pieces),
                )
            continue
        yield parsed


def parse_entry(member: bytes) -> Entry:
    """Parse a member of the index. Raises ValueError if it is malformed."""
    return Entry.parse(member.decode())


def parse_pending(member: bytes) -> ObjectName:
    """Parse a member of the pending set. Raises ValueError if it is malformed."""
    return ObjectName.parse(member.decode())


def _settlement_pages(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield the entries for each script; at least one page."""
    page: list[Entry] = []
    keys = 0
    for entry in entries:
        count = 1 + entry.name.chunks
        if page and (len(page) == _NAMES_PER_SCRIPT or keys + count > _KEYS_PER_SCRIPT):
            yield page
            page, keys = [], 0
        page.append(entry)
        keys += count
    yield page


def _limit(size: int | None) -> int:
    return -1 if size is None else size


def pages(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    source = iter(items)
    while page := list(islice(source, size)):
        yield page


def _range(prefix: str) -> tuple[str, str]:
    """Return the bounds of all members that begin with `prefix` and ":"; ";" follows ":"."""
    return f"[{prefix}:", f"({prefix};"


def _matched(pattern: re.Pattern[str], text: bytes) -> re.Match[str]:
    match = pattern.fullmatch(text.decode())
    if match is None:
        raise ValueError
    return match


def _node_name(field: bytes) -> NodeName:
    return NodeName(*_matched(_NODE_NAME, field).groups())


def _lease(member: bytes, score: bytes) -> Lease:
    session, node, gcs_address = _matched(_LEASE, member).groups()
    return Lease(NodeName(session, node), gcs_address, int(float(score)))


def _usage(value: bytes) -> Usage:
    return Usage(*_numbers(_USAGE, value))


def _grants(value: bytes) -> dict[str, Grant]:
    grants = {}
    for each in bytes(value).split():
        match = _GRANT.fullmatch(each)
        if match is None:
            raise ValueError
        grants[match[1].decode()] = Grant(int(match[2]), int(match[3]))
    if not grants:
        raise ValueError
    return grants


def _numbers(pattern: re.Pattern[bytes], value: bytes) -> Iterator[int]:
    match = pattern.fullmatch(value)
    if match is None:
        raise ValueError
    return map(int, match.groups())


def _now() -> int:
    """Return this host's time in microseconds since the epoch."""
    return time.time_ns() // 1000
