"""Waiting for a server that may be away: not for long, and not in silence."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import TypeVar

from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ServerUnavailableError, SpillError
from ray_valkey_spill.format.names import Keyspace
from ray_valkey_spill.protocol.resp import command
from ray_valkey_spill.tiers.ledger import link_to

__all__ = ["Waiting", "limited", "reach", "within"]

# Seconds after which a silent command seems to hang.
_NOTICE_AFTER = 2.0
# Seconds in which the link's own error, which names the cause, may still arrive.
_GRACE = 0.2
_HINT = (
    "Start it, or correct its url (valkeys:// if it wants TLS, valkey:// if not); --timeout waits "
    "longer"
)
# Seconds without a failure after which the next one begins another wait.
_NEXT_WAIT = 5.0

_T = TypeVar("_T")
_Waiting = Callable[[SpillError], None]


class Waiting:
    """Is called with the error that a link retries; tells once of each wait that is not short.

    Args:
        timeout: seconds for which the link retries.
        notify: is called with the reason.
    """

    def __init__(self, timeout: float, notify: Callable[[str], None]) -> None:
        self._timeout = timeout
        self._notify = notify
        self._since = self._last = float("-inf")
        self._is_told = False

    def __call__(self, error: SpillError) -> None:
        now = time.monotonic()
        if now - self._last > _NEXT_WAIT:
            self._since, self._is_told = now, False
        self._last = now
        if not self._is_told and now - self._since >= _NOTICE_AFTER:
            self._is_told = True
            self._notify(_notice(self._timeout, error.message))


def limited(config: Config, timeout: float) -> Config:
    """Return the config by which links give up after `timeout` seconds, or earlier."""
    return replace(config, retry_timeout=min(config.retry_timeout, timeout))


def _notice(timeout: float, reason: str) -> str:
    return f"Waiting for up to {timeout:g} s: {reason}"


def reach(
    config: Config, timeout: float, notify: Callable[[str], None], *, any_role: bool = False
) -> None:
    """Return once the server serves.

    Args:
        config: names the server.
        timeout: seconds.
        notify: is called with the reason, if the server does not answer soon.
        any_role: whether a replica will do.

    Raises:
        ServerUnavailableError: it did not answer within `timeout`, still loads its data, or is a
            replica.
        ServerError, ConfigError: it answers and refuses.
    """

    def attempt(waiting: _Waiting) -> None:
        link = link_to(config, unreachable_timeout=timeout, waiting=waiting, any_role=any_role)
        with contextlib.closing(link):
            # Unlike INFO, it fails while the server loads. A missing permission does not matter.
            list(link.run([command("GET", f"{Keyspace.of(config).root}reach")]))

    within(timeout, config, attempt, notify)


def within(
    timeout: float,
    config: Config,
    attempt: Callable[[_Waiting], _T],
    notify: Callable[[str], None],
) -> _T:
    """Return what `attempt` returns, if it does so within `timeout` seconds.

    It runs in a thread of its own, since one connection attempt may take longer than that. Its
    argument is to be called with the error that it retries.

    Raises:
        ServerUnavailableError: it did not return in time. The thread is then left behind.
        Exception: what `attempt` raised.
    """
    outcome: Future[_T] = Future()
    failures: list[SpillError] = []

    def run() -> None:
        try:
            outcome.set_result(attempt(failures.append))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="reach", daemon=True).start()
    server = f"Valkey at {config.address}"
    try:
        if timeout > _NOTICE_AFTER:
            with contextlib.suppress(FutureTimeoutError):
                return outcome.result(_NOTICE_AFTER)
            reason = failures[-1].message if failures else f"{server} does not answer"
            notify(_notice(timeout, reason))
            return outcome.result(timeout - _NOTICE_AFTER + _GRACE)
        return outcome.result(timeout + _GRACE)
    except FutureTimeoutError:
        message, hint = f"{server} does not answer (waited for {timeout:g} s)", ""
        if failures:
            message, hint = failures[-1].message, failures[-1].hint
        raise ServerUnavailableError(message, hint or _HINT) from None
    except ServerUnavailableError as error:
        raise ServerUnavailableError(error.message, error.hint or _HINT) from None
