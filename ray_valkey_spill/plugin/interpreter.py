"""Commands that run modules of this package in separate processes."""

from __future__ import annotations

import sys

__all__ = ["module_command"]

# The same as `python -P -m`, which Python 3.10 does not have.
_RUN_MODULE = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *args: str) -> list[str]:
    """Return the command that runs `module` with `args`, as `python -m` does.

    Unlike `python -m`, it does not import from the working directory, where a `json.py` would
    replace Python's.
    """
    return [sys.executable, "-c", _RUN_MODULE, module, *args]
