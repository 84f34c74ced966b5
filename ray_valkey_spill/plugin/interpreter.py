"""How to run modules of this package in processes of their own."""

from __future__ import annotations

import sys

__all__ = ["module_command"]

# As `python -P -m` does it, which Python 3.10 does not have.
_RUN_MODULE = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *args: str) -> list[str]:
    """The command that runs `module` as `python -m` does, with `args`.

    `python -m` imports from the working directory first: a `json.py` there would replace Python's.
    This command does not.
    """
    return [sys.executable, "-c", _RUN_MODULE, module, *args]
