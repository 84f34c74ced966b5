"""The command line: commands, checks and output. No other layer imports it."""

from ray_valkey_spill.cli.commands import main

__all__ = ["main"]
