"""Runs commands in this process."""

from __future__ import annotations

import inspect
from typing import Any

from click.testing import CliRunner


def cli_runner(**options: Any) -> CliRunner:
    """One that keeps stdout and stderr apart, as click's does by itself from 8.2 on."""
    if "mix_stderr" in inspect.signature(CliRunner).parameters:
        options["mix_stderr"] = False
    return CliRunner(**options)
