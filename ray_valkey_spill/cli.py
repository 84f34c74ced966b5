"""The command `ray-valkey-spill`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import click

from ray_valkey_spill import __version__
from ray_valkey_spill.check import FAILED, Finding
from ray_valkey_spill.check import run as run_checks
from ray_valkey_spill.config import (
    ENV_PREFIX,
    Config,
    parameters,
    spilling_config,
    system_config,
)
from ray_valkey_spill.errors import ConfigError, SpillError

__all__ = ["main"]

_INDENT = 22  # of the text of a finding

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
            - &password
              name: RAY_VALKEY_SPILL_PASSWORD
              valueFrom: {{secretKeyRef: {{name: valkey, key: password, optional: true}}}}
workerGroupSpecs:
  - template:
      spec:
        containers:
          - name: ray-worker
            env:
              - *password
"""


def _parameter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each parameter this version supports; those given are passed as `params`."""
    for parameter in reversed(parameters()):
        if parameter.supported:
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
def cli() -> None:
    """Ray object spilling to Valkey."""


@cli.command()
@_json_option
def demo(as_json: bool) -> None:
    """Spill and restore 1.1 GiB, to see it work.

    Starts a Valkey and a small local Ray of its own, puts mixed data through them, compares every
    byte, and leaves nothing behind.
    """
    from ray_valkey_spill.demo import run

    report = run(show_progress=not as_json)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print_table(report.rows())
    if report.failure:
        raise SpillError(report.failure)


@cli.command()
@_parameter_options
@_json_option
def check(as_json: bool, **options: str | None) -> None:
    """Check this environment and the server, and say what to mend.

    Exits with 1 if spilling would not work.
    """
    findings = []
    for finding in run_checks(_given(options)):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    failed = any(finding.status == FAILED for finding in findings)
    if as_json:
        report = {"ok": not failed, "findings": [finding.as_dict() for finding in findings]}
        click.echo(json.dumps(report, indent=2))
    sys.exit(1 if failed else 0)


@cli.command()
@_parameter_options
@_json_option
def config(as_json: bool, **options: str | None) -> None:
    """Print the configuration for Ray, in each form it can be given, ready to be pasted."""
    given = _given(options)
    spilling = spilling_config(**given)
    forms = {
        "ray start": "ray start --head --system-config="
        + shlex.quote(json.dumps(system_config(**given))),
        "environment": f"export RAY_object_spilling_config={shlex.quote(spilling)}",
        "KubeRay": _KUBERAY.format(config=json.dumps(spilling)),
        "Python": "import ray, ray_valkey_spill\n\nray.init(_system_config="
        f"ray_valkey_spill.system_config({', '.join(f'{k}={v!r}' for k, v in given.items())}))",
    }
    if as_json:
        click.echo(
            json.dumps(
                {
                    "object_spilling_config": json.loads(spilling),
                    "system_config": system_config(**given),
                    "forms": forms,
                },
                indent=2,
            )
        )
        return
    for title, text in forms.items():
        click.echo(click.style(f"# {title}", bold=True))
        click.echo(text.rstrip() + "\n")
    if Config.load(given, environ={}).address.username:
        click.echo("# The password: RAY_VALKEY_SPILL_PASSWORD in the environment of every node.")


def _print_finding(finding: Finding) -> None:
    status = f"{finding.status:<7}"
    text = _wrapped(finding.detail, first=f"{status}{finding.subject}".ljust(_INDENT))
    click.echo(click.style(status, fg=finding.color, bold=True) + text[len(status) :])
    if finding.mend:
        click.echo(_wrapped(finding.mend, first=" " * _INDENT + "→ "))


def _wrapped(text: str, *, first: str) -> str:
    """`text` behind `first`, in lines of the terminal's width, the further ones indented alike."""
    return textwrap.fill(
        text,
        min(100, shutil.get_terminal_size().columns),
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        click.echo(f"{label:<{width}}  {value}")


def main() -> None:
    """Entry point: errors of this package end as one line on stderr, and exit code 1 or 2."""
    try:
        cli(prog_name="ray-valkey-spill")
    except SpillError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
