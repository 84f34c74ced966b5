"""What becomes of a spill of which nobody knows how far the server has carried it out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.proxy import Proxy, proxy_to
from support.samples import get, noise, source
from support.servers import PATIENCE, Server, acl_user, valkey_server, wait_until
from support.stores import Store
from support.topologies import cluster_servers

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    LostObjectError,
    NotValkeyError,
    ServerError,
    ServerFullError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import Entry, Keyspace, NodeName, ObjectName, new_attempt
from ray_valkey_spill.store.under_way import UNDER_WAY, UnderWay
from ray_valkey_spill.tiers.ledger import Grant, Ledger, link_to
from ray_valkey_spill.units import MIB

CHUNK = 100_000
# The replies to one registration and to two chunks and their header. The next one says what is
# settled.
BEFORE_SETTLED = len(b":1\r\n") + 3 * len(b"+OK\r\n")


class Unreadable:
    """Data of an object that cannot be read, for a reason that nobody expects."""

    def __len__(self) -> int:
        return 3 * CHUNK

    def __getitem__(self, part: object) -> memoryview:
        raise MemoryError


class Cut:
    """A store whose server carries out a spill, and says no more than that it has the values."""

    def __init__(self, server: Server, proxy: Proxy, **params: Any) -> None:
        self.client = server.client
        self.params = {"url": proxy.url, "retry_timeout": 0.5, "chunk_size": CHUNK, **params}
        config = Config.load(self.params, {})
        self.keys = Keyspace.of(config)
        self.store = Store(config, "session", "node")
        self.link = link_to(Config.load({**self.params, "url": server.url}, {}))
        self.ledger = Ledger(self.link, self.keys)
        self.proxy = proxy

    @contextlib.contextmanager
    def unheard(self, size: int) -> Iterator[None]:
        """Let so many bytes come from the server, which then cannot be reached."""
        self.proxy.to_client.refuse_after = size
        yield
        self.proxy.refusing = False

    def put_unheard(self, number: int) -> None:
        """Put an object of two chunks that the server settles, and does not tell of."""
        before = self.client.zcard(self.keys.index)
        with self.unheard(BEFORE_SETTLED):
            urls, failure = self.store.put([source(noise(2 * CHUNK, number), number)])
        assert urls == []
        assert isinstance(failure, ServerUnavailableError)
        assert self.client.zcard(self.keys.index) == before + 1

    def close(self) -> None:
        self.store.destroy(lambda pid: False)
        self.store.close()
        self.link.close()

    @property
    def values(self) -> list[bytes]:
        return list(self.client.keys(f"{self.keys.root}*:*:*"))

    def pending(self) -> list[bytes]:
        return list(self.client.zrange(self.keys.pending, 0, -1))

    def put_and_lose_the_settlement(self, number: int = 0) -> str:
        """Put an object, of whose spill a failover then loses the last command alone."""
        keys = self.keys
        metadata = (keys.pending, keys.index, keys.usage, keys.writers, keys.totals)
        copied: dict[str, bytes | None] = {}
        before = len(self.values)

        def copy() -> None:
            wait_until(lambda: len(self.values) == before + 3)
            copied.update({key: self.client.dump(key) for key in metadata})

        pending = len(self.pending())
        self.proxy.before(copy, b"EVAL", 2)
        (url,), failure = self.store.put([source(noise(2 * CHUNK, number), number)])
        assert failure is None
        for key, value in copied.items():
            if value is None:
                self.client.delete(key)
            else:
                self.client.restore(key, 0, value, replace=True)
        assert len(self.pending()) == pending + 1
        return url


@contextlib.contextmanager
def cut(server: Server, **params: Any) -> Iterator[Cut]:
    with proxy_to(server.port) as proxy, contextlib.closing(Cut(server, proxy, **params)) as made:
        yield made


@pytest.mark.parametrize("max_bytes", [None, 64 * MIB])
def test_what_was_settled_and_given_up_is_removed(server: Server, max_bytes: int | None) -> None:
    with cut(server, max_bytes=max_bytes) as ours:
        (url,), _ = ours.store.put([source(noise(1000))])
        ours.put_unheard(1)
        assert ours.store.recover(lambda pid: True) == 1
        assert ours.client.zcard(ours.keys.index) == 1
        assert len(ours.client.keys(f"{ours.keys.root}*:*:*")) == 1
        # Once is enough.
        assert ours.store.recover(lambda pid: True) == 0
        ours.store.delete([url])
        assert ours.ledger.totals().stored == 0


def fill_beside(ours: Cut, max_bytes: int) -> None:
    """Have another node take all that is left of the budget, but for some kilobytes."""
    other = Store(Config.load(ours.params, {}), "session", "other")
    with contextlib.closing(other):
        for size in (MIB, CHUNK, CHUNK // 10):
            number, failure = 0, None
            while failure is None:
                number += 1
                _, failure = other.put([source(noise(size, number), number)])
            assert isinstance(failure, ServerFullError)
        other.give_back()
    assert ours.ledger.totals().used > max_bytes - CHUNK


def assert_within(ours: Cut, max_bytes: int) -> None:
    """Nothing is put that the budget, which others have used up, has no room for."""
    urls, failure = ours.store.put([source(noise(9 * CHUNK, 9), 9)])
    assert ours.ledger.totals().used <= max_bytes
    assert urls == []
    assert isinstance(failure, ServerFullError)
    other = Store(Config.load(ours.params, {}), "session", "other")
    with contextlib.closing(other):
        other.destroy(lambda pid: False)


def test_a_grant_that_was_settled_unheard_is_not_used_again(server: Server) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        ours.store.put([source(noise(1000))])
        ours.put_unheard(1)
        ours.store.recover(lambda pid: True)
        fill_beside(ours, 20 * MIB)
        assert_within(ours, 20 * MIB)


def test_a_grant_whose_release_was_unheard_is_not_used_again(server: Server) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        ours.store.put([source(noise(1000))])
        ours.store.recover(lambda pid: True)
        with ours.unheard(0), pytest.raises(ServerUnavailableError):
            ours.store.give_back()
        assert ours.ledger.totals().granted == 0
        fill_beside(ours, 20 * MIB)
        assert_within(ours, 20 * MIB)


def test_a_grant_that_was_unheard_of_is_given_back(server: Server) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        ours.store.begin_lease("", lambda: False)
        with ours.unheard(0):
            urls, failure = ours.store.put([source(noise(1000))])
        assert urls == []
        assert isinstance(failure, ServerUnavailableError)
        assert ours.ledger.totals().granted > 0
        ours.store.give_back()
        assert ours.ledger.totals().granted == 0


def test_what_was_left_half_written_counts_whatever_others_are_granted(server: Server) -> None:
    with cut(server, max_bytes=64 * MIB) as ours:
        ours.store.put([source(noise(1000))])
        ours.proxy.to_server.refuse_after = 6 * MIB
        assert ours.store.put([source(noise(12 * MIB, 1), 1)])[0] == []
        ours.proxy.refusing = False
        # More than all may keep together, so that this writer may keep nothing for its next object.
        other = NodeName("session", "other")
        ours.link.execute(
            ours.ledger.reservation(other, "1-x", Grant(0, 0), MIB, 40 * MIB, None, None)
        )
        assert len(ours.store.put([source(noise(1000, 2), 2)])[0]) == 1
        left = sum(
            ours.client.memory_usage(key) for key in ours.client.keys(f"{ours.keys.root}*:*:*:*")
        )
        assert left > 2 * CHUNK
        granted = ours.ledger.grants_of(ours.store.node)
        ours.ledger.release(other, ["1-x"])
        assert sum(grant.granted for grant in granted.values()) >= left
        ours.store.recover(lambda pid: True)
        assert ours.client.keys(f"{ours.keys.root}*:*:*:*") == []


def test_what_the_server_loses_before_it_is_settled_is_not_reported_as_stored(
    server: Server,
) -> None:
    with cut(server) as ours:

        def lose_a_chunk() -> None:
            """As if the server had evicted it."""
            wait_until(lambda: ours.client.keys("*.2:1"))
            ours.client.delete(*ours.client.keys("*.2:1"))

        # The first one registers, the second one settles.
        ours.proxy.before(lose_a_chunk, b"EVAL", number=2)
        urls, failure = ours.store.put([source(noise(2 * CHUNK))])
        assert urls == []
        assert isinstance(failure, LostObjectError)
        assert ours.client.zcard(ours.keys.index) == 0


def test_a_look_that_fails_in_the_middle_of_an_object_fails_the_spill() -> None:
    with (
        valkey_server(maxmemory=1024 * MIB) as server,
        cut(server) as ours,
        ThreadPoolExecutor() as pool,
    ):
        way = ours.proxy.to_server
        assert len(ours.store.put([source(noise(1000))])[0]) == 1
        data, before = noise(40 * MIB, 1), way.bytes

        def refuse_looks() -> None:
            """Once the room was looked at, and before that is done again."""
            wait_until(lambda: way.bytes > before + 2 * MIB)
            way.replaced = {b"$4\r\nINFO": b"$4\r\nINFX"}

        way.delay = 0.001
        refusing = pool.submit(refuse_looks)
        urls, failure = ours.store.put([source(data, 1)])
        refusing.result()
        assert urls == []
        assert isinstance(failure, ServerError)
        way.replaced = {}
        way.flow()
        assert ours.client.zcard(ours.keys.index) == 1
        assert ours.client.zcard(ours.keys.pending) == 0


def test_a_proxy_before_a_cluster_that_looks_like_one_server(tmp_path: Path) -> None:
    """Scripts with keys of several slots are refused there, and not needed."""
    with (
        cluster_servers(tmp_path, primaries=1, replicas=0) as cluster,
        proxy_to(cluster.primaries()[0].port) as proxy,
    ):
        proxy.to_server.replaced = {b"HELLO": b"HELLX"}
        config = Config.load({"url": proxy.url, "chunk_size": CHUNK, "max_bytes": 64 * MIB}, {})
        with contextlib.closing(Store(config, "session", "node")) as store:
            for number in range(2):
                urls, failure = store.put([source(noise(5 * CHUNK, number), number)])
                assert failure is None
                assert get(store, urls[0], number) == noise(5 * CHUNK, number)
                store.delete(urls)
            assert store.destroy(lambda pid: True) == 0


def test_a_put_whose_data_were_destroyed_meanwhile_keeps_no_grant(server: Server) -> None:
    with cut(server, max_bytes=64 * MIB) as ours:
        ours.store.put([source(noise(1000))])

        def destroy() -> None:
            ours.client.delete(*server.our_keys())

        # The first one registers, the second one settles.
        ours.proxy.before(destroy, b"EVAL", number=2)
        urls, failure = ours.store.put([source(noise(1000, 1), 1)])
        assert urls == []
        assert isinstance(failure, LostObjectError)
        assert server.our_keys() == []


def test_what_a_failover_has_made_pending_again_is_settled_again(server: Server) -> None:
    with cut(server) as ours:
        node = ours.store.background
        url = ours.put_and_lose_the_settlement()
        assert ours.store.recover(lambda pid: True) == 0, "its writer has reported it"
        assert get(ours.store, url) == noise(2 * CHUNK)
        assert node.settle_again() == 1
        assert ours.client.zcard(ours.keys.index) == 1
        assert ours.client.zcard(ours.keys.pending) == 0
        assert ours.ledger.totals().objects == 1
        # Once is enough.
        assert node.settle_again() == 0
        ours.store.delete([url])
        assert ours.values == []
        assert ours.ledger.totals().stored == 0


def test_what_a_snapshot_has_made_pending_again_long_after_it_was_put_is_settled_if_it_is_whole(
    server: Server,
) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        # With a grant at hand for the next ones.
        ours.store.delete(ours.store.put([source(noise(1000))])[0])
        whole, broken = (ours.put_and_lose_the_settlement(number) for number in (1, 2))
        names = [ObjectName.parse(each.decode()) for each in ours.pending()]
        UNDER_WAY.are_settled(names, time.monotonic() + 90)
        assert ours.store.background.settle_again() == 0, "nobody knows any more"
        ours.client.delete(f"{ours.keys.header(ours.keys.parse_url(broken).name)}:1")
        assert ours.store.recover(lambda pid: True) == 1
        assert ours.pending() == []
        assert get(ours.store, whole, 1) == noise(2 * CHUNK, 1)
        totals = ours.ledger.totals()
        assert (totals.objects, totals.size) == (1, 2 * CHUNK)
        assert totals.stored > 2 * CHUNK
        ours.store.delete([whole])
        assert ours.values == []
        assert ours.ledger.totals().stored == 0


@pytest.mark.parametrize("age", [0, 3600])
def test_what_a_killed_writer_has_left_whole_is_settled_only_if_it_was_put_long_ago(
    server: Server, age: int
) -> None:
    """For no spill takes so long. What was put lately may be what Ray never heard of."""
    with cut(server) as ours:
        (url,), _ = ours.store.put([source(noise(2 * CHUNK))])
        name = ours.keys.parse_url(url).name
        began = int(1000 * (time.time() - age))
        left = name._replace(attempt=f"{began:011x}{999_999:08x}{0:08x}")
        ours.link.execute(*ours.ledger.registrations([left]))
        for key, copy in zip(ours.keys.values(name), ours.keys.values(left)):
            ours.client.copy(key, copy)
        assert ours.store.recover(lambda pid: pid != 999_999) == (0 if age else 1)
        assert ours.pending() == []
        assert ours.client.zcard(ours.keys.index) == (2 if age else 1)
        ours.store.destroy(lambda pid: False)
        assert ours.values == []


def test_a_grant_that_a_snapshot_has_brought_back_is_released(server: Server) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        (url,), _ = ours.store.put([source(noise(2 * CHUNK))])
        (writer,) = ours.ledger.grants_of(ours.store.node)
        metadata = {key: ours.client.dump(key) for key in (ours.keys.writers, ours.keys.totals)}
        ours.store.recover(lambda pid: True)
        assert [*ours.ledger.grants_of(ours.store.node)] == [writer], "it is known"
        ours.store.give_back()
        assert ours.ledger.totals().granted == 0
        for key, value in metadata.items():
            ours.client.restore(key, 0, value, replace=True)
        assert ours.ledger.totals().granted > 0
        ours.store.give_back()
        assert [*ours.ledger.grants_of(ours.store.node)] == [writer], "nobody knows any more"
        ours.store.recover(lambda pid: True)
        assert [*ours.ledger.grants_of(ours.store.node)] == []
        assert ours.ledger.totals().granted == 0
        assert get(ours.store, url) == noise(2 * CHUNK)
        ours.store.delete([url])


def test_what_a_failover_has_made_pending_again_is_removed_with_its_node(server: Server) -> None:
    with cut(server) as ours:
        ours.put_and_lose_the_settlement()
        assert ours.store.destroy(lambda pid: False) == 1
        assert ours.values == []


def test_after_a_break_objects_are_registered_again(server: Server) -> None:
    """The server that takes the rest of their values may have lost that they were."""
    data = noise(200 * CHUNK)  # more than is under way at a time
    with cut(server) as ours:

        def lose() -> bool:
            wait_until(lambda: len(ours.values) >= 3)
            ours.client.delete(ours.keys.pending)
            return False

        ours.proxy.before(lose, b"SET", 12)
        before = int(ours.client.info("commandstats").get("cmdstat_set", {}).get("calls", 0))
        (url,), failure = ours.store.put([source(data)])
        assert failure is None
        written = int(ours.client.info("commandstats")["cmdstat_set"]["calls"]) - before
        # Those under way are sent twice; all would be if the object had to be put again.
        assert 201 <= written < 300
        assert get(ours.store, url) == data


def test_values_whose_registration_was_lost_are_removed(server: Server) -> None:
    with cut(server) as ours:

        def lose() -> bool:
            ours.client.delete(ours.keys.pending)
            ours.proxy.refusing = True
            return False

        ours.proxy.before(lose, b"SET", 10)
        urls, failure = ours.store.put([source(noise(200 * CHUNK))])
        assert urls == []
        assert isinstance(failure, ServerUnavailableError)
        assert ours.values
        ours.proxy.refusing = False
        ours.store.recover(lambda pid: True)
        assert ours.values == []


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        (b"*3\r\n:1\r\n:0\r\n:0\r\n", b"*2\r\n:1\r\n:0\r\n"),
        (b"*3\r\n:1\r\n:0\r\n:0\r\n", b":1\r\n"),
        (b"*3\r\n:1\r\n:0\r\n:0\r\n", b"*3\r\n:1\r\n$-1\r\n:0\r\n"),
    ],
)
def test_a_settlement_with_a_reply_that_is_not_valkeys_fails_the_spill(
    server: Server, was: bytes, is_now: bytes
) -> None:
    with cut(server) as ours:
        ours.proxy.to_client.replaced = {was: is_now}
        urls, failure = ours.store.put([source(noise(2 * CHUNK))])
        assert urls == []
        assert isinstance(failure, NotValkeyError)
        ours.proxy.to_client.replaced = {}
        ours.store.recover(lambda pid: True)
        assert ours.values == []
        assert ours.ledger.totals().stored == 0


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        (b"$13\r\n100000 100000\r\n", b"$13\r\n100000 1OOOOO\r\n"),
        (b"$13\r\n100000 100000\r\n", b":200000\r\n"),
        (b"$13\r\n100000 100000\r\n", b"*1\r\n:1\r\n"),
    ],
)
def test_sizes_that_are_not_valkeys_fail_the_restore_and_lose_nothing(
    server: Server, was: bytes, is_now: bytes
) -> None:
    with cut(server, compression="none") as ours:
        (url,), _ = ours.store.put([source(noise(2 * CHUNK))])
        ours.proxy.to_client.replaced = {was: is_now}
        with pytest.raises(NotValkeyError):
            get(ours.store, url)
        ours.proxy.to_client.replaced = {}
        assert get(ours.store, url) == noise(2 * CHUNK)


def test_what_comes_in_doubt_while_the_rest_is_removed_stays_in_doubt() -> None:
    others, node = UnderWay(), NodeName("session", "node")
    name = ObjectName(*node, "a" * 56, new_attempt(), 1)
    others.fail([name])
    found = others.left(node)
    others.doubt([name])
    others.removed(*found)
    assert others.left(node) == ([], [name])
    others.removed(*others.left(node))
    assert others.left(node) == ([], [])


def test_a_server_that_refuses_everything_is_not_asked_for_ever(server: Server) -> None:
    """Each attempt would leave more to be removed, and more to be remembered."""
    params = {"url": server.url, "retry_timeout": 0.5, "username": "ray"}
    config = Config.load(params, {"RAY_VALKEY_SPILL_PASSWORD": "secret"})
    sources = [source(b"x", number) for number in range(5000)]
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(config, "session", "node")))

        def attempt() -> int:
            """Put them; returns how many scripts that takes."""
            server.client.config_resetstat()
            urls, failure = store.put(sources)
            assert urls == [] and failure is not None and "NOPERM" in str(failure)
            return int(server.client.info("commandstats").get("cmdstat_eval", {}).get("calls", 0))

        stack.enter_context(acl_user([server.client], "~* +@all -set -unlink"))
        sent = [attempt() for _ in range(8)]
        with pytest.raises(ServerError):
            store.recover(lambda pid: True)
        assert attempt() == 0
        assert all(sent[:4]) and not any(sent[4:])
        server.client.execute_command("ACL", "SETUSER", "ray", "+@all")
        assert store.recover(lambda pid: True) == 20_000
        urls, failure = store.put(sources)
        assert failure is None and len(urls) == 5000
        store.destroy(lambda pid: False)


def test_an_object_that_was_put_stays_however_long_nobody_has_looked(server: Server) -> None:
    """And however many were put since: what is not known any more is left as it is."""
    others = UnderWay()
    with cut(server) as ours:
        url = ours.put_and_lose_the_settlement()
        entry = Entry(ours.keys.parse_url(url).name, 2 * CHUNK, 2 * CHUNK)
        others.put([entry])
        assert not others.has_left(entry.name)
        names = [entry.name._replace(object_id=f"{n:056x}") for n in range(20_000)]
        others.put(Entry(name, 1, 1) for name in names)
        assert len(others.put_lately(NodeName("session", "node"))) == 10_000
        # All that is not put lately is left. It may have been put, unless it has failed, or an
        # earlier process with this id has begun it.
        assert not others.has_left(names[-1])
        earlier = entry.name._replace(attempt=f"{1:011x}{os.getpid():08x}{0:08x}")
        assert others.has_left(entry.name) and others.has_left(earlier)
        assert others.has_forgotten(entry.name) and not others.has_forgotten(earlier)
        others.fail([entry.name])
        assert others.has_left(entry.name) and not others.has_forgotten(entry.name)


def test_a_settlement_is_looked_at_until_a_failover_cannot_lose_it() -> None:
    attempts, node = UnderWay(), NodeName("session", "node")
    name = ObjectName(*node, "0a" * 28, new_attempt(), 0)
    attempts.put([Entry(name, 1, 1)])
    now = time.monotonic()
    attempts.are_settled([name], now + 30)
    assert attempts.put_lately(node)
    assert not attempts.put_lately(NodeName("session", "other"))
    attempts.are_settled([name], now + 90)
    assert not attempts.put_lately(node)


def test_with_a_budget_what_is_settled_again_counts(server: Server) -> None:
    with cut(server, max_bytes=20 * MIB) as ours:
        ours.store.put([source(noise(1000))])
        before = ours.ledger.totals().stored
        url = ours.put_and_lose_the_settlement(1)
        assert ours.ledger.totals().stored == before
        assert ours.store.background.settle_again() == 1
        assert ours.ledger.totals().stored > before + 2 * CHUNK
        ours.store.delete([url])
        assert ours.ledger.totals().stored == before


def test_after_an_error_that_nobody_expects_what_is_left_can_be_found_and_removed(
    server: Server,
) -> None:
    config = Config.load({"url": server.url, "chunk_size": CHUNK}, {})
    bad = dataclasses.replace(source(b"", 1), data=Unreadable())
    with contextlib.closing(Store(config, "session", "node")) as store:
        assert not store.background.has_left_something
        with pytest.raises(MemoryError):
            store.put([source(noise(100 * CHUNK)), bad])
        assert server.spilled_keys() != []
        assert store.background.has_left_something
        store.background.recover_own()
        assert not store.background.has_left_something
        store.give_back()
        assert server.spilled_keys() == []


@pytest.mark.parametrize("step", ["begin", "put", "fail"])
def test_whatever_fails_as_a_put_ends_the_next_one_is_not_held_up(
    server: Server, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.load({"url": server.url, "chunk_size": CHUNK, "max_bytes": 100 * MIB}, {})
    bad = dataclasses.replace(source(b"", 1), data=Unreadable())
    with contextlib.closing(Store(config, "session", "node")) as store:
        with monkeypatch.context() as patched:

            def fail(names: object) -> None:
                raise MemoryError

            patched.setattr(UNDER_WAY, step, fail)
            with pytest.raises(MemoryError):
                store.put([bad if step == "fail" else source(noise(CHUNK))])
        pool = ThreadPoolExecutor(1)
        try:
            urls, failure = pool.submit(store.put, [source(noise(CHUNK))]).result(PATIENCE)
        finally:
            pool.shutdown(wait=False)
        assert failure is None and get(store, urls[0]) == noise(CHUNK)
        store.destroy(lambda pid: False)
        store.background.recover_own()
        store.give_back()
        assert server.spilled_keys() == []


def test_what_a_server_will_not_remove_for_a_moment_stays_in_the_metadata(server: Server) -> None:
    """Whoever removes what the metadata name would not find it again."""
    with proxy_to(server.port) as proxy:
        config = Config.load({"url": proxy.url, "chunk_size": CHUNK, "retry_timeout": 0.5}, {})
        with contextlib.closing(Store(config, "session", "node")) as store:
            store.put([source(noise(3 * CHUNK))])

            def refuse() -> None:
                server.client.config_set("min-replicas-to-write", 1)
                proxy.refusing = True  # it is not tried again over another connection
                proxy.before(accept, b"UNLINK")

            def accept() -> None:
                wait_until(lambda: "errorstat_NOREPLICAS" in server.client.info("errorstats"))
                server.client.config_set("min-replicas-to-write", 0)

            server.client.config_resetstat()
            proxy.to_server.piece = 16  # else both come in one piece, and only one is waited for
            proxy.before(refuse, b"UNLINK")
            try:
                with pytest.raises(ServerUnavailableError):
                    store.destroy(lambda pid: False)
            finally:
                server.client.config_set("min-replicas-to-write", 0)
            proxy.to_server.piece, proxy.refusing = 1 << 16, False
            store.destroy(lambda pid: False)
        assert server.spilled_keys() == []


def test_a_break_in_the_middle_of_many_small_objects_downloads_none_of_them(
    server: Server,
) -> None:
    with proxy_to(server.port) as proxy:
        config = Config.load({"url": proxy.url, "chunk_size": CHUNK}, {})
        with contextlib.closing(Store(config, "session", "node")) as store:
            sources = [source(noise(80_000, number), number) for number in range(100)]
            store.put(sources[:1])
            proxy.to_server.reset_after = 4_000_000
            before = proxy.to_client.bytes
            urls, failure = store.put(sources)
            assert failure is None
            assert proxy.connections > 1
            assert proxy.to_client.bytes - before < 80_000
            assert get(store, urls[99], 99) == sources[99].data
            store.destroy(lambda pid: False)
