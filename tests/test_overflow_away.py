"""An overflow that hangs: a share whose server is away, an object store that never answers.

Nothing waits for it without bound, what is in Valkey goes on, and nothing is left that nobody knows
of once it is back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hanging import HangingDirectory, Op, can_hang, hanging_directory
from support.objectstores import CREDENTIALS, s3_server, s3_uri
from support.proxy import Proxy, proxy_to
from support.samples import get, noise, object_id, source
from support.servers import Server, wait_until
from support.stores import Store

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import (
    LostObjectError,
    OverflowUnavailableError,
    ServerUnavailableError,
)
from ray_valkey_spill.format.names import Keyspace, NodeName, ObjectName, Place, new_attempt
from ray_valkey_spill.format.values import Value
from ray_valkey_spill.tiers.overflow import OverflowTier, Patience
from ray_valkey_spill.tiers.steps import StalledError, StepThreads, begin_step
from ray_valkey_spill.units import MIB

SESSION, NODE = "session_1", "ab" * 28
OWNER = NodeName(SESSION, NODE)
KEYSPACE = Keyspace("ray:spill:default:")
DATA = noise(2 * MIB)
CHUNK = len(DATA) // 4
# Long enough for a busy machine, and not tried again by the way.
IMPATIENT = Patience(answer=2.0, data=2.0, request=2.0, retry=1000.0)

pytestmark = pytest.mark.usefixtures("no_thread_left")
needs_fuse = pytest.mark.skipif(not can_hang(), reason="needs /dev/fuse and the right to mount")


@pytest.fixture
def share(tmp_path: Path) -> Iterator[HangingDirectory]:
    with hanging_directory(tmp_path) as share:
        yield share


@pytest.fixture
def tier(share: HangingDirectory) -> Iterator[OverflowTier]:
    """An overflow that a session has signed, and used, so that its threads are there."""
    tier = OverflowTier(str(share.path), KEYSPACE, IMPATIENT)
    with contextlib.closing(tier):
        tier.sign(SESSION, "signed")
        tier.node_names()
        yield tier
        share.go_on()


def new_name() -> ObjectName:
    return ObjectName(*OWNER, object_id(0), new_attempt(), 4)


def write(tier: OverflowTier, data: Any = DATA) -> Place:
    name, view = new_name(), memoryview(data)

    def values() -> Iterator[Value]:
        for i in range(4):
            chunk = view[i * CHUNK : (i + 1) * CHUNK]
            yield Value(f"{name}:{i}", name, len(DATA), [chunk])
        yield Value(str(name), name, len(DATA), [b"header"], is_last=True)

    (entry,) = tier.write(values())
    return Place(entry.name, entry.size, "overflow")


def read(tier: OverflowTier, place: Place) -> bytes:
    target = memoryview(bytearray(len(DATA)))
    wanted = [(i, target[i * CHUNK : (i + 1) * CHUNK]) for i in range(4)]
    assert tier.read(place, [CHUNK] * 4, lambda receive: sum(1 for _ in receive(wanted))) == 4
    return bytes(target)


def files(directory: Path) -> list[str]:
    """What there is but for signatures."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return [path.name for path in found if not path.name.startswith("place.")]


def threads() -> int:
    return sum(t.name.startswith("ray-valkey-spill-overflow") for t in threading.enumerate())


USES: dict[str, Callable[[OverflowTier, Place], object]] = {
    "write": lambda tier, place: write(tier),
    "stat": lambda tier, place: tier.stat(place),
    "read": read,
    "remove": lambda tier, place: tier.remove(place),
    "files": lambda tier, place: tier.files(OWNER),
    "sessions": lambda tier, place: tier.sessions(),
    "owners": lambda tier, place: tier.node_names(),
    "remove_parts": lambda tier, place: tier.remove_parts(OWNER, lambda pid: False),
    "destroy": lambda tier, place: tier.destroy(NodeName(SESSION, "cd" * 28)),
    "destroy_session": lambda tier, place: tier.destroy_session("session_2"),
    "sign": lambda tier, place: tier.sign(SESSION, "another"),
    "is_signed": lambda tier, place: tier.is_signed(SESSION, "signed"),
    "unsign": lambda tier, place: tier.unsign(SESSION, "another"),
}


# --- a share whose server is away ---


