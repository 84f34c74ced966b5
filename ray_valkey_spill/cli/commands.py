"""The command `ray-valkey-spill`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from ray_valkey_spill import __version__
from ray_valkey_spill.cli import rendering
from ray_valkey_spill.cli.check import FAILED, Finding
from ray_valkey_spill.cli.check import run as run_checks
from ray_valkey_spill.cli.inspection import Inspector, parse_target
from ray_valkey_spill.cli.inventory import Inventory
from ray_valkey_spill.config import ENV_PREFIX, Config, check_params, parameters
from ray_valkey_spill.errors import ConfigError, SpillError
from ray_valkey_spill.plugin.gcs import running_at
from ray_valkey_spill.plugin.spilling_config import RAY_SETTINGS, spilling_config, system_config
from ray_valkey_spill.store.cleanup import CleanUp, Remains
from ray_valkey_spill.tiers.preflight import acl_rules

__all__ = ["main"]

_INDENT = 22  # of the text of a finding
_WATCH_INTERVAL = 2.0
_USER = "ray"  # that an ACL is printed for, if the config names none

# What a terminal does with these: clear it; go to its first line; clear the rest of a line, and
# all that is below; cut lines off that are too long, and no more.
_CLEAR, _HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
_CUT, _WRAP = "\x1b[?7l", "\x1b[?7h"

_KUBERAY = """\
# In the RayCluster's spec; the image of every group needs ray-valkey-spill installed.
headGroupSpec:
  template:
    spec:
      containers:
        - name: ray-head
          env:
            - name: RAY_object_spilling_config
              value: {config}
            - &disk
              name: RAY_local_fs_capacity_threshold
              value: "{threshold}"
"""
_KUBERAY_CREDENTIAL = """\
            - &password
              name: RAY_VALKEY_SPILL_PASSWORD
              valueFrom: {secretKeyRef: {name: valkey, key: password, optional: true}}
"""
_KUBERAY_WORKERS = """\
workerGroupSpecs:
  - template:
      spec:
        containers:
          - name: ray-worker
            env:
              - *disk
"""


def _parameter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each parameter; those given are passed on by name."""
    for parameter in reversed(parameters()):
        command = click.option(
            f"--{parameter.name.replace('_', '-')}",
            parameter.name,
            metavar="VALUE",
            help=f"{parameter.meaning}  [${ENV_PREFIX}{parameter.name.upper()}]",
        )(command)
    return command


