"""The format of log lines in IO workers, where Ray configures its own logger only."""

from __future__ import annotations

import logging

__all__ = ["set_default_format"]

# As Ray's own (`ray._private.ray_constants.LOGGER_FORMAT`), with the logger for the source line.
_FORMAT = "%(asctime)s\t%(levelname)s %(name)s -- %(message)s"


def set_default_format() -> None:
    """Print time, level and logger with each message that no configured handler takes.

    Python prints the bare message of such a record. Handlers that somebody configures, now or
    later, are used as they are, and no line is printed twice. This changes the whole process, so it
    is only for processes that no user code runs in.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(_FORMAT))
