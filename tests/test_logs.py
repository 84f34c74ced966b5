"""The format of log lines in IO workers; test_ray_lost.py has it in a real one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

CONFIGURED = 'logging.basicConfig(format="mine %(message)s")'
FORMATTED = "from ray_valkey_spill.plugin.logs import set_default_format; set_default_format()"
LINE = 'logging.getLogger("ray_valkey_spill").warning("message")'


def printed(*statements: str) -> str:
    script = "\n".join(["import logging", *statements])
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stderr


def test_a_line_that_nobody_handles_has_time_level_and_logger() -> None:
    # However often it is asked for.
    line = printed(FORMATTED, FORMATTED, LINE)
    assert re.fullmatch(r"[-0-9]+ [:,0-9]+\tWARNING ray_valkey_spill -- message\n", line)


@pytest.mark.parametrize(
    "configured", [(CONFIGURED, FORMATTED), (FORMATTED, CONFIGURED)], ids=["before", "after"]
)
def test_users_handlers_are_used_as_they_are(configured: tuple[str, str]) -> None:
    assert printed(*configured, LINE) == "mine message\n"


def test_importing_the_package_configures_no_logging() -> None:
    assert printed("import ray_valkey_spill.plugin.storage", LINE) == "message\n"