@needs_fuse
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_a_share_that_hangs_fails_and_works_again_after_it(
    tier: OverflowTier, share: HangingDirectory, use: Callable[[OverflowTier, Place], object]
) -> None:
    place = write(tier)
    before = threads()
    share.hang()
    for _ in range(3):
        with pytest.raises(OverflowUnavailableError, match="does not answer: no progress for"):
            use(tier, place)
    # Only the first one asked for anything, and a hung thread takes nothing else.
    assert len(share.held) == 1
    assert threads() == before
    share.go_on()
    wait_until(lambda: _works(use, tier, place))
    assert tier.is_signed(SESSION, "signed")


def _works(use: Callable[[OverflowTier, Place], object], *args: Any) -> bool:
    with contextlib.suppress(OverflowUnavailableError):
        use(*args)
        return True
    return False


@needs_fuse
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_a_share_that_answers_with_errors_fails_and_works_again_after_it(
    tier: OverflowTier, share: HangingDirectory, use: Callable[[OverflowTier, Place], object]
) -> None:
    """What cannot be read is never taken for lost."""
    place = write(tier)
    share.fail()
    with pytest.raises(OverflowUnavailableError):
        use(tier, place)
    assert share.refused
    share.go_on()
    wait_until(lambda: _works(use, tier, place))
    assert tier.is_signed(SESSION, "signed")
    if use is not USES["remove"]:
        assert read(tier, place) == DATA


@needs_fuse
@pytest.mark.parametrize("op", [Op.MKDIR, Op.CREATE, Op.WRITE, Op.FLUSH, Op.RENAME])
def test_a_write_that_comes_back_to_life_leaves_nothing(
    tier: OverflowTier, share: HangingDirectory, op: Op
) -> None:
    share.hang(op)
    with pytest.raises(OverflowUnavailableError, match="does not answer"):
        write(tier)
    share.go_on()
    wait_until(lambda: _works(lambda: write(tier)))
    assert len(files(share.behind)) == 1


@needs_fuse
def test_a_write_that_hangs_refers_to_no_memory_of_its_caller(
    tier: OverflowTier, share: HangingDirectory
) -> None:
    """Ray gives it to other objects as soon as the spill has failed."""
    data = bytearray(DATA)
    share.hang(Op.WRITE)
    with pytest.raises(OverflowUnavailableError) as failure:
        write(tier, data)
    del failure
    gc.collect()
    data.clear()  # raises BufferError while anybody refers to it


@needs_fuse
@pytest.mark.parametrize("op", [Op.OPEN, Op.READ])
def test_reads_of_a_share_go_on_after_one_that_hung(
    tier: OverflowTier, share: HangingDirectory, op: Op
) -> None:
    place = write(tier)
    share.hang(op)
    with pytest.raises(OverflowUnavailableError, match="does not answer"):
        read(tier, place)
    share.go_on()
    wait_until(lambda: _works(lambda: read(tier, place)))
    assert read(tier, place) == DATA


@needs_fuse
def test_a_file_that_is_opened_too_late_is_closed_and_holds_nothing_up(
    tier: OverflowTier, share: HangingDirectory
) -> None:
    """Where a destructor closed it, this would stop for ever: that does not release the GIL."""
    place = write(tier)
    share.hang(Op.OPEN)
    with pytest.raises(OverflowUnavailableError, match="does not answer"):
        read(tier, place)
    share.hang(Op.FLUSH)
    wait_until(lambda: Op.FLUSH in share.held)
    share.go_on()
    wait_until(lambda: _works(lambda: read(tier, place)))


@needs_fuse
def test_what_can_be_read_is_read_while_writes_hang(
    tier: OverflowTier, share: HangingDirectory
) -> None:
    place = write(tier)
    share.hang(Op.WRITE)  # what creates or removes a file locks the directory, for readers too
    for use in (lambda: write(tier), lambda: tier.remove(place)):
        with pytest.raises(OverflowUnavailableError, match="does not answer"):
            use()
    assert read(tier, place) == DATA
    assert [file.entry.name for file in tier.files(OWNER) if file.is_whole] == [place.name]


@needs_fuse
def test_a_signature_that_comes_too_late_is_removed(
    tier: OverflowTier, share: HangingDirectory
) -> None:
    share.hang(Op.CREATE)
    with pytest.raises(OverflowUnavailableError, match="does not answer"):
        tier.sign("session_2", "late")
    share.go_on()
    wait_until(lambda: _works(lambda: tier.unsign("session_3", "none")))
    assert tier.sessions() == {SESSION}


