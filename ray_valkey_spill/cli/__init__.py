"""The command line: commands, checks and output. No other layer imports it."""

import sys

__all__ = ["INTERRUPTED", "main"]

# The exit code after Ctrl-C, as shells report a process that SIGINT (2) ended.
INTERRUPTED = 130


def main() -> None:
    """Run the command line: see `commands.main`."""
    try:
        # Takes most of a second.
        from ray_valkey_spill.cli.commands import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    run()
