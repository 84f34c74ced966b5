"""Fixtures shared by all tests. What a fixture starts it stops, by id, also when a test fails."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

# Before the imports of it, so that assertions there show what they compared.
pytest.register_assert_rewrite("support")

from support.guardians import end_guardians  # noqa: E402
from support.servers import PATIENCE, Server, valkey_server  # noqa: E402

# For `benchmarks`. Last, for the package that is tested is the one that is installed.
sys.path.append(str(Path(__file__).parent.parent))

# Ray would else make a token and leave it in the home directory.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray would look at each node's processes every few seconds, for its dashboard.
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "3600000"


# A machine that is busy with other tests may take any time for an example.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The files that take a minute and more, from the longest on. They come first, or one of them would
# go on long after all others.
LONGEST = [
    f"test_{name}.py"
    for name in (
        *("ray_reclaim", "ray_cluster", "ray_away", "ray_ends", "benchmarks", "ray_upstream"),
        *("walkthrough", "sentinel"),
        *("ray_faults", "ray_start", "cli", "roles", "cluster", "ray_values", "cleanup"),
        *("ray_disk", "ray_lost", "overflow_away", "connections", "metrics", "objects"),
        *("exchanges", "tools", "budget", "ledger", "keeper", "guardian"),
        *("neighbours", "lease", "ray_large", "secrets", "overflow", "sealing", "faults"),
        *("head_start", "wire"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("RAY_VALKEY_SPILL_", "RAY_object_spilling_")) or name == "RAY_ADDRESS":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    # One whose server a test has ended would try again for an hour.
    end_guardians()
    left = psutil.Process().children(recursive=True)
    names = [process.name() for process in left]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)
    assert not names, f"processes were left running: {names}"


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """For tests below Ray, which keeps threads of its own."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(timeout=PATIENCE)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """For Ray, whose sockets' paths may have 107 characters: pytest's own directories are long."""
    with tempfile.TemporaryDirectory(prefix="rvs-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[Server]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def server(_shared_server: Server) -> Iterator[Server]:
    """A server with foreign keys on it. A test must leave no key of ours, and those as they are."""
    with _shared_server.in_turn():
        yield _shared_server