@needs_fuse
def test_a_share_that_is_mounted_again_is_used_though_the_old_one_hangs(
    share: HangingDirectory, tmp_path: Path
) -> None:
    """As after `umount -l`: what hangs in the old mount may never return."""
    patience = Patience(answer=1.0, data=1.0, request=1.0, retry=0.1)
    link = tmp_path / "link"
    link.symlink_to(share.path)
    with contextlib.closing(OverflowTier(str(link), KEYSPACE, patience)) as tier:
        share.hang()
        with pytest.raises(OverflowUnavailableError, match="does not answer"):
            tier.sessions()
        (tmp_path / "other").mkdir()
        link.unlink()
        link.symlink_to(tmp_path / "other")
        wait_until(lambda: _works(tier.sessions))
        assert share.held
        share.go_on()


# --- an object store that never answers ---


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to an S3 server with a bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server, proxy_to(server.port) as way:
        yield way


def test_every_use_of_an_object_store_that_hangs_fails_and_works_again_after_it(way: Proxy) -> None:
    uri = s3_uri("spilled/overflow", way.port)
    with contextlib.closing(OverflowTier(uri, KEYSPACE, IMPATIENT)) as tier:
        tier.sign(SESSION, "signed")
        place = write(tier)
        for name, use in USES.items():
            way.stall()
            for _ in range(2):
                with pytest.raises(OverflowUnavailableError, match=r"overflow at s3://spilled"):
                    pytest.fail(f"{name}: {use(tier, place)}")
            way.flow()
            wait_until(functools.partial(_works, use, tier, place))
            place = write(tier)
        assert read(tier, place) == DATA


# --- files that somebody else put there ---


def test_a_file_that_is_longer_than_any_header_is_not_read(tmp_path: Path) -> None:
    with contextlib.closing(OverflowTier(str(tmp_path), KEYSPACE)) as tier:
        tier.sign(SESSION, "signed")
        for chunks in (0, 4):
            place = Place(ObjectName(*OWNER, object_id(0), new_attempt(), chunks), 5)
            path = tmp_path / "ray:spill:default" / SESSION / NODE
            path.mkdir(exist_ok=True)
            with (path / f"{str(place.name).rpartition(':')[2]}.{place.size}").open("wb") as file:
                file.truncate(100 << 30)
                file.seek(-20, 2)
                file.write(b"RVSP\1\0\0\0" + (1 << 31).to_bytes(4, "little") + bytes(8))
            assert tier.stat(place).header == b""


def test_an_object_whose_file_was_blown_up_is_lost(server: Server, tmp_path: Path) -> None:
    with new_store(server, str(tmp_path)) as store:
        (url,), _ = store.put([source(b"small")])
        (path,) = (path for path in tmp_path.rglob("*.5") if path.is_file())
        with path.open("ab") as file:
            file.truncate(100 << 30)
        with pytest.raises(LostObjectError):
            store.find(url, object_id(0))


# --- in the object store ---


@contextlib.contextmanager
def new_store(server: Server, uri: str, **params: Any) -> Iterator[Store]:
    """One that puts everything in the overflow unless told otherwise."""
    params = {"url": server.url, "overflow_uri": uri, "max_bytes": 0, **params}
    store = Store(Config.load(params, {}), SESSION, NODE)
    try:
        yield store
    finally:
        with contextlib.suppress(OverflowUnavailableError, ServerUnavailableError):
            store.destroy(lambda pid: False)
        store.close()


@needs_fuse
def test_a_spill_that_valkey_has_room_for_does_not_touch_an_overflow_that_hangs(
    server: Server, share: HangingDirectory
) -> None:
    with new_store(server, str(share.path), max_bytes=4 * MIB) as store:
        share.hang()
        urls, failure = store.put([source(DATA, 0), source(DATA, 1)])
        assert len(urls) == 1
        assert isinstance(failure, OverflowUnavailableError)
        assert "does not answer: no progress" in str(failure)
        held = len(share.held)
        # Nor does it wait again, as long as the first one waits.
        for number in range(2, 5):
            urls_of_more, failure = store.put([source(DATA, number)])
            assert urls_of_more == []
            assert isinstance(failure, OverflowUnavailableError)
        assert len(share.held) == held
        assert get(store, urls[0]) == DATA
        store.delete(urls)
        share.go_on()
        wait_until(lambda: len(store.put([source(DATA, n) for n in range(3)])[0]) == 3)