def _given(options: Mapping[str, str | None]) -> dict[str, Any]:
    """The parameters given as options, as the spilling config would have them.

    Raises:
        ConfigError: for text that is no value of its parameter.
    """
    return {p.name: p.from_text(text) for p in parameters() if (text := options.get(p.name))}


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Ray object spilling to Valkey."""
    if os.environ.get("NO_COLOR"):
        context.color = False


@cli.command()
@_json_option
def demo(as_json: bool) -> None:
    """Spill and restore 1.1 GiB, to see it work.

    Starts a Valkey and a small local Ray of its own, puts mixed data through them, compares every
    byte, and leaves nothing behind.
    """
    from ray_valkey_spill.cli.demo import run

    report = run(show_progress=not as_json)
    if as_json:
        _print_json(report.as_dict())
    else:
        _print_lines(rendering.pairs(report.rows()))
    if report.failure:
        raise SpillError(report.failure)


@cli.command()
@_parameter_options
@_json_option
def check(as_json: bool, **options: str | None) -> None:
    """Check this environment and the server, and say how to fix what is wrong.

    Exits with 1 if spilling would not work.
    """
    findings = []
    for finding in run_checks(_given(options)):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    failed = any(finding.status == FAILED for finding in findings)
    if as_json:
        _print_json({"ok": not failed, "findings": [finding.as_dict() for finding in findings]})
    sys.exit(1 if failed else 0)


@cli.command()
@_parameter_options
@click.option("--acl", is_flag=True, help="Print the permissions that the user needs instead.")
@_json_option
def config(acl: bool, as_json: bool, **options: str | None) -> None:
    """Print the configuration for Ray, in each form it can be given, ready to be pasted."""
    given = _given(options)
    spilling = spilling_config(**given)
    forms = {
        "ray start": "ray start --head --system-config="
        + shlex.quote(json.dumps(system_config(**given))),
        "environment": _environment(spilling),
        "KubeRay": _kuberay(spilling, given.get("password_file")),
        "Python": "import ray, ray_valkey_spill\n\nray.init(_system_config="
        f"ray_valkey_spill.system_config({', '.join(f'{k}={v!r}' for k, v in given.items())}))",
    }
    permissions = _acl(Config.load(given)) if acl else {}
    if as_json:
        _print_json(
            {
                "object_spilling_config": json.loads(spilling),
                "system_config": system_config(**given),
                "forms": forms,
                **({"acl": permissions} if acl else {}),
            }
        )
        return
    if acl:
        _print_forms(
            {
                "For valkey-cli, with the password in the place of PASSWORD": permissions[
                    "command"
                ],
                "For the server's aclfile, with in the place of SHA256 what this prints of it:\n"
                "#     printf %s 'PASSWORD' | sha256sum": permissions["aclfile"],
            }
        )
        click.echo(
            f"# Every node then needs username={permissions['user']}, and the password, in\n"
            "# RAY_VALKEY_SPILL_PASSWORD or in a file that password_file names. The server's\n"
            "# default user is open to everybody, unless it has a password or is off\n"
            "# (user default off)."
        )
        return
    _print_forms(forms)
    if check_params(given).username:
        where = given.get("password_file") or "RAY_VALKEY_SPILL_PASSWORD in the environment"
        click.echo(f"# The password: {where}, on every node.")


@cli.command()
@_parameter_options
@click.option("--session", default="", metavar="PREFIX", help="Only sessions that begin so.")
@click.option("--node", default="", metavar="PREFIX", help="Only nodes whose ids begin so.")
@_json_option
def ls(session: str, node: str, as_json: bool, **options: str | None) -> None:
    """List what is stored, in Valkey and in the overflow.

    An object's stored size is what the budget counts for it; in the overflow, its file's length.
    """
    with contextlib.closing(Inventory(_config(options))) as inventory:
        now = inventory.time()
        items = inventory.items(
            lambda owner: owner.session.startswith(session) and owner.node.startswith(node)
        )
        if as_json:
            _print_list(item.as_dict(inventory.keys, now) for item in items)
        else:
            _print_lines(rendering.listing(items, now))


@cli.command()
@_parameter_options
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=_WATCH_INTERVAL,
    metavar="[SECONDS]",
    help=f"Look again every so many seconds ({_WATCH_INTERVAL:g} unless given), until Ctrl-C.",
)
@_json_option
def stats(watch: float | None, as_json: bool, **options: str | None) -> None:
    """Tell how much is stored: by session, node and tier.

    Also how much of the budget is used (with --max-bytes, of how much), and when each node has last
    renewed its lease. With --json and --watch, each look is a line.
    """
    with contextlib.closing(Inventory(_config(options))) as inventory:
        if watch is None:
            found = inventory.statistics()
            if as_json:
                _print_json(found.as_dict())
            else:
                _print_lines(rendering.statistics(found))
            return
        redraws = sys.stdout.isatty() and not as_json
        if redraws:
            click.echo(_CLEAR, nl=False, color=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                found = inventory.statistics()
                if as_json:
                    click.echo(json.dumps(found.as_dict()))
                elif redraws:
                    _redraw(rendering.statistics(found))
                else:
                    _print_lines([*rendering.statistics(found), ""])
                time.sleep(watch)


@cli.command()
@_parameter_options
@click.argument("key")
@_json_option
def inspect(key: str, as_json: bool, **options: str | None) -> None:
    """Decode the header of an object, and see whether its chunks are there.

    KEY is the key of a header or a chunk, the URL that Ray has, an object's name as `ls --json`
    prints it, or an object's id in hex: every attempt to spill it is shown then.

    Exits with 1 if something of it is missing or wrong.
    """
    with contextlib.closing(Inspector(_config(options))) as inspector:
        keys = inspector.keys
        target = parse_target(key, keys)
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
            raise SpillError(f"{each.name} is no whole object: {each.problems[0]}")


@cli.command()
@_parameter_options
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@_json_option
def gc(dry_run: bool, as_json: bool, **options: str | None) -> None:
    """Remove what dead sessions, and dead nodes of running ones, have left.

    Watches for about a minute who renews a lease, and asks the GCS of each session that does not;
    one whose GCS cannot be asked is watched for ten. So run it where the GCS addresses of all
    clusters of the namespace can be reached.
    """
    notes: list[str] = []

    def tell(note: str) -> None:
        notes.append(note)
        if not as_json:
            click.echo(rendering.note(note))

    look = CleanUp(_config(options), running_at)
    with contextlib.closing(look):
        found = look.find(tell)
        if not dry_run:
            found = look.remove(found)
            look.recount()
    remains = [each for each in found if not each.is_empty]
    if as_json:
        listed = [_remains_dict(each) for each in remains]
        _print_json({"dry_run": dry_run, "remains": listed, "notes": notes})
    elif remains:
        _print_lines(rendering.remains_table(remains))
        done = "Would remove" if dry_run else "Removed"
        click.echo(rendering.wrapped(f"{done} {rendering.summary(remains)}.", first=""))
    else:
        click.echo("Nothing to remove.")
    if look.unavailable is not None:
        raise look.unavailable


# --- what the commands share ---


def _config(options: Mapping[str, str | None]) -> Config:
    """What the options and the environment give."""
    return Config.load(_given(options))


def _environment(spilling: str) -> str:
    # The spilling config reaches worker nodes through the head; other settings do not (Ray 2.60).
    settings = [
        f"export RAY_{name}={value}  # on every node" for name, value in RAY_SETTINGS.items()
    ]
    return "\n".join([f"export RAY_object_spilling_config={shlex.quote(spilling)}", *settings])


def _kuberay(spilling: str, password_file: str | None) -> str:
    head = _KUBERAY.format(
        config=json.dumps(spilling), threshold=RAY_SETTINGS["local_fs_capacity_threshold"]
    )
    if password_file is None:
        return f"{head}{_KUBERAY_CREDENTIAL}{_KUBERAY_WORKERS}              - *password\n"
    return (
        f"{head}{_KUBERAY_WORKERS}"
        f"# The pods of every group need {password_file}, from a secret that is mounted.\n"
    )


def _acl(config: Config) -> dict[str, str]:
    """The least that a user may have, as text for each place that it can be given in."""
    user = config.address.username or _USER
    rules = acl_rules(config)
    return {
        "user": user,
        "rules": rules,
        # What the user was allowed before, if there was one, is taken back.
        "command": f"ACL SETUSER {user} reset on >PASSWORD {rules}",
        "aclfile": f"user {user} reset on #SHA256 {rules}",
    }


def _remains_dict(remains: Remains) -> dict[str, Any]:
    """For JSON: what is removed of these; sizes in bytes."""
    objects, size, stored, _ = remains.usage if remains.session_is_dead else (0, 0, 0, 0)
    return {
        "session": remains.owner.session,
        "node": remains.owner.node,
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
    """One JSON document, of which a row at a time is in memory."""
    separator = "["
    for row in rows:
        click.echo(f"{separator}\n{json.dumps(row)}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _redraw(lines: Iterable[str]) -> None:
    """Put `lines` in the place of what was there, as far as the terminal has room for them."""
    height = shutil.get_terminal_size().lines
    coloured = click.get_current_context().color is not False
    shown = [line if coloured else click.unstyle(line) for line in lines][: height - 1]
    frame = "".join(f"{line}{_CLEAR_LINE}\n" for line in shown)
    click.echo(f"{_HOME}{_CUT}{frame}{_WRAP}{_CLEAR_BELOW}", nl=False, color=True)


def _print_forms(forms: Mapping[str, str]) -> None:
    for title, text in forms.items():
        click.echo(click.style(f"# {title}", bold=True))
        click.echo(text.rstrip() + "\n")


def _print_finding(finding: Finding) -> None:
    status = f"{finding.status:<7}"
    text = rendering.wrapped(finding.detail, first=f"{status}{finding.subject}".ljust(_INDENT))
    click.echo(click.style(status, fg=finding.color, bold=True) + text[len(status) :])
    if finding.hint:
        click.echo(rendering.wrapped(finding.hint, first=" " * _INDENT + "→ "))


def main() -> None:
    """Entry point: errors of this package end as one line on stderr, and exit code 1 or 2."""
    try:
        cli(prog_name="ray-valkey-spill")
    except SpillError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
