"""The command `ray-valkey-spill`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import click

from ray_valkey_spill import __version__
from ray_valkey_spill.cli import INTERRUPTED, forms, rendering
from ray_valkey_spill.cli.check import FAILED, Finding
from ray_valkey_spill.cli.check import run as run_checks
from ray_valkey_spill.cli.inspection import Inspector, parse_target
from ray_valkey_spill.cli.inventory import (
    SORTINGS,
    Inventory,
    Overview,
    OverviewStatistics,
    Selection,
    Statistics,
)
from ray_valkey_spill.cli.options import (
    DURATION,
    NUMBER,
    SECONDS,
    TEXT,
    Command,
    given,
    parameter_options,
    timeout_option,
)
from ray_valkey_spill.cli.waiting import Waiting, limited, reach
from ray_valkey_spill.config import Config
from ray_valkey_spill.errors import ConfigError, SpillError
from ray_valkey_spill.format.names import Keyspace, TierName
from ray_valkey_spill.plugin.gcs import running_at
from ray_valkey_spill.store.cleanup import CleanUp, Remains
from ray_valkey_spill.store.observer import Observer, Reason
from ray_valkey_spill.store.reclaim import Owners, reclaim_of_dead_nodes

__all__ = ["main"]

_INDENT = 22  # of the text of a finding
_WATCH_INTERVAL = 2.0

# Terminal codes: clear the screen; move to its first line; clear the rest of a line, and all lines
# below; cut long lines off, and wrap them again.
_CLEAR, _HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
_CUT, _WRAP = "\x1b[?7l", "\x1b[?7h"

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version")
@click.pass_context
def cli(context: click.Context) -> None:
    """Ray object spilling to Valkey."""
    if os.environ.get("NO_COLOR"):
        context.color = False


@cli.command(cls=Command)
@_json_option
def demo(as_json: bool) -> None:
    """Spill and restore 1.1 GiB, to see it work.

    Starts its own Valkey and its own small local Ray, spills and restores mixed data, compares
    every byte, and leaves nothing behind.
    """
    from ray_valkey_spill.cli.demo import run

    report = run(show_progress=not as_json)
    if as_json:
        _print_json(report.as_dict())
    else:
        _print_lines(rendering.pairs(report.rows()))
    if report.failure:
        raise SpillError(report.failure)


@cli.command(cls=Command)
@parameter_options
@timeout_option
@_json_option
def check(timeout: float, as_json: bool, **options: Any) -> None:
    """Check this environment and the server, and print fixes for what is wrong.

    Exits with 1 if spilling would not work.
    """
    findings = []
    for finding in run_checks(options, timeout, _notify):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    failed = any(finding.status == FAILED for finding in findings)
    if as_json:
        _print_json({"ok": not failed, "findings": [finding.as_dict() for finding in findings]})
    else:
        click.echo(rendering.verdict([finding.status for finding in findings]))
    sys.exit(1 if failed else 0)


@cli.command(cls=Command)
@parameter_options
@click.option("--acl", is_flag=True, help="Print the permissions that the user needs instead.")
@_json_option
def config(acl: bool, as_json: bool, **options: Any) -> None:
    """Print the configuration for Ray, in each form that it takes, ready to paste."""
    parameters = given(options)
    found = forms.of(parameters)
    permissions = forms.acl(parameters.load()) if acl else {}
    if as_json:
        _print_json({**found.as_dict(), **({"acl": permissions} if acl else {})})
    elif acl:
        _print_acl(permissions)
    else:
        _print_forms(found.texts)
        _print_lines(f"# {note}" for note in found.notes)


@cli.command(cls=Command)
@parameter_options
@click.option(
    "--session", type=TEXT, metavar="PREFIX", help="Only sessions whose names have this prefix."
)
@click.option("--node", type=TEXT, metavar="PREFIX", help="Only nodes whose ids have this prefix.")
@click.option("--tier", type=click.Choice(["valkey", "overflow"]), help="Only this tier.")
@click.option(
    "--older-than",
    type=DURATION,
    metavar="AGE",
    help="Only objects at least this old: 90s, 10m, 2h, 3d.",
)
@click.option(
    "--sort",
    type=click.Choice(list(SORTINGS)),
    default="node",
    show_default=True,
    help="By node and id; or the oldest, or the largest as data or as stored, first.",
)
@click.option("--limit", type=NUMBER, metavar="NUMBER", help="Show at most this many objects.")
@timeout_option
@_json_option
def ls(
    session: str | None,
    node: str | None,
    tier: TierName | None,
    older_than: float | None,
    sort: str,
    limit: int | None,
    timeout: float,
    as_json: bool,
    **options: Any,
) -> None:
    """List what is stored, in Valkey and in the overflow.

    An object's stored size is what the budget counts for it; in the overflow, its file's length.
    """
    config, waiting = _reached(given(options).load(), timeout)
    if tier == "overflow" and config.overflow_uri is None:
        raise SpillError("no overflow is given", "Give --overflow-uri")
    with contextlib.closing(Inventory(config, waiting=waiting)) as inventory:
        now = inventory.time()
        selection = Selection(session or "", node or "", tier, older_than, sort, limit)
        items = inventory.select(selection, now)
        if as_json:
            _print_list(item.as_dict(inventory.keys, now) for item in items)
        else:
            _print_lines(rendering.listing(items, selection, now))
        if tier != "valkey":
            _notify_all(rendering.unseen(inventory.unseen(), config.overflow_uri))


@cli.command(cls=Command)
@parameter_options
@click.option(
    "--all-namespaces",
    is_flag=True,
    help="A line for each namespace of the server below the key prefix.",
)
@click.option(
    "--watch",
    type=SECONDS,
    is_flag=False,
    flag_value=f"{_WATCH_INTERVAL:g}",
    metavar="[SECONDS]",
    help=f"Look again after this many seconds ({_WATCH_INTERVAL:g} by default), until Ctrl-C.",
)
@timeout_option
@_json_option
def stats(
    all_namespaces: bool, watch: float | None, timeout: float, as_json: bool, **options: Any
) -> None:
    """Show how much is stored: by session, node and tier.

    Also how much of the budget is used (with --max-bytes, of how much), and for each node whether
    it is alive, silent (its lease is not renewed) or dead (according to its GCS, where that can be
    asked from here), and since when. With --json and --watch, each look is one line.
    """
    config, waiting = _reached(given(options).load(), timeout)
    with contextlib.closing(
        Overview(config, waiting) if all_namespaces else Inventory(config, running_at, waiting)
    ) as source:
        if watch is None:
            found = source.statistics()
            if as_json:
                _print_json(found.as_dict())
            else:
                _print_lines(_statistics_lines(found))
            if isinstance(source, Inventory):
                _notify_all(rendering.unseen(source.unseen(), config.overflow_uri))
            return
        redraws = _is_a_terminal(sys.stdout) and not as_json
        if redraws:
            click.echo(_CLEAR, nl=False, color=True)
        while True:
            found = source.statistics()
            if as_json:
                click.echo(json.dumps(found.as_dict()))
            elif redraws:
                _redraw(_statistics_lines(found))
            else:
                _print_lines([*_statistics_lines(found), ""])
            time.sleep(watch)


@cli.command(cls=Command)
@parameter_options
@click.argument("key")
@timeout_option
@_json_option
def inspect(key: str, timeout: float, as_json: bool, **options: Any) -> None:
    """Decode the header of an object, and check whether its chunks exist.

    KEY is the key of a header or a chunk, a URL that Ray has, an object's name as `ls --json`
    prints it, or an object's id in hex, which shows every attempt to spill it.

    Exits with 1 if any part of it is missing or wrong.
    """
    config = given(options).load()
    target = parse_target(key, Keyspace.of(config))
    config, waiting = _reached(config, timeout)
    with contextlib.closing(Inspector(config, waiting)) as inspector:
        keys = inspector.keys
        found = inspector.inspect(target)
        now = inspector.time()
    if as_json:
        _print_json([each.as_dict(keys, now) for each in found])
    else:
        for number, each in enumerate(found):
            _print_lines(["", ""] if number else [])
            _print_lines(rendering.inspection(each, keys, now, target.chunk))
    for each in found:
        if each.problems:
            raise SpillError(f"{each.name} is not a whole object: {each.problems[0]}")


@cli.command(cls=Command)
@parameter_options
@click.option(
    "--session",
    type=TEXT,
    metavar="PREFIX",
    help="Only sessions whose names have this prefix. A whole name also means one of which only "
    "files in the overflow are left.",
)
# For the head start, whose own session lives.
@click.option("--except-session", type=TEXT, hidden=True)
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@click.option("--yes", is_flag=True, help="Remove without asking. Otherwise it asks on a terminal.")
@click.option(
    "--address",
    type=TEXT,
    envvar="RAY_ADDRESS",
    metavar="ADDRESS",
    help="Join this Ray cluster, or that of RAY_ADDRESS, to ask who needs what its dead nodes have "
    "stored. Needs a Ray node of the cluster on this host.",
)
@timeout_option
@_json_option
def gc(
    session: str | None,
    except_session: str | None,
    dry_run: bool,
    yes: bool,
    address: str | None,
    timeout: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Remove what dead sessions, and dead nodes of running sessions, have left.

    Watches for about a minute which nodes renew their leases, and asks the GCS of each session that
    does not; a session whose GCS cannot be asked is watched for ten minutes. So run it where the
    GCS addresses of all clusters of the namespace can be reached.

    What a dead node of a running session has stored may still be needed. The nodes of the session
    remove what is not; so does this, where it can join the cluster (--address).

    Exits with 0 if all that may be removed was, or with --dry-run would be; with 1 if you answer
    no, or if something failed, such as the overflow.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if not as_json:
            click.echo(rendering.note(text))

    if _is_a_terminal(sys.stdin) and not (dry_run or yes or _is_a_terminal(sys.stderr)):
        raise SpillError(
            "gc asks before it removes anything, and here nobody would see the question: the "
            "standard error is no terminal",
            "Give --yes or --dry-run",
        )
    config, waiting = _reached(given(options).load(), timeout)
    look = CleanUp(config, running_at, waiting)
    with contextlib.closing(look):
        with _countdown() as watching:
            found = look.find(
                note,
                wanted=lambda name: name.startswith(session or "") and name != except_session,
                named=session or "",
                watching=watching,
            )
        remains = [each for each in found if not each.is_empty]
        if remains and not as_json:
            _print_lines(rendering.remains_table(remains))
        kept = [each for each in found if each.kept] if address else []
        asks = (remains or kept) and not (dry_run or yes) and _is_a_terminal(sys.stdin)
        is_refused = asks and not _confirm(remains, kept)
        removed = []
        if not (dry_run or is_refused):
            removed = [each for each in look.remove(found) if not each.is_empty]
        reclaimed = _reclaim(config, found, address, note, only_look=bool(dry_run or is_refused))
        if not (dry_run or is_refused):
            look.recount()
    if as_json:
        shown = remains if dry_run or is_refused else removed
        listed = [_remains_dict(each) for each in shown]
        _print_json(
            {
                "dry_run": dry_run,
                "removed": bool(removed or reclaimed.objects),
                "remains": listed,
                "reclaimed": {"objects": reclaimed.objects, "stored_bytes": reclaimed.stored},
                "notes": notes,
            }
        )
    else:
        if is_refused and not remains:
            click.echo("Removed nothing.")
        elif remains or not reclaimed.objects:
            _print_lines(rendering.outcome(remains, removed, dry_run=dry_run, is_all=not notes))
        _print_lines(rendering.reclaimed(reclaimed.objects, reclaimed.stored))
    if (failure := look.unavailable or reclaimed.failure) is not None:
        raise failure
    if is_refused:
        sys.exit(1)


class _Reclaimed(Observer):
    """Counts the objects that were reclaimed, and their stored bytes.

    Attributes:
        failure: why not all were asked for or removed that could be, if so.
    """

    def __init__(self) -> None:
        self.objects = self.stored = 0
        self.failure: SpillError | None = None

    def reclaimed(self, reason: Reason, objects: int, stored: int) -> None:
        self.objects += objects
        self.stored += stored


def _reclaim(
    config: Config,
    found: Sequence[Remains],
    address: str | None,
    note: Callable[[str], None],
    *,
    only_look: bool,
) -> _Reclaimed:
    """Reclaim what dead nodes of running sessions have stored, if their owners can be asked.

    Notes what could not be asked for, and why.
    """
    from ray_valkey_spill.plugin.owners import joined  # imports ray, which takes a second

    counts = _Reclaimed()
    left: dict[str, list[Remains]] = {}
    for each in found:
        if each.kept:
            left.setdefault(each.node_name.session, []).append(each)
    reason = "give --address where this can join their cluster"
    if left and address and not only_look:
        try:
            with joined(address) as (session, owners):
                reason = f"they are not of the cluster at {address}"
                if session in left:
                    reason = f"the GCS at {address} gave no answer"
                    if _reclaim_of(config, session, owners, counts, note):
                        del left[session]
        except SpillError as error:
            reason = str(error)
    elif left and only_look:
        reason = "nothing is removed now"
    for session, nodes in left.items():
        note(
            f"Kept: {_kept_amount(nodes)} of dead nodes of {session}, which runs. Their owners "
            f"were not asked who needs them: {reason}"
        )
    return counts


def _reclaim_of(
    config: Config,
    session: str,
    owners: Owners,
    counts: _Reclaimed,
    note: Callable[[str], None],
) -> bool:
    """Reclaim what dead nodes of one session have stored; return whether owners were asked.

    Notes what stays, and why.
    """
    try:
        left = reclaim_of_dead_nodes(config, session, owners, counts)
    except SpillError as error:
        counts.failure = error
        note(f"Not all of what dead nodes of {session} have stored was asked for: {error.message}")
        return True
    if left is None:
        return False
    counts.failure = left.failure
    if left.referenced or left.unknown:
        note(rendering.stays(session, left.referenced, left.unknown))
    return True


# --- what the commands share ---


def _statistics_lines(found: Statistics | OverviewStatistics) -> Iterator[str]:
    if isinstance(found, OverviewStatistics):
        return rendering.overview(found)
    return rendering.statistics(found)


def _reached(config: Config, timeout: float) -> tuple[Config, Waiting]:
    """Return once the server serves: the config with `timeout`, and what links wait by."""
    config = limited(config, timeout)
    reach(config, timeout, _notify)
    return config, Waiting(timeout, _notify)


def _notify(text: str) -> None:
    """Print the reason for a wait to stderr, apart from the command's output."""
    click.echo(text, err=True)


