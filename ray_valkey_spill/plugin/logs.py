"""The format of log lines in IO workers, where Ray configures its own logger only."""

from __future__ import annotations

import logging

__all__ = ["set_default_format"]

# As Ray's own (`ray._private.ray_constants.LOGGER_FORMAT`), with the logger for the source line.
_FORMAT = "%(asctime)s\t%(levelname)s %(name)s -- %(message)s"


def set_default_format() -> None:
    """Print time, level and logger with each message that no configured handler takes.

    Python prints only the message of such a record. Handlers that are configured now or later stay
    as they are, and no line is printed twice. This changes the whole process, so call it only in
    processes without user code.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(_FORMAT))