@needs_fuse
def test_a_tier_that_is_away_holds_up_no_removal_from_the_other(
    server: Server, share: HangingDirectory
) -> None:
    with proxy_to(server.port) as way:
        params = {"url": way.url, "retry_timeout": 1.0, "max_bytes": 4 * MIB}
        with new_store(server, str(share.path), **params) as store:
            store.join_overflow()
            for remove in (store.delete, store.delete_again):
                urls, failure = store.put([source(DATA, number) for number in range(2)])
                assert failure is None
                assert [url.startswith("overflow:") for url in urls] == [False, True]
                share.hang()
                with pytest.raises(OverflowUnavailableError, match="does not answer"):
                    remove(urls)
                assert server.spilled_ids() == set()
                share.go_on()
                # What hung has removed it by now, or does.
                wait_until(functools.partial(_works, store.delete, [urls[1]]))
                assert files(share.behind) == []

                urls, failure = store.put([source(DATA, number) for number in range(2)])
                assert failure is None
                way.refusing = True
                way.reset()
                with pytest.raises(ServerUnavailableError):
                    remove(urls)
                assert files(share.behind) == []
                way.refusing = False
                remove(urls)
                assert server.spilled_ids() == set()


@needs_fuse
def test_the_lease_is_renewed_while_the_overflow_hangs(
    server: Server, share: HangingDirectory
) -> None:
    with new_store(server, str(share.path)) as store:
        store.renew_lease("127.0.0.1:1", lambda: False)
        store.join_overflow()
        share.hang()
        for _ in range(2):
            with pytest.raises(OverflowUnavailableError, match="does not answer"):
                store.sweep_overflow()
            server.client.zincrby(store.keys.leases, -60_000, _lease(server, store))
            old = server.client.zscore(store.keys.leases, _lease(server, store))
            store.renew_lease("127.0.0.1:1", lambda: False)
            assert server.client.zscore(store.keys.leases, _lease(server, store)) > old
        share.go_on()
        wait_until(lambda: _works(store.sweep_overflow))


def _lease(server: Server, store: Store) -> bytes:
    (lease,) = server.client.zrange(store.keys.leases, 0, -1)
    return bytes(lease)


# --- the threads ---


@pytest.fixture
def workshop() -> Iterator[StepThreads]:
    threads = StepThreads("test", 0.2, retry=0.0)
    yield threads
    threads.close()


def test_a_step_may_take_as_long_as_it_makes_progress(workshop: StepThreads) -> None:
    pause = threading.Event()

    def steps() -> int:
        for _ in range(10):
            begin_step(60.0)
            pause.wait(0.05)
        return 10

    assert workshop.run(steps) == 10


def test_however_many_hang_others_are_tried(workshop: StepThreads) -> None:
    """What hangs in a share that was unmounted lazily never returns."""
    never, begun = threading.Event(), []

    def hangs() -> None:
        begun.append(1)
        never.wait()

    for _ in range(5):
        with pytest.raises(StalledError):
            workshop.run(hangs)
    assert len(begun) == 5
    assert workshop.run(lambda: "mounted again") == "mounted again"
    never.set()
    wait_until(lambda: _runs(workshop))


def test_what_is_given_up_stops_at_its_next_step_and_only_its_end_is_done(
    workshop: StepThreads,
) -> None:
    done: list[str] = []
    going = threading.Event()

    def hangs() -> None:
        going.wait()
        begin_step(60.0)
        done.append("the rest of it")

    with workshop.thread() as thread:
        job = thread.submit(hangs)
        thread.submit(lambda: done.append("what was to come"))
        with pytest.raises(StalledError):
            thread.wait(job)
        thread.finish(lambda: done.append("the end"))
    assert done == []
    going.set()
    wait_until(lambda: done == ["the end"])


def _runs(threads: StepThreads) -> bool:
    with contextlib.suppress(StalledError):
        return threads.run(lambda: True)
    return False


def test_a_job_after_one_that_failed_is_dropped(workshop: StepThreads) -> None:
    done: list[int] = []
    going = threading.Event()

    def fails() -> None:
        going.wait()
        raise ValueError("failed")

    with workshop.thread() as thread:
        first = thread.submit(fails)
        thread.submit(lambda: done.append(1))
        going.set()
        with pytest.raises(ValueError, match="failed"):
            thread.wait(first)
    assert done == []


def test_threads_that_hang_at_the_end_end_when_they_return(workshop: StepThreads) -> None:
    going = threading.Event()
    with pytest.raises(StalledError):
        workshop.run(going.wait)
    workshop.close()
    going.set()  # and `no_thread_left` sees that it ends