def _notify_all(lines: Iterable[str]) -> None:
    for line in lines:
        _notify(line)


def _is_a_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is one; Python has None for one that was closed before."""
    return stream is not None and stream.isatty()


def _confirm(remains: list[Remains], kept: list[Remains]) -> bool:
    """Ask whether to remove `remains`, and what nobody needs of the objects in `kept`."""
    parts = [rendering.summary(remains)] if remains else []
    if kept:
        parts.append(f"what nobody needs of {_kept_amount(kept)} of dead nodes")
    return click.confirm(f"Remove {', and '.join(parts)}?", err=True)


def _kept_amount(nodes: Sequence[Remains]) -> str:
    objects = rendering.amount(sum(each.kept for each in nodes), "object")
    return f"{objects} ({rendering.size_text(sum(each.kept_bytes for each in nodes))})"


@contextlib.contextmanager
def _countdown() -> Iterator[Callable[[int, float], None]]:
    """Show how long a watch lasts, on stderr: counting down on a terminal, once elsewhere."""
    on_terminal = _is_a_terminal(sys.stderr)
    last = float("inf")

    def watching(nodes: int, seconds: float) -> None:
        nonlocal last
        text = f"Watching the leases of {rendering.amount(nodes, 'node')}: up to {seconds:.0f} s"
        if on_terminal:
            click.echo(f"\r{text}{_CLEAR_LINE}", err=True, nl=False, color=True)
        elif seconds > last or last == float("inf"):
            click.echo(text, err=True)
        last = seconds

    try:
        yield watching
    finally:
        if on_terminal and last != float("inf"):
            click.echo(f"\r{_CLEAR_LINE}", err=True, nl=False, color=True)


def _remains_dict(remains: Remains) -> dict[str, Any]:
    """For JSON: what of this is removed; sizes in bytes."""
    objects, size, stored, _ = remains.usage if remains.session_is_dead else (0, 0, 0, 0)
    return {
        "session": remains.node_name.session,
        "node": remains.node_name.node,
        "session_is_dead": remains.session_is_dead,
        "objects": objects,
        "logical_bytes": size,
        "stored_bytes": stored,
        "half_written": remains.pending,
        "files": remains.files,
        "file_bytes": remains.file_bytes,
    }


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _print_list(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print one JSON document, with one row at a time in memory."""
    separator = "["
    for row in rows:
        click.echo(f"{separator}\n{json.dumps(row)}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _redraw(lines: Iterable[str]) -> None:
    """Replace what was shown by `lines`, as far as the terminal has room for them."""
    height = shutil.get_terminal_size().lines
    coloured = click.get_current_context().color is not False
    shown = [line if coloured else click.unstyle(line) for line in lines][: height - 1]
    frame = "".join(f"{line}{_CLEAR_LINE}\n" for line in shown)
    click.echo(f"{_HOME}{_CUT}{frame}{_WRAP}{_CLEAR_BELOW}", nl=False, color=True)


def _print_forms(forms: Mapping[str, str]) -> None:
    for title, text in forms.items():
        click.echo(click.style(f"# {title}", bold=True))
        click.echo(text.rstrip() + "\n")


def _print_acl(permissions: Mapping[str, str]) -> None:
    _print_forms(
        {
            "For valkey-cli; replace PASSWORD by the password": permissions["command"],
            "For the server's aclfile; replace SHA256 by the output of\n"
            "#     printf %s 'PASSWORD' | sha256sum": permissions["aclfile"],
        }
    )
    click.echo(
        f"# Every node then needs username={permissions['user']}, and the password in\n"
        "# RAY_VALKEY_SPILL_PASSWORD or in a file that password_file names. Everybody can use\n"
        "# the server's default user, unless it has a password or is off (user default off)."
    )


def _print_finding(finding: Finding) -> None:
    status = f"{finding.status:<7}"
    text = rendering.wrapped(finding.detail, first=f"{status}{finding.subject}".ljust(_INDENT))
    click.echo(click.style(status, fg=finding.color, bold=True) + text[len(status) :])
    if finding.hint:
        click.echo(rendering.wrapped(finding.hint, first=" " * _INDENT + "→ "))


def main() -> None:
    """Run the command line; an error of this package ends it with one line on stderr.

    Exit codes: 1 for a failure, 2 for a wrong option or parameter, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal may not have every character, such as the arrow before a hint.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # Otherwise click exits with 1 at Ctrl-C.
        sys.exit(cli(prog_name="ray-valkey-spill", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except SpillError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        # Such as a full disk behind stdout. What is left of the output would fail again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
