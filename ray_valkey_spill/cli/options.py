"""Options of the commands: one for each parameter, and what their values may be."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ray_valkey_spill.cli.ray_setting import CONFIG_VARIABLE, params_from_environment
from ray_valkey_spill.config import ENV_PREFIX, Config, parameters
from ray_valkey_spill.errors import ConfigError
from ray_valkey_spill.format.sealing import is_key
from ray_valkey_spill.units import parse_duration

__all__ = [
    "DURATION",
    "NUMBER",
    "SECONDS",
    "TEXT",
    "Command",
    "Given",
    "given",
    "parameter_options",
    "timeout_option",
]

# Seconds, about a year. Functions of Python that wait take no number that is far larger.
_LONGEST = 30e6

_F = TypeVar("_F", bound=Callable[..., Any])


# --- values ---


class _Value(click.ParamType):  # type: ignore[type-arg]
    """Text that is not empty, converted by `parse`. Errors name the option."""

    def __init__(
        self,
        name: str,
        parse: Callable[[str, str], Any] = lambda text, option: text,
        completes: str = "plain",
        choices: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self._parse = parse
        self._completes = completes
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        option = param.opts[-1] if param is not None else self.name
        if not value.strip():
            raise ConfigError(
                f"{option} is empty", "Leave it out, or check the variable that its value is from"
            )
        return self._parse(value, option)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if self._choices:
            return [CompletionItem(each) for each in self._choices if each.startswith(incomplete)]
        return [CompletionItem(incomplete, type=self._completes)]


def _duration(text: str, option: str) -> float:
    try:
        return parse_duration(text)
    except ValueError:
        raise ConfigError(f"{option} must be a duration such as 90s, 10m, 2h or 3d") from None


def _seconds(text: str, option: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _LONGEST:
        raise ConfigError(
            f"{option} must be a number of seconds above 0, and at most {_LONGEST:,.0f}"
        )
    return seconds


def _number(text: str, option: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text.strip()) or int(text) == 0:
        raise ConfigError(f"{option} must be a whole number above 0, of at most 18 digits")
    return int(text)


def _absolute(text: str, option: str) -> str:
    """Return the absolute path: processes of Ray have other working directories."""
    # A key in place of the path of its file stays as it is, for the error that does not show it.
    if is_key(text):
        return text
    try:
        return os.path.abspath(os.path.expanduser(text))
    except OSError as error:  # the working directory was removed
        raise ConfigError(
            f"{option} {text!r} is relative to a directory that is not there: {error.strerror}",
            "Give an absolute path",
        ) from None


TEXT = _Value("text")
DURATION = _Value("duration", _duration)
SECONDS = _Value("seconds", _seconds)
NUMBER = _Value("number", _number)

# What shells complete the value of a parameter with, by its metavar.
_COMPLETIONS = {"FILE": "file", "URI": "dir"}


# --- options ---


class _ParameterOption(click.Option):
    """The option of a parameter, which the help lists apart."""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parameter_options(command: _F) -> _F:
    """Add an option for each parameter; those given are passed on by name."""
    for parameter in reversed(parameters()):
        kind, default = parameter.kind, parameter.default
        parse = _absolute if parameter.is_file else parameter.from_text
        shown = str(default).lower() if isinstance(default, bool) else default
        command = click.option(
            _option(parameter.name),
            parameter.name,
            cls=_ParameterOption,
            metavar=kind.metavar,
            type=_Value("text", parse, _COMPLETIONS.get(kind.metavar, "plain"), kind.choices),
            help=parameter.meaning + ("" if default is None else f"  [default: {shown}]"),
        )(command)
    return command


timeout_option = click.option(
    "--timeout",
    type=SECONDS,
    default="5",
    show_default=True,
    metavar="SECONDS",
    help="Give up on a server that does not answer within this time.",
)


class Command(click.Command):
    """Lists its own options first in its help, then the parameters."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        of_parameters: list[tuple[str, str]] = []
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            # From click 8.5 on, arguments have one too. The command's text describes them.
            if record is not None and isinstance(each, click.Option):
                (of_parameters if isinstance(each, _ParameterOption) else own).append(record)
        with formatter.section("Options"):
            formatter.write_dl(own)
        if of_parameters:
            with formatter.section(
                f"Parameters (also {ENV_PREFIX}<NAME>; without --url, {CONFIG_VARIABLE})"
            ):
                formatter.write_dl(of_parameters)


# --- given parameters ---


@dataclass(frozen=True, slots=True)
class Given:
    """The parameters of a command, before the environment's `RAY_VALKEY_SPILL_<NAME>`.

    Attributes:
        params: as a spilling config has them.
        called: the user's name for each, for errors.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    called: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Config:
        """Add the environment. Raises ConfigError."""
        return Config.load(self.params, called=self.called)


def given(options: Mapping[str, Any]) -> Given:
    """Return the parameters from `options`, and from `RAY_object_spilling_config`.

    An option overrides one parameter of that variable. `--url` overrides all of them, since the
    others belong to the server that the variable names.

    Raises:
        ConfigError: the variable is used, and wrong.
    """
    from_options = dict(_given_options(options))
    called = {name: _option(name) for name in from_options}
    if "url" in from_options:
        return Given(from_options, called)
    of_ray = params_from_environment(os.environ)
    names = {name: f"{name} in {CONFIG_VARIABLE}" for name in of_ray}
    return Given({**of_ray, **from_options}, {**names, **called})


def _given_options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for parameter in parameters():
        if options.get(parameter.name) is not None:
            yield parameter.name, options[parameter.name]
